# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Trainings and evaluations of a few rows, cut in several ways. `test_row_weights.py` runs them in one process, and in two as

```bash
python -m torch.distributed.run --nproc_per_node=2 -m tests.distributed.row_weights FOLDER
```

does.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.data.padding import IS_PADDING


ROWS = 7
SIZES = [(40, 24)] * 4 + [(24, 40)] * 2 + [(32, 32)] * 4  # five batches of two
SETTINGS = {
    **tiny.FAST,
    "max_steps": 6,
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "beta": 20.0,
    "resolution": 32,
    "use_cpu": True,
}


class RowsOfSteps(TrainerCallback):
    """Notes the ids of the rows of each optimizer step in this process, without padding."""

    def __init__(self, trainer: InstanceDPOTrainer):
        self.steps: list[list[str]] = [[]]
        compute_loss = trainer.compute_loss

        def noted(model, inputs, *args, **kwargs):
            if model.training:
                is_padding = inputs[IS_PADDING].tolist() if IS_PADDING in inputs else [False] * len(inputs["id"])
                self.steps[-1] += [row for row, skip in zip(inputs["id"], is_padding, strict=True) if not skip]
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = noted

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append([])


def pairs_of_sizes() -> Dataset:
    """Pairs of one size each."""
    rows = tiny.pairs(len(SIZES), with_instances=False)
    images = [{"chosen": tiny.image(i, *size), "rejected": tiny.image(99 + i, *size)} for i, size in enumerate(SIZES)]
    return Dataset.from_list([{**row, **pair} for row, pair in zip(rows, images, strict=True)], features=rows.features)


def make_trainer(
    folder: Path, dataset: Dataset | IterableDataset, eval_dataset=None, **settings
) -> InstanceDPOTrainer:
    """All weights of the tiny pipeline."""
    args = InstanceDPOConfig(str(folder), **{**SETTINGS, **settings})
    return InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=dataset, eval_dataset=eval_dataset)


def train(
    folder: Path, dataset: Dataset | IterableDataset, resume_from: int | None = None, **settings
) -> dict[str, Any]:
    """The weights that a training starts from and ends on, what it logs, and the rows of its steps in this process."""
    trainer = make_trainer(folder, dataset, **settings)
    start, rows = tiny.weights(trainer.model), RowsOfSteps(trainer)
    trainer.add_callback(rows)
    trainer.train(resume_from_checkpoint=resume_from and str(folder / f"checkpoint-{resume_from}"))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"start": start, "end": tiny.weights(trainer.model), "logs": logs, "steps": rows.steps[:-1]}


def evaluate(folder: Path, dataset: Dataset | IterableDataset, predict: bool = False) -> dict[str, float]:
    """The metrics of a model that differs from its reference, but how long they took."""
    trainer = make_trainer(folder, tiny.pairs(ROWS), per_device_eval_batch_size=2)
    with torch.no_grad():
        trainer.model.conv_out.bias.add_(0.1)
    metrics = trainer.predict(dataset, metric_key_prefix="eval").metrics if predict else trainer.evaluate(dataset)
    metrics.pop("epoch", None)
    return {name: value for name, value in metrics.items() if not name.endswith(("_runtime", "_second", "_time"))}


def run_all(folder: Path, batch_size: int, accumulation: int, bucket_accumulation: int) -> dict[str, Any]:
    """Every run, with this batch and accumulation in a process; batches of buckets are of two."""
    cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    at_once = {"per_device_train_batch_size": batch_size * accumulation}
    rows, few = tiny.pairs(ROWS), tiny.pairs(3)
    bucketed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": bucket_accumulation}
    return {
        "memory": train(folder / "memory", rows, save_strategy="steps", save_steps=3, **cut),
        "resumed": train(folder / "memory", rows, resume_from=3, **cut),
        "averaged": train(folder / "averaged", rows, logging_steps=2, **cut),
        "stream": train(folder / "stream", rows.to_iterable_dataset(num_shards=2), **cut),
        "shuffled stream": train(
            folder / "shuffled", rows.to_iterable_dataset().shuffle(seed=1, buffer_size=4), **cut
        ),
        "short stream": train(folder / "short", tiny.pairs(5).to_iterable_dataset(), **cut),
        "buckets": train(folder / "buckets", pairs_of_sizes(), aspect_ratio_buckets=True, **bucketed),
        "last dropped": train(folder / "dropped", rows, dataloader_drop_last=True, **at_once),
        "evaluate memory": evaluate(folder, few),
        "evaluate stream": evaluate(folder, few.to_iterable_dataset()),
        "predict memory": evaluate(folder, few, predict=True),
        "predict stream": evaluate(folder, few.to_iterable_dataset(), predict=True),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = run_all(Path(sys.argv[1]) / "two", batch_size=1, accumulation=2, bucket_accumulation=1)
    torch.save(runs, Path(sys.argv[1]) / f"process-{PartialState().process_index}.pt")
