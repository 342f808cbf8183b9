#!/usr/bin/env bash
# Run several methods of a setting and print one table of them. Called by all.sh and the scripts of paper/:
# run_all.sh SETTING[,SETTING] METHOD... [what the table changes] -- [the user's arguments, see run_cascade.sh]
#
# What the table changes: --variant=NAME (of the runs' folders), --streaming, --by_setting (folders in --output_dir are
# those of several settings), --table_kind=KIND, or hyper-parameters, which come after those of every method's own script.
# Rows that are in several tables are made once: all tables keep their runs in the same folders.

set -euo pipefail
root=$(realpath -- "${BASH_SOURCE[0]}")
root=${root%/*}
settings=$1 options=() methods=() changes=() status=0
shift
while [ "$1" != -- ]; do
    case $1 in
        --variant=* | --streaming | --by_setting | --table_kind=*) options+=("$1") ;;
        --*) changes+=("$1") ;;
        *) methods+=("$1") ;;
    esac
    shift
done
shift
for table in ${settings//,/ }; do
    plan=()
    for method in "${methods[@]}"; do
        stated=$(bash "$root/$table/$method.sh" --print_method)
        mapfile -t -O ${#plan[@]} plan <<<"$stated"
        plan+=("${changes[@]}")
    done
    source "$root/$table/run.sh" '' # its setting and commands
    run_plan "${options[@]}" "${plan[@]}" -- "$@" || status=$?
    if [ "$status" -ge 128 ]; then break; fi # stopped
done
exit "$status"
