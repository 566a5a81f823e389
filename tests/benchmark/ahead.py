# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What the training thread spends on noise and on rows that were precomputed, before (made in the step) and now (made by a thread
during the step before). Times are CPU time of the training thread, in milliseconds.

```bash
OMP_NUM_THREADS=1 python -m tests.benchmark.ahead --output docs/source/benchmarks/ahead_cpu.json
```
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Value
from safetensors import torch as safetensors

from trl_diffusion.data.caching import TENSORS, TensorCache, precompute_dataset, stack_padded
from trl_diffusion.randomness import keyed_generator, keyed_noise
from trl_diffusion.trainer.ahead import Ahead, Need


NOISE = {"8 pairs, 4 x 128 x 128 (SDXL)": (4, 128, 128), "8 pairs, 16 x 128 x 128": (16, 128, 128)}
ROWS = 16  # prompts of SDXL that are looked up at once


def keys_of(step: int, columns: tuple[str, ...]) -> list[tuple]:
    return [(42, step, f"row-{row}", column) for column in columns for row in range(8)]


def noise_before(keys: list[tuple], shape: tuple[int, ...]) -> torch.Tensor:
    """Noise as it was made before."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(*key, "noise")) for key in keys])


def rows_before(cache: TensorCache, keys: list[str]) -> dict[str, torch.Tensor]:
    """Rows as they were looked up before."""
    rows = cache.dataset[[cache.places[key] for key in keys]][TENSORS]
    examples = [safetensors.load(row) for row in rows]
    return {name: stack_padded([example[name] for example in examples]) for name in examples[0]}


def milliseconds(function: Callable[[], Any]) -> float:
    start = time.thread_time()
    function()
    return 1000 * (time.thread_time() - start)


def measure(need: Need, before: Callable[[], Any], ask: Callable[[Ahead], Any], repeats: int) -> dict[str, float]:
    """CPU time of the training thread before, now, and now if the thread had not begun."""
    ahead, times = Ahead(torch.device("cpu")), []
    for _ in range(repeats):
        old, unforeseen = milliseconds(before), milliseconds(lambda: ask(ahead))
        ahead.coming.append(lambda: need)  # of the next step
        begun = milliseconds(ahead.advance)
        ahead.made[1].result()  # the step goes on meanwhile
        times.append((old, begun + milliseconds(lambda: ask(ahead)), unforeseen))
        ahead.advance()
    ahead.close()
    return dict(zip(("before", "now", "unforeseen"), map(statistics.median, zip(*times, strict=True)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.ahead")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name, shape in NOISE.items():
        all_keys = [keys_of(0, ("chosen", "rejected")), keys_of(0, ("",))]  # of the posterior, of the process
        results[name] = measure(
            Need(all_keys, shape, {}),
            lambda: [noise_before(keys, shape) for keys in all_keys],  # noqa: B023
            lambda ahead: [ahead.noise(keys, shape, "cpu") for keys in all_keys],  # noqa: B023
            args.repeats,
        )
        for keys in all_keys:
            assert torch.equal(noise_before(keys, shape), keyed_noise(keys, shape))
    with tempfile.TemporaryDirectory() as folder:
        prompts = [f"prompt {row}" for row in range(4 * ROWS)]
        tensors = {"prompt_embeds": torch.randn(77, 2048), "pooled": torch.randn(1280)}
        cache = TensorCache(
            precompute_dataset(
                Dataset.from_dict({"prompt": prompts}),
                lambda rows: [row | tensors for row in rows],
                Features({"prompt": Value("string")}),
                *("prompts", "benchmark", Path(folder), 8),
                say=lambda message: None,
            ),
            "prompt",
        )
        keys = prompts[::4]
        results[f"{ROWS} prompts of SDXL"] = measure(
            Need([], (), {cache: keys}),
            lambda: rows_before(cache, keys),
            lambda ahead: ahead.rows(cache, keys),
            args.repeats,
        )
    print("ms on the training thread         before      now   not foreseen")
    for name, times in results.items():
        print(f"{name:32} {times['before']:8.2f} {times['now']:8.3f} {times['unforeseen']:14.2f}")
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
