#!/usr/bin/env bash
# LCRON without the end-to-end term (Table 3).
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/run.sh" lcron_no_e2e \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 --terms=single -- "$@"
