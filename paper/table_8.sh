#!/usr/bin/env bash
# Table 8: LCRON at several temperatures.
exec bash "$(dirname -- "$(realpath -- "$0")")/../run_all.sh" two_stage \
    lcron_tau_1 lcron_tau_20 lcron_tau_50 lcron_tau_100 lcron_tau_200 lcron_tau_1000 -- "$@"
