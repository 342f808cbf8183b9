#!/usr/bin/env bash
# ICC (Gallagher et al., WSDM 2019).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" icc \
    --loss_type=icc --lr=0.01 --batch_size=1024 -- "$@"
