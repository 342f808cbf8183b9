# What all scripts of this folder share: source run.sh NAME [hyper-parameters] -- [the user's arguments]
setting=three_stage train=deep_components.run_train3 evaluate=deep_components.run_test3
source "$(dirname -- "${BASH_SOURCE[0]}")/../run_cascade.sh" "$@"
