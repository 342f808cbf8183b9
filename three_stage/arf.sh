#!/usr/bin/env bash
# ARF (Wang et al., WWW 2024).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" arf \
    --loss_type=arf --tau=200 --lr=0.01 --batch_size=1024 -- "$@"
