"""An evaluation that only writes metrics.json. The joint recall is the share of ten days that were trained on."""

import argparse
import json
from pathlib import Path

from tests.experiments.runs import CHECKSUMS

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=Path, required=True)
parser.add_argument("--test_day", required=True)
parser.add_argument("--test_random_items", type=int)
args, _ = parser.parse_known_args()
config = json.loads((args.output_dir / "config.json").read_text())
metrics = {"test_day": args.test_day, "test_day_checksum": CHECKSUMS[args.test_day]}
metrics |= {"test_random_items": args.test_random_items} if args.test_random_items else {}
metrics |= {"joint_recall@10@20": len(config["train_days"]) / 10}
(args.output_dir / "metrics.json").write_text(json.dumps(metrics))
