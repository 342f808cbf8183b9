# Train and evaluate one method with every seed, then print the table. Sourced by two_stage/run.sh and three_stage/run.sh,
# which set: setting, train, evaluate. Arguments: NAME [the method's hyper-parameters] -- [the user's arguments]
#
# The user's arguments:
#   --data_dir=D     a log in RecFlow's layout; default: data/ if RecFlow lies there, else a log simulated in data/simulated
#   --output_dir=O   default: runs/<setting>/<name>/<data folder>; a run is O/seed<seed>
#   --seeds=30,31    default: 30,31,32,33,34
#   --test_day, --save_scores go to the evaluation; --cache_dir, --time_zone, --cuda, --device to both; all else to the
#   training, after the method's own hyper-parameters, so that they win.
#   --resume goes on where a run has a saved state, and starts the others.
# Runs that are already in the output folder are made again. UNTRAINED=no leaves out the untrained cascade; RUN_LIST names
# a file that gets a line per run.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
name=$1
shift

train_args=()
while [ "$1" != -- ]; do
    train_args+=("$1")
    shift
done
shift

data_dir='' output_dir='' seeds=30,31,32,33,34 resume='' user_args=() test_args=() both_args=()
while [ $# -gt 0 ]; do
    option=${1%%=*}
    case $option in
        --data_dir | --output_dir | --seeds | --seed | --test_day | --cache_dir | --time_zone | --cuda | --device)
            if [ "$option" = "$1" ]; then # written as: --option value
                [ $# -ge 2 ] || { printf 'error: %s needs a value\n' "$option" >&2; exit 2; }
                set -- "$1=$2" "${@:3}"
            fi
            ;;
    esac
    case $option in
        --data_dir) data_dir=${1#*=} ;;
        --output_dir) output_dir=${1#*=} ;;
        --seeds | --seed) seeds=${1#*=} ;;
        --test_day | --save_scores) test_args+=("$1") ;;
        --cache_dir | --time_zone | --cuda | --device) both_args+=("$1") ;;
        --resume) resume=yes ;;
        --help | -h)
            sed -n '/^# Train and evaluate/,/^$/s/^# \{0,1\}//p' "$root/run_cascade.sh"
            exit 0
            ;;
        *) user_args+=("$1") ;;
    esac
    shift
done

source "$root/setup.sh"

if [ -z "$data_dir" ]; then
    if [ -d "$root/data/all_stage" ]; then
        data_dir=$root/data
    else
        data_dir=$root/data/simulated
        printf '%s\n' \
            '***********************************************************************************************' \
            '** There is no data under data/, so this runs on a SIMULATED log (data/simulated).           **' \
            '** It shows that everything works; its numbers say nothing about a real recommender.         **' \
            '** For real data see data/README.md.                                                         **' \
            '***********************************************************************************************' >&2
        mkdir -p "$root/data"
        (
            if command -v flock >/dev/null; then flock 9; fi # a second script started meanwhile waits here
            if [ ! -e "$data_dir/others/origin.json" ]; then
                "$PYTHON" -m deep_components.dataset.simulate --output_dir="$data_dir"
            fi
        ) 9>"$root/data/.simulated.lock"
        train_args+=(--batch_size=128) # 1,024 would leave 16 steps in this small log
    fi
fi
data_name=$(basename -- "$(cd -- "$data_dir" 2>/dev/null && pwd || printf '%s' "$data_dir")")
output_dir=${output_dir:-$root/runs/$setting/$name/$data_name}

runs=()
for seed in ${seeds//,/ }; do
    for run in "untrained/seed$seed" "seed$seed"; do
        extra=()
        if [ "${run%%/*}" = untrained ]; then # the same cascade before its first step
            [ "${UNTRAINED:-yes}" = yes ] || continue
            extra=(--epochs=0)
        elif [ "$resume" ] && [ -e "$output_dir/$run/training_state.safetensors" ]; then
            extra=(--resume)
        fi
        "$PYTHON" -m "$train" "${train_args[@]}" "${user_args[@]}" "${both_args[@]}" "${extra[@]}" \
            --seed="$seed" --data_dir="$data_dir" --output_dir="$output_dir/$run"
        "$PYTHON" -m "$evaluate" "${both_args[@]}" "${test_args[@]}" \
            --data_dir="$data_dir" --output_dir="$output_dir/$run"
        runs+=("$output_dir/$run")
        if [ -n "${RUN_LIST:-}" ]; then printf '%s\n' "$output_dir/$run" >>"$RUN_LIST"; fi
    done
done
"$PYTHON" -m deep_components.collect_metrics "${runs[@]}"
