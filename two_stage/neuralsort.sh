#!/usr/bin/env bash
# NeuralSort alone: cross-entropy of the relaxed permutation, stage by stage (Table 7).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" neuralsort \
    --loss_type=sorting --topk_op=neural_sort --tau=50 --lr=0.01 --batch_size=1024 -- "$@"
