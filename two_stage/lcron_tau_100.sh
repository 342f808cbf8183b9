#!/usr/bin/env bash
# LCRON at the temperature 100 (Table 8).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_tau_100 \
    --loss_type=lcron --tau=100 --lr=0.01 --batch_size=1024 -- "$@"
