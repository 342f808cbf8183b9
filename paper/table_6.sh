#!/usr/bin/env bash
# Table 6: the eight methods in three stages.
exec bash "$(dirname -- "$(realpath -- "$0")")/../three_stage/all.sh" "$@"
