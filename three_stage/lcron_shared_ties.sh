#!/usr/bin/env bash
# LCRON with tied labels sharing their rows, as in two stages; the original's are repeated.
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_shared_ties \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 --label_ties=shared -- "$@"
