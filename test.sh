#!/usr/bin/env bash
# Environment, lint, types, tests. Arguments go to pytest: bash ./test.sh tests/loss -k lcron (-n 0: in one process)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
here=$(dirname -- "$(realpath -- "$0")")
REQUIREMENTS=requirements-test.txt
source "$here/setup.sh"
cd -- "$here"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# Test files are shared out among processes, one a core; what they start computes with one thread, unless said otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$PYTHON" -m pytest -n auto --maxprocesses=4 --dist=loadfile "$@"
