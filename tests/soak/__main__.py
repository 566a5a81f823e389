# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trains the tiny pipeline for thousands of steps, with checkpoints, evaluations and samples, and looks at what grows.

```bash
python -m tests.soak --steps 5000 --output docs/source/benchmarks/soak.json
```

Each arm is a process of its own. After each hundredth of the steps it notes its memory, open files, threads, living tensors, and the
steps of a second of CPU time. What is said is how each changed from the end of the first fifth, the warm-up, to the end of the training.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)


NOTES = 100  # of a training
WARM_UP = 5  # one part in
ROOT = Path(__file__).parents[2]
BUSY = {"save_total_limit": 2, "eval_strategy": "steps", "save_strategy": "steps", "sample_prompts": ["a red circle"]}
# name: the trainer, and whether it logs, evaluates, saves and samples
ARMS = {
    **{trainer: (trainer, True) for trainer in ("iapo", "sft", "cpo")},
    **{f"{trainer}, logging off": (trainer, False) for trainer in ("iapo", "cpo")},
}


class Notes(TrainerCallback):
    """Notes what may grow."""

    def __init__(self, steps: int):
        self.every = max(1, steps // NOTES)
        self.process, self.entries, self.start = psutil.Process(), [], 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every:
            return
        seconds = time.process_time() - self.start
        gc.collect()
        entry = {
            "memory": self.process.memory_info().rss,
            "files": self.process.num_fds(),
            "threads": self.process.num_threads(),
            "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
            "steps_per_second": self.every / seconds,
        }
        self.entries.append(entry)
        self.start = time.process_time()


def make_trainer(name: str, folder: Path, steps: int, is_busy: bool):
    often = {
        "eval_steps": steps // 10,
        "save_steps": steps // 10,
        "sample_steps": steps // 10,
        "num_inference_steps": 2,
    }
    settings = tiny.FAST | {"use_cpu": True, "max_steps": steps, "report_to": "none", "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": 1, "activation_checkpointing": False}
    settings |= BUSY | often | {"logging_steps": 10} if is_busy else {"logging_strategy": "no"}
    (folder / "criteria.yaml").write_text(tiny.CRITERIA)
    own = {} if name == "iapo" else {"criteria": str(folder / "criteria.yaml")}
    rows, few = (tiny.pairs(8), tiny.pairs(2)) if name == "iapo" else (tiny.paintings(8), tiny.paintings(2))
    data = {"train_dataset": rows, "eval_dataset": few, "peft_config": tiny.lora()}
    if name == "iapo":
        return InstanceDPOTrainer(tiny.sd_pipeline(), args=InstanceDPOConfig(str(folder / "run"), **settings), **data)
    expert = AttributeSFTTrainer(
        tiny.sd_pipeline(), args=AttributeSFTConfig(str(folder / "run"), **settings, **own), **data
    )
    if name == "sft":
        return expert
    return ComplexPOTrainer(
        tiny.sd_pipeline(), expert, args=ComplexPOConfig(str(folder / "run"), **settings, **own), **data
    )


def soak(arm: str, steps: int) -> dict[str, Any]:
    """Trains an arm in this process. Returns what it notes, and how it changed after the warm-up."""
    torch.set_num_threads(1)
    notes = Notes(steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(ARMS[arm][0], Path(folder), steps, ARMS[arm][1])
        trainer.add_callback(notes)
        trainer.train()
    return {"arm": arm, "steps": steps, **changes(notes.entries), "notes": notes.entries}


def changes(entries: list[dict[str, float]]) -> dict[str, Any]:
    """From the end of the warm-up to the end: of medians of a fifth of the notes each, as they jump about."""
    size = len(entries) // WARM_UP
    parts = {name: [entry[name] for entry in entries] for name in entries[0]}
    early, late = (
        {name: statistics.median(values[part]) for name, values in parts.items()}
        for part in (slice(size, 2 * size), slice(-size, None))
    )
    return {
        "memory_growth": late["memory"] / early["memory"] - 1,
        "memory_mib": late["memory"] / 2**20,
        **{f"more_{name}": late[name] - early[name] for name in ("files", "threads", "tensors")},
        "throughput": late["steps_per_second"] / early["steps_per_second"],
    }


def run(arm: str, steps: int) -> dict[str, Any]:
    """As [`soak`], in a process of its own."""
    command = [sys.executable, "-m", "tests.soak", "--arm", arm, "--steps", str(steps)]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="Which arms.")
    parser.add_argument(
        "--arm", choices=list(ARMS), help="Train this one in this process, and print its result as JSON."
    )
    parser.add_argument("--output", type=Path, help="JSON file of the results.")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(soak(args.arm, args.steps)))
        return
    results = []
    print("| arm | steps | memory | growth | files | threads | tensors | throughput |\n|" + " --- |" * 8)
    for arm in args.arms:
        results.append(result := run(arm, args.steps))
        more = " | ".join(f"{result[f'more_{name}']:+.0f}" for name in ("files", "threads", "tensors"))
        size = f"{result['memory_mib']:.0f} MiB | {result['memory_growth']:+.2%}"
        print(f"| {arm} | {args.steps:,} | {size} | {more} | {result['throughput']:.2f} |", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
