#!/usr/bin/env bash
# LCRON with SoftSort in the place of NeuralSort (Table 7).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_softsort \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 --topk_op=soft_sort -- "$@"
