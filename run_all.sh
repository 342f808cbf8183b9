# Run the eight methods of a setting and print one table of them. Sourced by two_stage/all.sh and three_stage/all.sh:
# source run_all.sh SETTING [the user's arguments]; they go to every method's script. With --output_dir=O a method's runs
# are in O/<method>.

setting=$1
shift
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
output_dir='' arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --output_dir=*) output_dir=${1#*=} ;;
        --output_dir)
            [ $# -ge 2 ] || { printf 'error: --output_dir needs a value\n' >&2; exit 2; }
            output_dir=$2
            shift
            ;;
        --help | -h) exec bash "$root/$setting/bce.sh" --help ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

RUN_LIST=$(mktemp) # every script adds its runs, a line each
trap 'rm -f -- "$RUN_LIST"' EXIT
export RUN_LIST
for method in bce icc rankflow fs_ranknet fs_lambdaloss arf arf_v2 lcron; do
    # The untrained cascade is the same for all methods: evaluated once.
    UNTRAINED=$([ "$method" = bce ] && echo yes || echo no) \
        bash "$root/$setting/$method.sh" "${arguments[@]}" ${output_dir:+--output_dir="$output_dir/$method"}
done
source "$root/setup.sh"
mapfile -t runs <"$RUN_LIST"
"$PYTHON" -m deep_components.collect_metrics "${runs[@]}"
