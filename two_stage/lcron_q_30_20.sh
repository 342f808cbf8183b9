#!/usr/bin/env bash
# LCRON with the stages' quotas inside the end-to-end term (Appendix E.1).
exec bash "$(dirname -- "$(realpath -- "$0")")/run.sh" lcron_q_30_20 \
    --loss_type=lcron --tau=50 --lr=0.01 --batch_size=1024 --end_to_end_quotas=30,20 -- "$@"
