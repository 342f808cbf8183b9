# Train and evaluate one method with every seed, then print the table. Sourced by two_stage/run.sh and three_stage/run.sh,
# which set: setting, train, evaluate. Arguments: NAME [the method's hyper-parameters] -- [the user's arguments]
#
# The user's arguments:
#   --data_dir=D     a log in RecFlow's layout; default: data/ if RecFlow lies there, else a log simulated in data/simulated
#   --output_dir=O   default: runs/<setting>/<name>/<data folder>; a run is O/seed<seed>, or O/<name>/seed<seed> of a table
#   --seeds=30,31    default: 30,31,32,33,34
#   --methods=a,b    only these rows of a table
#   --batch_divisor=8 divides the scripts' batch sizes, for a small log; the simulated one has it by itself
#   --validation     for tuning: train on all training days but the last, and test on that one
#   --streaming      test each day with what was trained on all days before it, in one training that goes on
#   --jobs=2         runs at a time, spread over the CUDA devices; --threads=N of each
#   --engine=ray     on a Ray cluster (pip install -r requirements-ray.txt; RAY_ADDRESS names it)
#   --force          make again what is finished
#   --any_code       keep runs that other code has made, and go on with unfinished ones; the table marks them
#   --discard_state  remove the saved state of a finished run (three times the models' size), which only --resume needs
#   --resume         let a finished run go on with more --epochs or --train_days
#   --test_day, --save_scores go to the evaluation; --cache_dir, --time_zone, --cuda, --device, --no-compile to both; all
#   else to the training, after the method's own hyper-parameters, so that they win.
# Finished runs are kept, unfinished ones go on where they were, and a folder that holds another run is refused.
# UNTRAINED=no leaves out the untrained cascade. Exit code: 0; 2 when the input was refused; 1 when a run failed otherwise.

root=$(realpath -- "${BASH_SOURCE[0]}")
root=${root%/*}

if [ "${*: -1}" = --print_method ]; then # for run_all.sh: what the script states, a line each
    printf -- '--method=%s\n' "$1"
    shift
    while [ "$1" != -- ]; do
        printf '%s\n' "$1"
        shift
    done
    exit 0
fi

run_plan() { # [the runner's options] --method=NAME hyper-parameters [--method=...] -- [the user's arguments]
    local options=() data_dir='' any_code='' table_kind=metrics argument list runs status=0
    while [ "$1" != -- ]; do
        case $1 in
            --table_kind=*) table_kind=${1#*=} ;;
            *) options+=("$1") ;;
        esac
        shift
    done
    shift
    for argument in "$@"; do
        case $argument in
            --data_dir | --data_dir=*) data_dir=given ;;
            --any_code) any_code=$argument ;;
            --help | -h)
                sed -n '/^# Train and evaluate/,/^$/s/^# \{0,1\}//p' "$root/run_cascade.sh"
                exit 0
                ;;
        esac
    done
    source "$root/setup.sh"
    if [ -z "$data_dir" ]; then
        data_dir=$root/data
        if [ ! -d "$data_dir/all_stage" ]; then
            data_dir=$root/data/simulated
            options=(--batch_divisor=8 "${options[@]}") # a batch of 1,024 would leave 16 steps in this small log
        fi
        set -- "$@" --data_dir="$data_dir"
    fi
    if [ "${UNTRAINED:-yes}" != yes ]; then options=(--no-untrained "${options[@]}"); fi
    options=(--setting="$setting" --train="$train" --evaluate="$evaluate" --runs_dir="$root/runs" "${options[@]}")
    if [ "$data_dir" = "$root/data/simulated" ]; then simulate_log experiments "${options[@]}" -- "$@" || return; fi
    list=$(mktemp) || exit 2 # its own message says why: TMPDIR names no folder, or a full disk
    trap "rm -f -- ${list@Q}" EXIT
    run_attached deep_components experiments --run_list="$list" "${options[@]}" -- "$@" || status=$?
    mapfile -d '' runs <"$list"
    rm -f -- "$list"
    if [ ${#runs[@]} -gt 0 ]; then
        "$PYTHON" -m deep_components table --kind="$table_kind" ${any_code:+"$any_code"} "${runs[@]}" || status=$?
    fi
    return "$status"
}

run_attached() { # a module and its arguments: it stops, and keeps what is done, when this script is killed
    "$PYTHON" -m deep_components.experiments.attached "$BASHPID" "$@"
}

simulate_log() { # the command that will be called, and its arguments: a mistake in them is said first
    printf '%s\n' \
        '***********************************************************************************************' \
        '** There is no data under data/, so this runs on a SIMULATED log (data/simulated).           **' \
        '** It shows that everything works; its numbers say nothing about a real recommender.         **' \
        '** For real data see data/README.md.                                                         **' \
        '***********************************************************************************************' >&2
    mkdir -p "$root/data" || return
    (
        if command -v flock >/dev/null; then flock 9; fi # a second script started meanwhile waits here
        if [ ! -e "$root/data/simulated/others/origin.json" ]; then
            "$PYTHON" -m deep_components "$1" --check "${@:2}" &&
                "$PYTHON" -m deep_components simulate --output_dir="$root/data/simulated"
        fi
    ) 9>"$root/data/.simulated.lock"
}

if [ "${1:-}" ]; then # run_all.sh sources this file for its functions, with an empty argument
    name=$1
    shift
    run_plan --method="$name" "$@"
fi
