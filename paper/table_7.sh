#!/usr/bin/env bash
# Table 7: the sorting operators alone and inside LCRON.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../run_all.sh" two_stage softsort neuralsort lcron_softsort lcron -- "$@"
