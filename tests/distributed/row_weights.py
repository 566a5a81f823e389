# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trainings and evaluations of 7 and 3 rows, cut in several ways. `test_row_weights.py` runs them in one process, and in two as

```bash
python -m torch.distributed.run --nproc_per_node=2 -m tests.distributed.row_weights FOLDER
```
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer


ROWS = 7
SETTINGS = {
    **tiny.FAST,
    "max_steps": 6,  # three epochs of two steps
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "beta": 20.0,
    "resolution": 32,
    "use_cpu": True,
    "dataloader_num_workers": 0,
    "gradient_accumulation_steps": 1,
}


class Watch(TrainerCallback):
    """Notes the rows of each optimizer step of this process, without padding."""

    def __init__(self, trainer: InstanceDPOTrainer):
        self.steps: list[list[str]] = [[]]
        compute_loss = trainer.compute_loss

        def noted(model, inputs, *args, **kwargs):
            if model.training:
                padding = inputs.get("is_padding", torch.zeros(len(inputs["id"]), dtype=torch.bool)).tolist()
                self.steps[-1] += [row_id for row_id, skip in zip(inputs["id"], padding, strict=True) if not skip]
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = noted

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append([])


def make_trainer(folder: Path, dataset: Dataset | IterableDataset | None = None, **settings) -> InstanceDPOTrainer:
    """All weights of the tiny pipeline."""
    args = InstanceDPOConfig(str(folder), **{**SETTINGS, **settings})
    dataset = tiny.pairs(ROWS) if dataset is None else dataset
    return InstanceDPOTrainer(
        tiny.sd_pipeline(), args=args, train_dataset=dataset, eval_dataset=settings.get("eval_dataset")
    )


def train(folder: Path, dataset=None, resume: bool = False, **settings) -> dict[str, Any]:
    """The weights that a training ends on and moved by, what it logs, and the rows of its steps in this process."""
    trainer = make_trainer(folder, dataset, **settings)
    start = tiny.weights(trainer.model)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    end = tiny.weights(trainer.model)
    return {"start": start, "end": end, "logs": logs, "steps": watch.steps[:-1]}


def evaluate(folder: Path, dataset: Dataset | IterableDataset, predict: bool = False) -> dict[str, float]:
    """The metrics of a model that differs from its reference, but how long they took."""
    trainer = make_trainer(folder, per_device_eval_batch_size=2)
    with torch.no_grad():
        trainer.model.conv_out.bias.add_(0.1)
    metrics = trainer.predict(dataset, metric_key_prefix="eval").metrics if predict else trainer.evaluate(dataset)
    return {name: value for name, value in metrics.items() if not name.endswith(("_runtime", "_second", "_time"))}


def of_one_size() -> Dataset:
    """Seven rows whose training size is one of three: 4, 2 and 1."""
    return tiny.pairs(ROWS)


def run_all(folder: Path, batch_size: int, accumulation: int) -> dict[str, Any]:
    """Every run, with the batch of a process and the accumulation."""
    cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    stream = tiny.pairs(ROWS).to_iterable_dataset()
    return {
        "memory": train(folder / "memory", **cut),
        "stream": train(folder / "stream", stream, **cut),
        "averaged": train(folder / "averaged", **{**cut, "logging_steps": 2}),
        "evaluate memory": evaluate(folder / "evaluate", tiny.pairs(3)),
        "evaluate stream": evaluate(folder / "evaluate", tiny.pairs(3).to_iterable_dataset()),
        "predict stream": evaluate(folder / "evaluate", tiny.pairs(3).to_iterable_dataset(), predict=True),
    }


if __name__ == "__main__":
    from accelerate import PartialState

    folder = Path(sys.argv[1])
    runs = run_all(folder / "two", 1, 2)
    torch.save(runs, folder / f"process-{PartialState().process_index}.pt")
