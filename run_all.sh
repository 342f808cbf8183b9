# Run several methods of a setting and print one table of them. Sourced by all.sh and the scripts of paper/:
# source run_all.sh SETTING METHOD... [what the table changes] -- [the user's arguments, see run_cascade.sh]
#
# What the table changes: --variant=NAME (of the runs' folders), --streaming, --by_setting (folders in --output_dir are those
# of several settings), or hyper-parameters, which come after those of
# every method's own script. Rows that are in several tables are made once: all tables keep their runs in the same folders.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
table=$1 options=() methods=() changes=() plan=()
shift
while [ "$1" != -- ]; do
    case $1 in
        --variant=* | --streaming | --by_setting) options+=("$1") ;;
        --*) changes+=("$1") ;;
        *) methods+=("$1") ;;
    esac
    shift
done
shift
for method in "${methods[@]}"; do
    stated=$(PRINT_METHOD=yes bash "$root/$table/$method.sh")
    mapfile -t -O ${#plan[@]} plan <<<"$stated"
    plan+=("${changes[@]}")
done
source "$root/$table/run.sh" '' # its setting and commands
run_plan "${options[@]}" "${plan[@]}" -- "$@"
