#!/usr/bin/env bash
# LCRON at the temperature 20 (Table 8).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_tau_20 \
    --loss_type=lcron --tau=20 --lr=0.01 --batch_size=1024 -- "$@"
