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
from deep_components.runs.folder import COST_FILE

BYTES_A_ROW = 8 * 4 * 4
REPORTED = ("peak_memory_bytes", "peak_gpu_memory_bytes", "seconds", "steps")


def main(argv: list[str]) -> None:
    parser = common.parser(__doc__, requests=65536, videos=82_200_000, authors=33_500_000)
    parser.add_argument("--host_tables", action="store_true", help="keep the large tables in host memory")
    args = parser.parse_args(argv)
    with common.simulated_log(args) as data_dir:
        day = common.open_day(args, data_dir)
        flags = common.training_flags(args, data_dir, *(["--table_memory=host"] if args.host_tables else []))
        subprocess.run([sys.executable, "-m", common.COMMANDS[args.setting].__name__, *flags], check=True)
        cost = json.loads((data_dir / "run" / COST_FILE).read_text())
        distinct = {table: len(day.ids(table)) for table in ("video", "author")}
    rows = sum(table.size for table in day.schema.tables.values()) * len(SETTINGS[args.setting].stages)
    results = {name: cost[name] for name in REPORTED}
    common.report(args, results | {"distinct_ids": distinct, "bytes_of_whole_tables": rows * BYTES_A_ROW})


if __name__ == "__main__":
    sys.exit(run_command(main))
