# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What a drawing costs with another model than is trained: time, what is loaded, and how many weights are on the device at once.

```bash
python -m tests.benchmark.sample_model --output sample_model.json
```
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones.source import PipelineSource


PROMPTS = ["a red circle", "a cat and a dog"]


def trainer_of(root: Path, sample_model: str | None) -> InstanceDPOTrainer:
    name = None if sample_model is None else str(root / sample_model)
    settings = {"resolution": 32, "max_sequence_length": 16, "num_inference_steps": 4, "guidance_scale": 3.5}
    args = InstanceDPOConfig(
        str(root / "out"), report_to="none", use_cpu=True, bf16=False, sample_model=name, **settings
    )
    return InstanceDPOTrainer(str(root / "base"), args=args, train_dataset=tiny.pairs(2), peft_config=tiny.lora())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.sample_model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base, turbo = tiny.flux_pipeline(), tiny.flux_pipeline(seed=1, guidance_embeds=False)
        base.save_pretrained(root / "base")
        turbo.save_pretrained(root / "its encoders")
        components = base.components | {"transformer": turbo.transformer, "scheduler": turbo.scheduler}
        type(base)(**components).save_pretrained(root / "the same encoders")
        kinds = (None, "the same encoders", "its encoders")
        trainers = {kind: trainer_of(root, kind) for kind in kinds}
        loaded: list[int] = []
        load_pipeline = PipelineSource.load_pipeline

        def counting(source: PipelineSource, **given: torch.nn.Module):
            pipeline = load_pipeline(source, **given)
            modules = [module for name, module in pipeline.components.items() if name not in given]
            weights = [weight for each in modules if isinstance(each, torch.nn.Module) for weight in each.parameters()]
            loaded.append(sum(weight.numel() for weight in weights))
            return pipeline

        PipelineSource.load_pipeline = counting
        seconds: dict = {kind: [] for kind in kinds}
        for _ in range(args.repeats + 1):  # the first is for warming up
            for kind, trainer in trainers.items():
                loaded.clear()
                start = time.perf_counter()
                trainer.sample(PROMPTS)
                seconds[kind].append((time.perf_counter() - start, sum(loaded)))
        found = {
            str(kind): {
                "seconds": [round(second, 4) for second, _ in times[1:]],
                "median": round(statistics.median(second for second, _ in times[1:]), 4),
                "weights_loaded": times[-1][1],
            }
            for kind, times in seconds.items()
        }
    for result in found.values():
        result["ratio"] = round(result["median"] / found["None"]["median"], 2)
    print("| sample model | median of a drawing, as a ratio | weights loaded for it |\n|---|---|---|")
    for kind, result in found.items():
        print(
            f"| {'the trained one' if kind == 'None' else kind} | {result['ratio']} | {result['weights_loaded']:,} |"
        )
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
