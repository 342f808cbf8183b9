#!/usr/bin/env bash
# What all scripts of this folder share: run.sh NAME [hyper-parameters] -- [the user's arguments]
set -euo pipefail
setting=three_stage train=deep_components.run_train3 evaluate=deep_components.run_test3
source "$(dirname -- "${BASH_SOURCE[0]}")/../run_cascade.sh" "$@"
