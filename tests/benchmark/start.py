# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
CPU seconds until a command does something: its help, from the parser and from `help.json`, and a training of one step, started
as a user starts it and forked as the tests do. Each round runs all of them.

```bash
python -m tests.benchmark.start --output start.json
```
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import tiny
from tests.cli import processes


BLOCKED = "import sys; sys.modules['bitsandbytes'] = None; "
IMPORT = "import trl_diffusion; trl_diffusion.InstanceDPOTrainer"


def cpu_seconds(args: list) -> float:
    """What `python ARGS` and the processes that it waits for take."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *map(str, args)], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def forked_cpu_seconds(args: list) -> float:
    """The same of a fork."""
    code = "import os, sys\ntry:\n    from trl_diffusion.cli import main\n    main()\nfinally:\n    print(sum(os.times()[:4]))"
    ended = processes.run(["-c", code, *args])
    assert ended.returncode == 0, ended.stderr
    return float(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file of the results")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.sd_pipeline().save_pretrained(folder / "model")
        (folder / "data").mkdir()
        tiny.pairs().to_parquet(folder / "data" / "train.parquet")
        flags = ["--model_name_or_path", folder / "model", "--dataset_name", folder / "data", "--report_to", "none"]
        flags = ["instance-dpo", *flags, "--max_steps", 1, "--num_processes", 1, "--output_dir", folder / "out"]
        measures = {
            "help, from the parser": lambda: cpu_seconds(["-m", "trl_diffusion.scripts.instance_dpo", "--help"]),
            "help, from help.json": lambda: cpu_seconds(["-m", "trl_diffusion", "instance-dpo", "--help"]),
            "a trainer's import": lambda: cpu_seconds(["-c", IMPORT]),
            "a trainer's import, bitsandbytes hidden": lambda: cpu_seconds(["-c", BLOCKED + IMPORT]),
            "a training, started": lambda: cpu_seconds(["-m", "trl_diffusion", *flags]),
            "a training, forked": lambda: forked_cpu_seconds(flags),
        }
        rounds = [{key: measure() for key, measure in measures.items()} for _ in range(args.rounds)]
    medians = {key: round(statistics.median(each[key] for each in rounds), 2) for key in measures}
    result = {"unit": "CPU seconds", "medians": medians, "rounds": rounds}
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
