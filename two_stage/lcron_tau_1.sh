#!/usr/bin/env bash
# LCRON at the temperature 1 (Table 8).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_tau_1 \
    --loss_type=lcron --tau=1 --lr=0.01 --batch_size=1024 -- "$@"
