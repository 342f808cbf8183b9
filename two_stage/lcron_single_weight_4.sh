#!/usr/bin/env bash
# LCRON with the single-stage terms at the fixed weight 4 (Table 4).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_single_weight_4 \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 --single_weight=4 -- "$@"
