#!/usr/bin/env bash
# All eight methods and one table of them (the paper's Table 6). Arguments are passed on to every method's script.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../run_all.sh" three_stage "$@"
