# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Records what the trainers log, or compares it with what was recorded.

```bash
python -m tests.golden --record tests/golden/losses.json      # before a change
python -m tests.golden --compare tests/golden/losses.json     # after it: 1e-6 on the same machine
```
"""

import argparse
import json
from pathlib import Path

import torch

from .arms import ARMS, record


def difference(before: list[float], after: list[float]) -> float:
    """The largest difference between two series, relative where values are above 1."""
    if len(before) != len(after):
        return float("inf")
    return max(abs(a - b) / max(1, abs(a)) for a, b in zip(before, after, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden")
    parser.add_argument("--record", type=Path, help="Write what is logged to this file.")
    parser.add_argument("--compare", type=Path, help="Compare what is logged with this file.")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help="Which arms; all of them by default.")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: settings to train with besides the arm's.")
    parser.add_argument("--tolerance", type=float, default=1e-6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    golden = json.loads(args.compare.read_text()) if args.compare else {}
    recorded, moved = {}, []
    for name in args.arms:
        recorded[name] = record(name, args.settings)
        if args.compare:
            before = golden[name]
            largest = {key: difference(before.get(key, []), recorded[name].get(key, [])) for key in before}
            for key in ("rewards/accuracies", "eval_rewards/accuracies"):  # the sign of a margin, which may be rounding
                largest.pop(key, None)
            worst = max(largest, key=largest.get)
            moved += [name] if largest["loss"] > args.tolerance else []
            print(f"{name:36} loss {largest['loss']:.1e}, most {largest[worst]:.1e} ({worst})", flush=True)
        else:
            print(f"{name:36} loss {recorded[name]['loss'][0]:.6f} -> {recorded[name]['loss'][-1]:.6f}", flush=True)
    if args.record:
        lines = (f"{json.dumps(name)}: {json.dumps(values)}" for name, values in recorded.items())
        args.record.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if moved:
        raise SystemExit(
            f"{len(moved)} of {len(args.arms)} arms moved by more than {args.tolerance}: {', '.join(moved)}"
        )


if __name__ == "__main__":
    main()
