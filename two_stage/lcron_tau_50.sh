#!/usr/bin/env bash
# LCRON at the temperature 50 (Table 8).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_tau_50 \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 -- "$@"
