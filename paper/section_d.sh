#!/usr/bin/env bash
# Section D: time and peak memory of the eight methods in two and three stages. One seed, one run at a time, unless
# --seeds and --jobs say otherwise; runs that Tables 2 and 6 have made are not made again.
UNTRAINED=no exec bash "$(dirname -- "$(realpath -- "$0")")/../run_all.sh" two_stage,three_stage \
    bce icc rankflow fs_ranknet fs_lambdaloss arf arf_v2 lcron --by_setting --table_kind=costs -- --seeds=30 "$@"
