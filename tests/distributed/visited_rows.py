# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Short trainings on what was precomputed for them. `test_visited_rows.py` runs them in two processes, as

```bash
python -m torch.distributed.run --nproc_per_node=2 -m tests.distributed.visited_rows FOLDER
```

does.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from tests import tiny
from tests.distributed.row_weights import RowsOfSteps, make_trainer, pairs_of_sizes
from trl_diffusion.data.caching import TENSORS


CASES = {
    "a batch of one": {"per_device_train_batch_size": 1},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "to the end": {"per_device_train_batch_size": 3},
    "last dropped": {"per_device_train_batch_size": 2, "dataloader_drop_last": True},
    "data_seed": {"per_device_train_batch_size": 1, "data_seed": 5},
    "sequential": {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"},
    "global batches": {"per_device_train_batch_size": 2, "accelerator_config": {"split_batches": True}},
    "buckets": {"per_device_train_batch_size": 2, "aspect_ratio_buckets": True},
    "by epoch": {"per_device_train_batch_size": 1, "precompute_ref_preds": True},
}
RESUMED = "by epoch"


def run(folder: Path, case: str, is_resumed: bool = False) -> dict[str, list]:
    """The rows that were encoded, and those of the steps of this process."""
    dataset = pairs_of_sizes() if case == "buckets" else tiny.pairs(9)
    settings = {**CASES[case], "max_steps": 2, "precompute": True, "precompute_dir": str(folder / "cache")}
    settings |= {"save_strategy": "steps", "save_steps": 1} if case == RESUMED else {}
    trainer = make_trainer(folder / case, dataset, **settings)
    noted = RowsOfSteps(trainer)
    trainer.add_callback(noted)
    trainer.train(resume_from_checkpoint=is_resumed and str(folder / case / "checkpoint-1"))
    noised = [row for cache in trainer.noised_caches for row in cache.dataset["id"]]
    encoded = [row["id"] for row in trainer.train_dataset if row[TENSORS] is not None]
    return {"encoded": encoded, "steps": noted.steps[:-1], "noised": noised}


def run_all(folder: Path) -> dict[str, dict[str, list]]:
    return {case: run(folder, case) for case in CASES} | {"resumed": run(folder, RESUMED, is_resumed=True)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = run_all(Path(sys.argv[1]))
    torch.save(runs, Path(sys.argv[1]) / f"process-{PartialState().process_index}.pt")
