#!/usr/bin/env bash
# ARF-v2: ARF with both halves of the selection.
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" arf_v2 \
    --loss_type=arf_v2 --tau=200 --lr=0.01 --batch_size=1024 -- "$@"
