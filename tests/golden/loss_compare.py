# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trains the golden arms on two revisions of this repository, and compares what they log.

```bash
python -m tests.golden.loss_compare main my-branch --arms iapo-sd-lora-random cpo-sd-lora-random
```

Each revision is checked out into a folder of its own, which is deleted afterwards, and uses the packages that are installed here.
Arms that only one of them has are named and left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .__main__ import difference


ROOT = Path(__file__).parents[2]
Golden = dict[str, dict[str, list[float]]]


@contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """A revision's files in a folder."""
    git = ["git", "-C", str(ROOT)]
    subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True)


def run(folder: Path, *arguments: str) -> str:
    """What the files of a folder print, run by this Python."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def record(revision: str, arms: list[str] | None, settings: str) -> Golden:
    """What a revision logs in those of the arms that it has; in all of its own, where none are named."""
    with tempfile.TemporaryDirectory() as parent, checked_out(revision, Path(parent) / "files") as folder:
        own = json.loads(
            run(folder, "-c", "import json; from tests.golden.arms import ARMS; print(json.dumps(list(ARMS)))")
        )
        file = Path(parent) / "losses.json"
        names = [name for name in own if arms is None or name in arms]
        if names:
            run(folder, "-m", "tests.golden", "--record", str(file), "--settings", settings, "--arms", *names)
        return json.loads(file.read_text()) if names else {}


def compare(before: Golden, now: Golden) -> dict[str, float]:
    """The largest difference of each arm that both have, in any metric that both log but the signs of margins."""
    return {
        name: max(difference(before[name][key], now[name][key]) for key in comparable(before[name], now[name]))
        for name in before
        if name in now
    }


def comparable(before: dict[str, list[float]], now: dict[str, list[float]]) -> list[str]:
    return [key for key in before if key in now and not key.endswith("rewards/accuracies")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.loss_compare")
    parser.add_argument("before", help="A commit, branch or tag.")
    parser.add_argument("now", nargs="?", default="HEAD", help="Another one. Defaults to what is committed here.")
    parser.add_argument("--arms", nargs="+", help="Which arms; all of them by default.")
    parser.add_argument("--settings", default="{}", help="JSON: settings to train with besides the arm's.")
    parser.add_argument("--tolerance", type=float, default=1e-6)
    args = parser.parse_args()
    before, now = (record(revision, args.arms, args.settings) for revision in (args.before, args.now))
    differences = compare(before, now)
    for name, largest in differences.items():
        print(f"{name:36} {largest:.1e}")
    if alone := sorted(before.keys() ^ now.keys()):
        print(f"Only in one of the two: {', '.join(alone)}.")
    if unknown := set(args.arms or []) - before.keys() - now.keys():
        raise SystemExit(f"Neither revision has {', '.join(sorted(unknown))}.")
    if moved := [name for name, largest in differences.items() if largest > args.tolerance]:
        raise SystemExit(f"Moved by more than {args.tolerance}: {', '.join(moved)}.")
    print(f"{len(differences)} arms are the same within {args.tolerance}.")


if __name__ == "__main__":
    main()
