#!/usr/bin/env bash
# BCE: every stage classifies the items that reach it.
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" bce \
    --loss_type=bce --lr=0.01 --batch_size=1024 -- "$@"
