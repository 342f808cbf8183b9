#!/usr/bin/env bash
# Table 10: the eight methods in two stages at learning rate 0.001 and batch size 2048.
exec bash "$(dirname -- "$(realpath -- "$0")")/../run_all.sh" two_stage \
    bce icc rankflow fs_ranknet fs_lambdaloss arf arf_v2 lcron \
    --variant=lr0.001_bs2048 --lr=0.001 --batch_size=2048 -- "$@"
