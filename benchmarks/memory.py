"""Peak memory of training at RecFlow's vocabulary: the whole command in a process of its own.

    python -m benchmarks.memory [--setting=two_stage] [--requests=65536] [--videos=82200000] [--authors=33500000]

Printed are the peak of the process, the distinct ids that the log names, and what whole tables would take: value,
gradient and two moments of every row in every stage.
"""

import json
import subprocess
import sys

from benchmarks import common
from deep_components.cascade import SETTINGS
from deep_components.cli import run_command
from deep_components.dataset.importers.recflow import LOG_COLUMN
from deep_components.runs.checkpoint import COST_FILE

BYTES_A_ROW = 8 * 4 * 4


def main(argv: list[str]) -> None:
    parser = common.parser(__doc__)
    parser.set_defaults(requests=65536, videos=82_200_000, authors=33_500_000)
    parser.add_argument("--host_tables", action="store_true", help="keep the large tables in host memory")
    args = parser.parse_args(argv)
    with common.simulated_log(args) as data_dir:
        day, counts = common.open_log(args, data_dir)
        command = f"deep_components.run_train{len(SETTINGS[args.setting].stages)}"
        run = data_dir / "run"
        subprocess.run(
            [
                *(sys.executable, "-m", command, f"--loss_type={args.loss_type}", f"--data_dir={data_dir}"),
                *(f"--output_dir={run}", f"--batch_size={args.batch_size}", f"--train_days={common.DAY}"),
                *(f"--device={args.device}", *(["--table_memory=host"] if args.host_tables else [])),
            ],
            check=True,
        )
        cost = json.loads((run / COST_FILE).read_text())
        distinct = {field: len(day.ids(field)) for field in ("video", "author")}
    rows = sum(counts[column] + 2 for column in LOG_COLUMN.values()) * len(SETTINGS[args.setting].stages)
    names = ("peak_memory_bytes", "peak_gpu_memory_bytes", "seconds", "steps")
    results = {name: cost[name] for name in names}
    common.report(args, results | {"distinct_ids": distinct, "bytes_of_whole_tables": rows * BYTES_A_ROW})


if __name__ == "__main__":
    sys.exit(run_command(main))
