"""A training that only writes the files of one, in no time. --lr says how it goes:

13: it is refused; 14: it fails with a traceback; 15: after its first day it waits for the file ``go`` beside the run.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from tests.experiments.runs import CHECKSUMS

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--train_days", type=lambda text: text.split(","), required=True)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--seed", type=int, default=30)
parser.add_argument("--loss_type", default="lcron")
parser.add_argument("--tau", type=float)
parser.add_argument("--resume", action="store_true")
args, _ = parser.parse_known_args()
run: Path = args.output_dir

with (run / "calls").open("a") as file:
    file.write(json.dumps([*sys.argv[1:], os.environ.get("OMP_NUM_THREADS", "")]) + "\n")
if args.lr == 13:
    sys.exit("error: step 7: the loss is nan; lower --lr")
if args.lr == 14:
    raise RuntimeError("no memory")
state = run / "training_state.safetensors"
log = (run / "train.jsonl").read_text().splitlines() if args.resume else []
done = int(state.read_text()) if args.resume else 0
arguments = {"seed": args.seed, "epochs": args.epochs, "lr": args.lr, "loss_type": args.loss_type}
arguments |= {"batch_size": 1024}
arguments |= {"tau": args.tau} if args.tau is not None else {}
config = {"setting": "two_stage", "data": "simulated", "arguments": arguments, "train_days": args.train_days}
config |= {"data_checksums": {day: CHECKSUMS[day] for day in args.train_days}, "commit": "abc"}
(run / "training.json").unlink(missing_ok=True)
(run / "metrics.json").unlink(missing_ok=True)
(run / "config.json").write_text(json.dumps(config))
days = args.train_days if args.epochs else []
for count, day in enumerate(days[done:], start=done + 1):
    log.append(json.dumps({"step": len(log) + 1, "day": day, "seconds": 1.0}))
    (run / "train.jsonl").write_text("".join(f"{line}\n" for line in log))
    state.write_text(str(count))
    while args.lr == 15 and not (run.parent / "go").exists():
        (run / "pid").write_text(str(os.getpid()))
        time.sleep(0.01)
cost = {"steps": len(days), "seconds": 1.5 * len(days), "peak_memory_bytes": 1000}
(run / "training.json").write_text(json.dumps(cost))
