#!/usr/bin/env bash
# LCRON with the single-stage terms at the fixed weight 0.1 (Table 4).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_single_weight_0.1 \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 --single_weight=0.1 -- "$@"
