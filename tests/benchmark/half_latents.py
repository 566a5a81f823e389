# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What latents in 16 bit change: in the latents and in the loss, with the trained VAE and denoiser of the quickstart.

```bash
python -m tests.benchmark.half_latents --output half.json
```
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.quickstart.world import preference_dataset
from trl_diffusion.trainer import diffusion_trainer
from trl_diffusion.trainer.precompute import Precomputation


def measured(dtype: torch.dtype, folder: Path, rows: int) -> dict:
    """Latents and losses of an evaluation whose latents were stored in a type."""

    def stored_so(encoder, collator, args) -> Precomputation:
        return Precomputation(encoder, collator, 16, str(folder), dtype)

    diffusion_trainer.Precomputation.for_training = stored_so
    pipeline = StableDiffusionPipeline.from_pretrained(shipped("base_pipeline"))
    args = InstanceDPOConfig(str(folder / "output"), precompute=True, report_to="none", use_cpu=True, beta=500.0)
    trainer = InstanceDPOTrainer(pipeline, args=args, eval_dataset=preference_dataset(rows, seed=0))
    with torch.no_grad():  # another policy than the reference, so that the loss is not ln 2
        for weight in trainer.policy.parameters():
            weight.mul_(1 + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    rows = trainer.data_collator([trainer.eval_dataset[row] for row in range(len(trainer.eval_dataset))])
    latents = trainer.encoder.sample_latents(rows, [(0, name, row) for name in "cr" for row in rows["id"]])
    metrics = trainer.evaluate()
    size = sum(path.stat().st_size for path in folder.glob("images*.arrow"))
    return {"latents": latents, "bytes": size, "loss": metrics["eval_loss"], "error": metrics["eval_errors/chosen"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmark.half_latents")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            found[str(dtype).removeprefix("torch.")] = measured(dtype, Path(folder), args.rows)
    exact, table = found["float32"], {}
    print(
        "| stored in | bytes | largest difference of a latent | mean | loss | error of the chosen image |\n|---|---|---|---|---|---|"
    )
    for name, result in found.items():
        difference = (result["latents"] - exact["latents"]).abs() / exact["latents"].std()
        table[name] = {key: result[key] for key in ("bytes", "loss", "error")}
        table[name] |= {"largest": difference.max().item(), "mean": difference.mean().item()}
        print("| {} | {bytes:,} | {largest:.1e} | {mean:.1e} | {loss:.7f} | {error:.7f} |".format(name, **table[name]))
    if args.output:
        args.output.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
