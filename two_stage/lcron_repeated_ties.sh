#!/usr/bin/env bash
# LCRON with the binary labels of the three-stage original.
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_repeated_ties \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 --label_ties=repeated -- "$@"
