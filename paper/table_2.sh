#!/usr/bin/env bash
# Table 2: the eight methods in two stages.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../two_stage/all.sh" "$@"
