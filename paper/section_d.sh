#!/usr/bin/env bash
# Section D: time and peak memory of the eight methods in two and three stages. One seed, one run at a time, unless
# --seeds and --jobs say otherwise; runs that Tables 2 and 6 have made are not made again.
here=$(dirname -- "$(realpath -- "$0")")
status=0
for setting in two_stage three_stage; do
    UNTRAINED=no bash "$here/../run_all.sh" "$setting" \
        bce icc rankflow fs_ranknet fs_lambdaloss arf arf_v2 lcron --by_setting --table_kind=costs -- --seeds=30 "$@" ||
        status=$?
    if [ "$status" -ge 128 ]; then exit "$status"; fi # stopped
done
exit "$status"
