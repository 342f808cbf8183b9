#!/usr/bin/env bash
# All eight methods and one table of them (the paper's Table 6).
exec bash "$(dirname -- "$(realpath -- "$0")")/../run_all.sh" three_stage \
    bce icc rankflow fs_ranknet fs_lambdaloss arf arf_v2 lcron -- "$@"
