#!/usr/bin/env bash
# Beyond the paper: LCRON and ARF-v2 with every selection operator, each with a temperature and a learning rate of its own,
# chosen on the validation day with the same budget, then tested with ten seeds against NeuralSort (docs/study.md).
#
# A part is one setting, number of random items and loss. The user's arguments, each as --name=value:
#   --settings=two_stage,three_stage  --lists=40,200  --losses=lcron,arf_v2      the parts, in this order
#   --operators=neural_sort,soft_sort,dftopk,lapsum,lml,sparse_topk              the methods of a part
#   --budget=9       trainings of each method on the validation day: all nine settings of its grid, or a random part; seed 30
#   --seeds=30,31    of the tests; default: 30 to 39
#   --data_dir=D     a log in RecFlow's layout; default: as in the other scripts
#   --output_dir=O   default: runs/operators; parts lie in O/<data folder>, their tables in O/<data folder>.md and .csv
#   --measure        also time the steps of the parts, last; only on a machine that does nothing else
#   --tables         make no runs, only the tables of those that are there
# --batch_size, --jobs, --threads, --cache_dir and all else go to `lcron sweep`. A list of 40 is a request's own items, of
# 200 these and up to 160 items of other requests, in training, choice and test; in three stages 50 and 210.
# Finished runs are kept: the same command goes on where it was stopped.

set -euo pipefail
root=$(realpath -- "${BASH_SOURCE[0]}")
root=${root%/*/*}
settings=two_stage,three_stage lists=40,200 losses=lcron,arf_v2 budget=9 seeds=30,31,32,33,34,35,36,37,38,39
operators=neural_sort,soft_sort,dftopk,lapsum,lml,sparse_topk
log='' output=$root/runs/operators measure='' tables='' users=() simulated=()
for argument in "$@"; do
    case $argument in
        --settings=*) settings=${argument#*=} ;;
        --lists=*) lists=${argument#*=} ;;
        --losses=*) losses=${argument#*=} ;;
        --operators=*) operators=${argument#*=} ;;
        --budget=*) budget=${argument#*=} ;;
        --seeds=*) seeds=${argument#*=} ;;
        --data_dir=*) log=${argument#*=} ;;
        --output_dir=*) output=${argument#*=} ;;
        --measure) measure=yes ;;
        --tables) tables=yes ;;
        --help | -h)
            sed -n '/^# Beyond the paper/,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) users+=("$argument") ;;
    esac
done

refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

taus() { # LOSS OPERATOR: its default temperature when the study began, a fifth of it and five times as much
    case $2 in
        neural_sort | soft_sort) if [ "$1" = lcron ]; then echo 10,50,250; else echo 40,200,1000; fi ;;
        dftopk | sparse_topk) echo 6,30,150 ;;
        lapsum) echo 2,10,50 ;;
        lml) echo 0.6,3,15 ;;
        *) return 1 ;;
    esac
}

state_part() { # SETTING LIST LOSS: its folder and the words of its sweep become `part` and `sweep`
    local setting=$1 items=$(($2 - 40)) loss=$3 stages=2 words=() grids=() operator tried
    part=$output/$name/$setting/random$items/$loss
    if [ "$setting" = three_stage ]; then stages=3; fi
    for operator in ${operators//,/ }; do
        tried=$(taus "$loss" "$operator") || refuse "--operators: $operator is no selection operator"
        grids+=(--grid="$operator:tau=$tried")
        words+=(--method="$operator" --loss_type="$loss" --topk_op="$operator" --batch_size=1024)
        if [ "$loss" = lcron ]; then words+=(--label_ties=shared); fi # in three stages too, see docs/study.md
        if [ "$items" -gt 0 ]; then words+=(--num_random_items="$items"); fi
    done
    sweep=(
        --setting="$setting" --train=deep_components.run_train$stages --evaluate=deep_components.run_test$stages
        "${simulated[@]}" --budget="$budget" --test_seeds="$seeds" --grid=lr=0.01,0.02,0.04 "${grids[@]}" "${words[@]}"
        -- --data_dir="$log" --output_dir="$part" --test_random_items="$items" "${users[@]}"
    )
}

make_part() { # SETTING LIST LOSS
    local part sweep status=0
    state_part "$@"
    run_attached deep_components sweep "${sweep[@]}" || status=$?
    # A training that failed counts as tried, and the next part is made. A stop ends all, and so does a mistake in the
    # arguments; where the part was made before, its tables stand, and the exit code says that it was refused.
    if [ "$status" -ge 128 ] || { [ "$status" -ne 0 ] && [ ! -e "$part/sweep.json" ]; }; then exit "$status"; fi
    if [ "$status" -ne 0 ]; then failed=$status; fi
}

measure_steps() { # SETTING
    local own=40 lengths=() methods=() items loss operator
    if [ "$1" = three_stage ]; then own=50; fi
    for items in ${lists//,/ }; do lengths+=($((own + items - 40))); done
    for loss in ${losses//,/ }; do
        for operator in ${operators//,/ }; do methods+=("${loss}_$operator"); done
    done
    run_attached benchmarks.long_lists --setting="$1" --items="$(IFS=,; echo "${lengths[*]}")" --steps=30 --device=cpu \
        --methods="$(IFS=,; echo "${methods[*]}")" --output="$output/steps_$1.json" >/dev/null
}

for list in ${lists//,/ }; do
    [[ $list =~ ^[1-9][0-9]{1,3}$ && $list -ge 40 ]] || refuse "--lists=$lists: give numbers from 40 on, as 40,200"
done
for setting in ${settings//,/ }; do
    [[ $setting == @(two|three)_stage ]] || refuse "--settings=$settings: give two_stage, three_stage or both"
done
for loss in ${losses//,/ }; do
    [[ $loss == @(lcron|arf_v2) ]] || refuse "--losses=$losses: give lcron, arf_v2 or both"
done
source "$root/run_cascade.sh" ''
source "$root/setup.sh"
if [ -z "$log" ]; then
    log=$root/data
    if [ ! -d "$log/all_stage" ]; then
        log=$root/data/simulated simulated=(--batch_divisor=8)
    fi
fi
name=$(realpath -m -- "$log")
name=${name##*/} failed=0
if [ ${#simulated[@]} -gt 0 ]; then
    read -r setting _ <<<"${settings//,/ }"
    read -r list _ <<<"${lists//,/ }"
    read -r loss _ <<<"${losses//,/ }"
    state_part "$setting" "$list" "$loss" # all parts have the user's arguments
    simulate_log sweep "${sweep[@]}"
fi
if [ -z "$tables" ]; then
    for list in ${lists//,/ }; do
        for setting in ${settings//,/ }; do
            for loss in ${losses//,/ }; do make_part "$setting" "$list" "$loss"; done
        done
    done
fi
compare=neural_sort steps=()
if [[ ,$operators, != *,neural_sort,* ]]; then compare=${operators%%,*}; fi
for setting in ${settings//,/ }; do
    if [ -n "$measure" ]; then measure_steps "$setting"; fi
    if [ -e "$output/steps_$setting.json" ]; then steps+=(--steps="$output/steps_$setting.json"); fi
done
for destination in --output="$output/$name.md" --output="$output/$name.csv" --format=text; do
    "$PYTHON" -m deep_components table --kind=choices --compare="$compare" --test=paired "${steps[@]}" \
        "$destination" "$output/$name"
done
exit "$failed"
