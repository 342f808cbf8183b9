#!/usr/bin/env bash
# SoftSort alone: cross-entropy of the relaxed permutation, stage by stage (Table 7).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" softsort \
    --loss_type=sorting --topk_op=soft_sort --tau=50 --lr=0.01 --batch_size=1024 -- "$@"
