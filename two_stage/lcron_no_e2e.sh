#!/usr/bin/env bash
# LCRON without the end-to-end term (Table 3).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_no_e2e \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 --terms=single -- "$@"
