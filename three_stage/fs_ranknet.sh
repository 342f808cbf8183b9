#!/usr/bin/env bash
# FS-RankNet: every stage learns the order of the groups.
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" fs_ranknet \
    --loss_type=fs_ranknet --lr=0.01 --batch_size=1024 -- "$@"
