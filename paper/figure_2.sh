#!/usr/bin/env bash
# Figure 2: streaming. Each day tests the eight methods trained on all days before it; one training goes on from day to day.
exec bash "$(dirname -- "$(realpath -- "$0")")/../run_all.sh" two_stage \
    bce icc rankflow fs_ranknet fs_lambdaloss arf arf_v2 lcron --streaming --table_kind=streaming -- "$@"
