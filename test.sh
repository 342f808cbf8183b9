#!/usr/bin/env bash
# Environment, lint, types, tests. Arguments go to pytest: bash ./test.sh tests/loss -k lcron
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
here=$(dirname -- "$(realpath -- "$0")")
REQUIREMENTS=requirements-test.txt
source "$here/setup.sh"
cd -- "$here"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest "$@"
