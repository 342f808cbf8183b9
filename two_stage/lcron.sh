#!/usr/bin/env bash
# LCRON (ICML 2025). Arguments are passed on: bash two_stage/lcron.sh --data_dir=D --lr=0.02
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 -- "$@"
