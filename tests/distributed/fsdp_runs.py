# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trainings of each trainer in one process, in two with DDP, and in two with FSDP2, whose weights are cut by accelerate's own
`fsdp2_prepare_model` on a mesh of CPUs. `test_fsdp.py` runs them as

```bash
python -m torch.distributed.run --nproc_per_node=2 -m tests.distributed.fsdp_runs fsdp FOLDER CASE...
```

does.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests import tiny
from tests.methods import METHODS
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer
from trl_diffusion.trainer.sharding import gathered


class Case(NamedTuple):
    """What is trained: by which of the `METHODS`, of which family, a LoRA or all weights, in which precision."""

    method: str
    family: str
    is_lora: bool
    bf16: bool = False


CASES = {
    "iapo-sd": Case("iapo", "sd", False),
    "iapo-sd-lora": Case("iapo", "sd", True),
    "iapo-sd3": Case("iapo", "sd3", False),
    "iapo-sd3-lora": Case("iapo", "sd3", True),
    "sft-sdxl": Case("sft", "sdxl", False),
    "sft-sd-lora": Case("sft", "sd", True),
    "sft-flux": Case("sft", "flux", False),
    "sft-sd3-lora": Case("sft", "sd3", True),
    "cpo-sd-lora": Case("cpo", "sd", True),
    "cpo-sd3-lora": Case("cpo", "sd3", True),
    "mapo-sd": Case("mapo", "sd", False),
    "safe-sd3-lora": Case("safe", "sd3", True),
    "ddspo-sd": Case("ddspo", "sd", False),
    "ddspo-sd3-lora": Case("ddspo", "sd3", True),
    "kto-sd": Case("kto", "sd", False),
    "kto-sd3-lora": Case("kto", "sd3", True),
    "iapo-sd-bf16": Case("iapo", "sd", False, bf16=True),
    "iapo-sd3-lora-bf16": Case("iapo", "sd3", True, bf16=True),
}
SETTINGS = {
    **tiny.FAST,
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "beta": 20.0,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "steps",
    "save_steps": 2,
    "sample_prompts": ["a red circle"],
    "sample_steps": 3,
    "num_inference_steps": 1,
}


class FsdpOnCpu:
    """
    Makes accelerate's state that of FSDP on the CPU, where it would be that of DDP: what `AcceleratorState` does on GPUs. All that
    follows is what follows there.
    """

    def __init__(self, **environment: str):
        self.environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment}

    def __enter__(self) -> None:
        init = AcceleratorState.__init__

        def with_fsdp(state, *args, fsdp_plugin: FullyShardedDataParallelPlugin | None = None, **kwargs) -> None:
            init(state, *args, **kwargs)
            if fsdp_plugin is not None:
                if state._mixed_precision != "no":
                    fsdp_plugin.set_mixed_precision(state._mixed_precision)
                state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
                PartialState._shared_state["distributed_type"] = DistributedType.FSDP

        self.patches = patch.dict(os.environ, self.environment), patch.object(AcceleratorState, "__init__", with_fsdp)
        for each in self.patches:
            each.start()

    def __exit__(self, *error) -> None:
        for each in self.patches:
            each.stop()


class LocalBytes(TrainerCallback):
    """Counts the bytes of the weights of policy and reference in this process after each step, and of them as a whole."""

    def __init__(self, trainer: DiffusionTrainer):
        self.trainer, self.counts = trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        reference = self.trainer.reference
        models = [self.trainer.policy, *([reference.denoiser] if reference and reference.denoiser else [])]
        weights = [weight for model in models for weight in model.parameters()]
        assert all(isinstance(weight, DTensor) for weight in weights)
        self.counts.append((sum(w.to_local().nbytes for w in weights), sum(w.numel() * w.itemsize for w in weights)))


def make_trainer(case: Case, folder: Path, experts: Path, **settings) -> DiffusionTrainer:
    """A trainer of a case; `experts` holds `criteria.yaml`, and an expert for each family."""
    pipeline, processes = tiny.PIPELINES[case.family](), int(os.environ.get("WORLD_SIZE", "1"))
    method = METHODS[case.method]
    settings = SETTINGS | tiny.settings(pipeline) | method.settings | {"bf16": case.bf16} | settings
    settings |= {"per_device_train_batch_size": 2 // processes}
    if case.method == "sft":
        settings.pop("beta")
    if method.reads_attributes:
        settings["criteria"] = str(experts / "criteria.yaml")
    return method.trainer(
        pipeline,
        **({"expert": str(experts / case.family)} if case.method == "cpo" else {}),
        args=method.config(str(folder), **settings),
        train_dataset=method.rows(8),
        eval_dataset=method.rows(3),
        peft_config=tiny.lora() if case.is_lora else None,
    )


def train(case: Case, folder: Path, experts: Path, resume_from: Path | None = None, **settings) -> dict[str, Any]:
    """Trains and saves: the weights that the training ends on, what it logs, and its local bytes where it is sharded."""
    trainer = make_trainer(case, folder, experts, **settings)
    counted = LocalBytes(trainer)
    if trainer.is_sharding:
        trainer.add_callback(counted)
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    trainer.save_model()
    weights = {name: value.clone() for name, value in gathered(trainer.policy.state_dict(), is_kept=True).items()}
    return {"weights": weights, "logs": trainer.state.log_history, "bytes": counted.counts}


def run_cases(mode: str, folder: Path, names: list[str]) -> dict[Any, Any]:
    """Each case from its start; where it is sharded, also resumed at its second step."""
    ends = {}
    for name in names:
        case, own = CASES[name], folder / mode / name
        ends[name] = train(case, own, folder)
        if mode == "fsdp":
            ends[name, "resumed"] = train(case, folder / mode / f"{name}-resumed", folder, own / "checkpoint-2")
    return ends


# Further settings, by a name, and what they are tried on
DETAILS = {
    "best": (CASES["iapo-sd-lora"], {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}),
    "precomputed": (CASES["iapo-sd"], {"precompute": True, "precompute_ref_preds": True}),
    "sample model": (CASES["iapo-sd-lora"], {"sample_model": "other"}),
    "adamw": (
        CASES["iapo-sd"],
        {"optim": "adamw_torch_fused", "optim_args": None, "learning_rate": 1e-4, "activation_checkpointing": True},
    ),
}


def run_details(mode: str, folder: Path) -> dict[str, Any]:
    """What else a run does: each detail, an evaluation before the training, and where it is sharded, one resumed that was not."""
    ends = {}
    for name, (case, settings) in DETAILS.items():
        settings = {key: str(folder / value) if key == "sample_model" else value for key, value in settings.items()}
        ends[name] = train(case, folder / mode / name, folder, **settings)
    if mode == "details":
        case, settings = DETAILS["adamw"]
        ends["resumed"] = train(
            case, folder / mode / "resumed", folder, folder / "one" / "adamw" / "checkpoint-2", **settings
        )
    metrics = make_trainer(CASES["iapo-sd"], folder / mode / "evaluated", folder).evaluate()
    ends["evaluated before"] = {name: value for name, value in metrics.items() if "rewards" in name or "loss" in name}
    return ends


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    with nullcontext() if mode in ("one", "ddp") else FsdpOnCpu():
        ends = run_details(mode, folder) if mode == "details" else run_cases(mode, folder, names)
    torch.save(ends, folder / f"{mode}-{PartialState().process_index}.pt")
