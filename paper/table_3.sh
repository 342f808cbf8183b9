#!/usr/bin/env bash
# Table 3: LCRON without the end-to-end term, and without the single-stage terms.
exec bash "$(dirname -- "$(realpath -- "$0")")/../run_all.sh" two_stage lcron lcron_no_e2e lcron_no_single -- "$@"
