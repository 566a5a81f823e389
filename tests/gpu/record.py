# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the stages share: their arguments, and a JSON file that is complete after every case."""

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmark.__main__ import PACKAGES, device_name, quieten, version


def stage_args(description: str) -> argparse.Namespace:
    """The arguments that every stage is given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="Where to run.")
    parser.add_argument("--tiny", action="store_true", help="Tiny models and few cases.")
    parser.add_argument("--seconds", type=float, default=480, help="Time limit; no case begins after it.")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use. `--device cpu --tiny` walks through without one.")
    quieten()
    return args


def figure(what: str, value: str, aim: str | None = None, reached: bool | None = None) -> dict:
    """A line of the table at the end."""
    return {"what": what, "figure": value, "aim": aim, "reached": reached}


class Record:
    """
    The cases of a stage. A case that fails is a row with its error, and no case begins when the time is over.

    Args:
        args: The stage's arguments.
        figures: From the rows so far to the lines of the table.
    """

    def __init__(self, args: argparse.Namespace, figures: Callable[[list[dict]], list[dict]]):
        self.args, self.figures, self.start = args, figures, time.monotonic()
        self.rows: list[dict] = []
        self.skipped: list[dict] = []
        self.setting = {
            "device": device_name(args.device),
            "tiny": args.tiny,
            "threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "versions": {package: version(package) for package in PACKAGES},
        }

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.args.seconds - (time.monotonic() - self.start)

    def run(self, case: dict, function: Callable[[], dict], needs: float = 2.0) -> dict:
        """
        Runs a case, unless less than `needs` seconds are left, and writes the file.

        Returns:
            `dict`: the case with what the function returned, or with the `error`.
        """
        if self.left < needs:
            self.skip(case, f"{self.left:.0f} s were left")
            return case
        start, row = time.monotonic(), dict(case)
        try:
            row |= function()
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            row["out_of_memory"] = isinstance(error, torch.OutOfMemoryError)
            row["traceback"] = traceback.format_exc()[-1500:]
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()
        row["case_seconds"] = round(time.monotonic() - start, 2)
        self.rows.append(row)
        self.write()
        print(json.dumps({name: value for name, value in row.items() if name != "traceback"}), flush=True)
        return row

    def skip(self, case: dict, reason: str) -> None:
        """Says that a case was not run, and why."""
        self.skipped.append(case | {"skipped": reason})
        self.write()
        print(json.dumps(self.skipped[-1]), flush=True)

    def write(self) -> None:
        found = self.figures(self.rows)
        failed = sum("error" in row and not row["out_of_memory"] for row in self.rows)
        found.append(figure("cases that raised an error", f"{failed} of {len(self.rows)}", "0", failed == 0))
        if self.skipped:
            reasons = sorted({case["skipped"] for case in self.skipped})
            found.append(figure("cases that were skipped", f"{len(self.skipped)}: {'; '.join(reasons)[:200]}"))
        result = {"setting": self.setting, "figures": found, "rows": self.rows, "skipped": self.skipped}
        temporary = self.args.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(self.args.output)
