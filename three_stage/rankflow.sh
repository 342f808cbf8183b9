#!/usr/bin/env bash
# RankFlow (Qin et al., SIGIR 2022).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" rankflow \
    --loss_type=rankflow --lr=0.01 --batch_size=1024 -- "$@"
