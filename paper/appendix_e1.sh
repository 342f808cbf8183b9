#!/usr/bin/env bash
# Appendix E.1: LCRON with the stages' quotas inside the end-to-end term.
exec bash "$(dirname -- "$(realpath -- "$0")")/../run_all.sh" two_stage lcron lcron_q_30_20 -- "$@"
