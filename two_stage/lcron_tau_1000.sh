#!/usr/bin/env bash
# LCRON at the temperature 1000 (Table 8).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_tau_1000 \
    --loss_type=lcron --tau=1000 --lr=0.01 --batch_size=1024 -- "$@"
