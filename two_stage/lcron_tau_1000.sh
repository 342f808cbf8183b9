#!/usr/bin/env bash
# LCRON at the temperature 1000 (Table 8).
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/run.sh" lcron_tau_1000 \
    --loss_type=lcron --tau=1000 --lr=0.01 --batch_size=1024 -- "$@"
