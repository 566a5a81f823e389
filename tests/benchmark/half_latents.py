# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What latents in 16 bit change, with the trained VAE and denoisers of the quickstart, a UNet and a rectified flow: in the latents, in
the loss of an evaluation, and in the losses of the first steps of a training of all weights.

```bash
python -m tests.benchmark.half_latents --output half.json
```
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.quickstart.models import MODELS
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.quickstart.world import preference_dataset
from trl_diffusion.trainer import diffusion_trainer
from trl_diffusion.trainer.precompute import Precomputation


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def measured(kind: str, dtype: torch.dtype, folder: Path, rows: int, steps: int) -> dict:
    """Latents, an evaluation and a training whose latents were stored in a type."""

    def stored_so(encoder, collator, args) -> Precomputation:
        return Precomputation(encoder, collator, 16, str(folder), dtype)

    diffusion_trainer.Precomputation.for_training = stored_so
    model = MODELS[kind]
    pipeline = DiffusionPipeline.from_pretrained(shipped(model.scenes), dtype=torch.float32)
    settings = {"precompute": True, "report_to": "none", "use_cpu": True, "beta": model.pair_beta}
    settings |= {"learning_rate": model.pair_training["learning_rate"]}
    settings |= {"per_device_train_batch_size": 8, "max_steps": steps, "logging_steps": 1, "save_strategy": "no"}
    args = InstanceDPOConfig(str(folder / "output"), disable_tqdm=True, **settings, **model.conditions)
    dataset = preference_dataset(rows, seed=0)
    trainer = InstanceDPOTrainer(pipeline, args=args, train_dataset=dataset, eval_dataset=dataset)
    batch = trainer.data_collator([trainer.eval_dataset[row] for row in range(len(trainer.eval_dataset))])
    latents = trainer.encoder.sample_latents(batch, [(0, name, row) for name in "cr" for row in batch["id"]])
    trainer.train()  # moves the policy away from the reference
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate()
    size = sum(path.stat().st_size for path in folder.glob("images-of-eval*.arrow"))
    found = {"bytes": size, "loss": metrics["eval_loss"], "error": metrics["eval_errors/chosen"]}
    return found | {"latents": latents, "losses": torch.tensor(losses, dtype=torch.float64)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.half_latents")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    table = {}
    print("| model | stored in | bytes | latents, rms | largest | evaluation's loss | first losses, mean | largest |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ("unet", "flow"):
        found = {}
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                found[str(dtype).removeprefix("torch.")] = measured(kind, dtype, Path(folder), args.rows, args.steps)
        exact = found["float32"]
        for name, result in found.items():
            difference = (result["latents"] - exact["latents"]) / exact["latents"].std()
            losses = (result["losses"] / exact["losses"] - 1).abs()
            row = {key: result[key] for key in ("bytes", "loss", "error")}
            row |= {"rms": difference.square().mean().sqrt().item(), "largest": difference.abs().max().item()}
            row |= {"loss_off": abs(result["loss"] / exact["loss"] - 1), "losses": result["losses"].tolist()}
            row |= {"losses_off": losses.mean().item(), "losses_most_off": losses.max().item()}
            table[f"{kind}, {name}"] = row
            print(
                "| {} | {} | {bytes:,} | {rms:.1e} | {largest:.1e} | {loss_off:.1e} | {losses_off:.1e} | {losses_most_off:.1e} |".format(
                    kind, name, **row
                )
            )
    if args.output:
        args.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
