#!/usr/bin/env bash
# LCRON without the single-stage terms (Table 3).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_no_single \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 --terms=end_to_end -- "$@"
