# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trainings in two processes on the CPU, with DDP and with DeepSpeed, of the cases of `fsdp_runs.py`. `test_deepspeed.py` runs them as

```bash
python -m torch.distributed.run --nproc_per_node=2 -m tests.distributed.zero_runs FOLDER KIND CASE...
```

does. KIND is `ddp`, the stage of ZeRO (`2`, `3`), `after-2` or `after-3` for what DDP makes of their checkpoints, or `details`.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback

from tests.distributed.fsdp_runs import CASES, Case, make_trainer
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer
from trl_diffusion.trainer.sharding import whole_weights


STEPS = {"activation_checkpointing": True, "max_grad_norm": 0.5, "lr_scheduler_type": "linear", "max_steps": 3}


def zero_config(stage: int = 3, **settings) -> dict[str, Any]:
    """A configuration of DeepSpeed as transformers' documentation has it, which cuts small weights too."""
    sizes = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto")
    zero = {"stage": stage, **sizes, "stage3_param_persistence_threshold": 0, **settings}
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    precisions = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    return {**dict.fromkeys(batch, "auto"), **precisions, "zero_optimization": zero}


class LocalBytes(TrainerCallback):
    """Counts the bytes of the weights of policy and reference that this process holds after a step, and of them as a whole."""

    def __init__(self, trainer: DiffusionTrainer):
        self.trainer, self.local, self.whole = trainer, 0, 0

    def on_step_end(self, args, state, control, **kwargs):
        reference = self.trainer.reference
        models = [self.trainer.policy, *([reference.denoiser] if reference and reference.denoiser else [])]
        weights = [weight for model in models for weight in model.parameters()]
        self.local = sum(weight.ds_tensor.nbytes for weight in weights)
        self.whole = sum(weight.ds_numel * weight.itemsize for weight in weights)


def run(case: Case, folder: Path, experts: Path, resume_from: Path | None = None, **settings) -> dict[str, Any]:
    """Trains and saves: the weights that the training ends on, what it logs, its local bytes, and an evaluation before it."""
    trainer = make_trainer(case, folder, experts, **STEPS, **settings)
    before = trainer.evaluate()["eval_loss"]
    counted = LocalBytes(trainer)
    if settings.get("deepspeed", {}).get("zero_optimization", {}).get("stage") == 3:
        trainer.add_callback(counted)
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    trainer.save_model()
    weights = {name: value.clone() for name, value in whole_weights(trainer.policy).items()}
    after = trainer.evaluate()["eval_loss"]
    logs = trainer.state.log_history
    del trainer
    gc.collect()
    return {"weights": weights, "logs": logs, "bytes": (counted.local, counted.whole), "losses": (before, after)}


def run_cases(kind: str, folder: Path, names: list[str]) -> dict[Any, Any]:
    """Each case from its start, and with DeepSpeed resumed at its second step, from its own checkpoint and from that of DDP."""
    ends = {}
    for name in names:
        case = CASES[name]
        if kind == "ddp":
            ends[name] = run(case, folder / kind / name, folder)
        elif kind.startswith("after"):
            checkpoint = folder / kind.removeprefix("after-") / name / "checkpoint-2"
            ends[name] = run(case, folder / kind / name, folder, checkpoint)
        else:
            config = zero_config(int(kind))
            ends[name] = run(case, folder / kind / name, folder, deepspeed=config)
            for start in (kind, "ddp"):
                resumed, checkpoint = folder / f"{kind}-from-{start}" / name, folder / start / name / "checkpoint-2"
                ends[name, start] = run(case, resumed, folder, checkpoint, deepspeed=config)
    return ends


def run_details(folder: Path) -> dict[str, Any]:
    """What else a run with ZeRO-3 does, on a model given by its name."""
    config, found = zero_config(3), {}
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    settings |= {"metric_for_best_model": "eval_masks/area", "sample_prompts": None, "max_steps": 2}
    trainer = make_trainer(CASES["iapo-sd"], folder / "best", folder, **settings, deepspeed=config)
    encoder = AutoModel.from_pretrained(folder / "encoder")  # transformers cuts it not, as it would have
    found["encoders"] = [
        weight.numel() for model in (encoder, trainer.backbone.pipeline.text_encoder) for weight in model.parameters()
    ]
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    found["best"] = best.name, whole_weights(trainer.policy), load_file(next((best / "unet").glob("*.safetensors")))
    found["pipeline"] = np.asarray(
        trainer.pipeline()("a red circle", num_inference_steps=1, height=32, width=32).images[0]
    ).shape
    with pytest.raises(ValueError, match="a trainer trains once"):
        trainer.train()

    for name, poison in (
        ("loss", lambda losses: losses + float("inf")),
        ("gradient", lambda losses: losses * NanGradient.apply(losses)),
    ):
        trainer = make_trainer(CASES["sft-sd-lora"], folder / name, folder, sample_prompts=None, deepspeed=config)
        objective = trainer.objective
        trainer.objective = lambda model, noised, objective=objective, poison=poison: (
            poison(objective(model, noised)[0]),
            {},
        )
        before = whole_weights(trainer.policy)
        with pytest.raises(ValueError, match="The optimizer has not made") as error:
            trainer.train()
        found[name] = str(error.value), before, whole_weights(trainer.policy)
    return found


class NanGradient(torch.autograd.Function):
    """One, whose gradient is not finite."""

    @staticmethod
    def forward(context, losses: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(losses)

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, kind, *names = sys.argv[1:]
    ends = run_details(Path(folder)) if kind == "details" else run_cases(kind, Path(folder), names)
    torch.save(ends, f"{folder}/{kind}-{PartialState().process_index}.pt")
