#!/usr/bin/env bash
# FS-LambdaLoss: every stage learns the full order, pairs weighted.
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" fs_lambdaloss \
    --loss_type=fs_lambdaloss --lr=0.01 --batch_size=1024 -- "$@"
