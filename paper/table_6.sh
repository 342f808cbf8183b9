#!/usr/bin/env bash
# Table 6: the eight methods in three stages.
set -euo pipefail
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../three_stage/all.sh" "$@"
