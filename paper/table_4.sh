#!/usr/bin/env bash
# Table 4: LCRON with the single-stage terms at fixed weights.
exec bash "$(dirname -- "$(realpath -- "$0")")/../run_all.sh" two_stage \
    lcron_single_weight_0.01 lcron_single_weight_0.1 lcron_single_weight_0.5 lcron_single_weight_1 \
    lcron_single_weight_2 lcron_single_weight_3 lcron_single_weight_4 lcron_single_weight_5 -- "$@"
