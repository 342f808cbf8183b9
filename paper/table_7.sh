#!/usr/bin/env bash
# Table 7: the sorting operators alone and inside LCRON.
exec bash "$(dirname -- "$(realpath -- "$0")")/../run_all.sh" two_stage softsort neuralsort lcron_softsort lcron -- "$@"
