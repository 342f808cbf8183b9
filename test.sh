#!/usr/bin/env bash
# Environment, lint, types, tests. Arguments go to pytest: bash ./test.sh tests/loss -k lcron
set -euo pipefail
REQUIREMENTS=requirements-test.txt
source "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest "$@"
