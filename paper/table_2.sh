#!/usr/bin/env bash
# Table 2: the eight methods in two stages.
exec bash "$(dirname -- "$(realpath -- "$0")")/../two_stage/all.sh" "$@"
