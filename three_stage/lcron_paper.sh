#!/usr/bin/env bash
# LCRON as the paper writes it: Eq. 13's weights, tied labels sharing their rows.
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_paper \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 --weighting=paper --label_ties=shared -- "$@"
