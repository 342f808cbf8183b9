# Run the eight methods of a setting and print one table of them. Sourced by two_stage/all.sh and three_stage/all.sh:
# source run_all.sh SETTING [the user's arguments]; --output_dir=O (default runs/<setting>/all) holds a folder per method.

setting=$1
shift
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
output_dir=$root/runs/$setting/all arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --output_dir=*) output_dir=${1#*=} ;;
        --output_dir)
            [ $# -ge 2 ] || { printf 'error: --output_dir needs a value\n' >&2; exit 2; }
            output_dir=$2
            shift
            ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

for method in bce icc rankflow fs_ranknet fs_lambdaloss arf arf_v2 lcron; do
    # The untrained cascade is the same for all methods: evaluated once.
    UNTRAINED=$([ "$method" = bce ] && echo yes || echo no) \
        bash "$root/$setting/$method.sh" "${arguments[@]}" --output_dir="$output_dir/$method"
done
source "$root/setup.sh"
"$PYTHON" -m deep_components.collect_metrics "$output_dir"
