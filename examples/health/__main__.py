# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What a healthy training looks like, and what goes wrong: tiny bases are trained with good and with bad settings, and drawn and scored as
they change. The runs, figures and pictures of two pages of the documentation, on a CPU:

```bash
python -m examples.health --output_dir health
```

Every finished run is kept, so if it is stopped, the same command continues. At the end `health.json` holds all runs, and `tables.md` and
the pictures summarise them.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from datasets import disable_progress_bars

from .runs import GRID, RUNS, Sizes, collect, run_once


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs, figures and pictures of healthy and of broken trainings.")
    parser.add_argument(
        "--output_dir", default="health", help="Where the runs, the tables and the pictures are written."
    )
    sizes = Sizes(parser.parse_args().output_dir)
    if find_spec("matplotlib") is None:
        raise ValueError('The pictures need matplotlib: `pip install "trl-diffusion[evaluation]"`.')
    from .pictures import grid_picture, grid_table, health_picture, health_table

    # The first run of each world computes what the others share
    first = ["healthy", "stabilized"]
    rest = [name for name in RUNS | GRID if name not in first]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=disable_progress_bars) as pool:
        for names in (first, rest):
            list(pool.map(partial(run_once, sizes=sizes), names))
    health, folder = collect(sizes), Path(sizes.output_dir)
    (folder / "health.json").write_text(json.dumps(health) + "\n")
    (folder / "tables.md").write_text(f"{health_table(health['runs'])}\n\n{grid_table(health['runs'])}\n")
    for name in RUNS:
        health_picture(health["runs"], name, sizes.output_dir).savefig(folder / f"health_{name}.png", dpi=100)
    grid_picture(health["runs"]).savefig(folder / "health_grid.png", dpi=100)
    print(f"Done: look at {folder / 'tables.md'} and {folder / 'health_*.png'}.")


if __name__ == "__main__":
    main()
