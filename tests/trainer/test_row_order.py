# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is encoded for a training is what it visits."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.distributed.row_weights import RowsOfSteps, pairs_of_sizes
from tests.tiny import FAST, lora, losses
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)
from trl_diffusion.data.caching import TENSORS
from trl_diffusion.trainer.row_order import union


def make_trainer(
    folder: Path, dataset: Dataset | None = None, precompute: bool = True, **settings
) -> InstanceDPOTrainer:
    eval_dataset = settings.pop("eval_dataset", None)
    settings = {**FAST, "learning_rate": 1e-4, "precompute_dir": str(folder / "cache"), "resolution": 32, **settings}
    return InstanceDPOTrainer(
        tiny.sd_pipeline(),
        args=InstanceDPOConfig(str(folder), precompute=precompute, **settings),
        train_dataset=tiny.pairs(11) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        peft_config=lora(),
    )


def visits(trainer: InstanceDPOTrainer, **settings) -> list[list[str]]:
    """The ids of the rows of each step of a training."""
    noted = RowsOfSteps(trainer)
    trainer.add_callback(noted)
    trainer.train(**settings)
    return noted.steps[:-1]


def encoded(trainer) -> list[str]:
    """The ids of the rows to train on whose images are encoded."""
    return sorted(row["id"] for row in trainer.train_dataset if row[TENSORS] is not None)


def ids(rows: list[list[str]]) -> list[str]:
    return sorted({row for step in rows for row in step})


CASES = {
    "max_steps": ({"max_steps": 3}, 6),
    "part of an epoch": ({"max_steps": -1, "num_train_epochs": 0.4}, 6),
    "accumulation": ({"max_steps": 2, "gradient_accumulation_steps": 2}, 8),
    "accumulation to the end": ({"max_steps": 3, "gradient_accumulation_steps": 2}, 11),
    "another seed": ({"max_steps": 2, "seed": 7}, 4),
    "data_seed": ({"max_steps": 2, "data_seed": 5}, 4),
    "sequential": ({"max_steps": 2, "train_sampling_strategy": "sequential"}, 4),
    "last dropped": ({"max_steps": -1, "num_train_epochs": 1, "dataloader_drop_last": True}, 10),
    "last dropped, two epochs": (
        {"max_steps": 2, "dataloader_drop_last": True, "per_device_train_batch_size": 7},
        None,
    ),
    "more than an epoch": ({"max_steps": 8}, 11),
    "global batches": ({"max_steps": 2, "accelerator_config": {"split_batches": True}}, 4),
    "without precomputed order": ({"max_steps": 2, "accelerator_config": {"use_seedable_sampler": False}}, 11),
    "a batch that is found": ({"max_steps": 2, "auto_find_batch_size": True}, 11),
    "workers": ({"max_steps": 3, "dataloader_num_workers": 1}, 6),
    "buckets": ({"max_steps": 2, "aspect_ratio_buckets": True}, 4),
    "buckets, accumulation": ({"max_steps": 2, "aspect_ratio_buckets": True, "gradient_accumulation_steps": 2}, 8),
    "buckets that leave rows out": (
        {"max_steps": -1, "num_train_epochs": 1, "aspect_ratio_buckets": True, "per_device_train_batch_size": 3},
        6,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rows_that_are_visited_are_those_that_are_encoded(tmp_path, case):
    """No row more and none less, in the order and with the losses of a live run."""
    settings, number = CASES[case]
    dataset = pairs_of_sizes() if settings.get("aspect_ratio_buckets") else tiny.pairs(11)
    trainer = make_trainer(tmp_path, dataset, **settings)
    there = encoded(trainer)
    visited = visits(trainer)
    if case.startswith(("without", "a batch")):  # then all
        assert set(ids(visited)) < set(there) == set(dataset["id"])
        return
    assert ids(visited) == there and len(there) == (number or len(there))
    assert len(trainer.train_dataset) == len(dataset)
    live = make_trainer(tmp_path, dataset, precompute=False, **settings)
    assert visits(live) == visited
    torch.testing.assert_close(losses(trainer), losses(live), atol=2e-4, rtol=0)


def test_seeds_give_different_rows(tmp_path):
    """Else the cases above would not tell one order from another."""
    settings = [{}, {"seed": 7}, {"data_seed": 5}, {"train_sampling_strategy": "sequential"}]
    found = [encoded(make_trainer(tmp_path, max_steps=2, **setting)) for setting in settings]
    assert len(set(map(tuple, found))) == 4


def test_two_trainers_of_different_seeds_visit_their_own_rows(tmp_path):
    """The order is that of a trainer's own seed, whatever was seeded since it was made."""
    trainers = [make_trainer(tmp_path, max_steps=2, seed=seed) for seed in (0, 7)]
    torch.manual_seed(99)
    for trainer in trainers:
        assert ids(visits(trainer)) == encoded(trainer)


@pytest.mark.parametrize("save_steps", [2, 3])
def test_a_resumed_run_visits_the_rest(tmp_path, save_steps):
    """Within the first epoch: made anew with the same settings it encodes nothing, and ends as the uninterrupted run."""
    settings = {"max_steps": 4, "noise_source": "inversion", "inversion_steps": 2}
    whole = make_trainer(tmp_path, save_strategy="steps", save_steps=save_steps, **settings)
    visited = visits(whole)
    before = files(tmp_path)
    resumed = make_trainer(tmp_path, **settings)
    rest = visits(resumed, resume_from_checkpoint=str(tmp_path / f"checkpoint-{save_steps}"))
    assert files(tmp_path) == before and rest == visited[save_steps:]
    assert ids(visited) == encoded(resumed) and len(ids(visited)) == 8
    assert tiny.max_difference(tiny.weights(whole.model), tiny.weights(resumed.model)) == 0


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache").glob("*.arrow")}


def missing(said: str) -> dict[str, str]:
    return dict(re.findall(r"^Precomputing (.*): ([\d,]+ of [\d,]+) rows are missing", said, re.M))


def test_a_longer_run_encodes_what_it_visits_besides(tmp_path, capsys):
    """Rows, prompts and inversions of a shorter run stay; a shorter one or one with another seed takes what is there."""
    dataset = tiny.pairs(12).map(lambda row, index: {"prompt": f"{row['prompt']}{' a' * index}"}, with_indices=True)
    settings = {"dataset": dataset, "noise_source": "inversion", "inversion_steps": 2}
    images, inversions = "images of train_dataset", "noised rows of epoch 1"
    make_trainer(tmp_path, max_steps=2, **settings)
    assert missing(capsys.readouterr().out) == {images: "4 of 4", "prompts": "4 of 4", inversions: "4 of 4"}
    make_trainer(tmp_path, max_steps=5, **settings)
    assert missing(capsys.readouterr().out) == {images: "6 of 10", "prompts": "6 of 10", inversions: "6 of 10"}
    before = files(tmp_path)
    for steps in (1, 2, 4, 5):
        trainer = make_trainer(tmp_path, max_steps=steps, **settings)
        assert not missing(capsys.readouterr().out) and files(tmp_path) == before
    live = make_trainer(tmp_path, precompute=False, max_steps=5, **settings)
    assert visits(live) == visits(trainer)
    torch.testing.assert_close(losses(trainer), losses(live), atol=2e-4, rtol=0)
    make_trainer(tmp_path, max_steps=6, **settings)
    assert missing(capsys.readouterr().out) == {images: "2 of 12", "prompts": "2 of 12", inversions: "2 of 12"}
    make_trainer(tmp_path, max_steps=3, data_seed=3, **settings)
    assert not missing(capsys.readouterr().out)


def test_a_row_that_was_not_encoded_is_named(tmp_path):
    """A longer training than was said, and an evaluation of the rows that are not all there."""
    trainer = make_trainer(tmp_path, max_steps=2)
    visited = encoded(trainer)
    trainer.args.max_steps = 4
    with pytest.raises(ValueError, match=r"The row with id '(row-\d+)' was not encoded.*`max_steps`") as found:
        trainer.train()
    assert re.search(r"'(row-\d+)'", str(found.value))[1] not in visited
    trainer = make_trainer(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="was not encoded"):
        trainer.evaluate(trainer.train_dataset)


def test_noised_rows_that_a_longer_training_reaches_are_noised_live(tmp_path):
    """With all images there and half of the second epoch's inversions, the losses are those of a live run."""
    settings = {"dataset": tiny.pairs(6), "noise_source": "inversion", "inversion_steps": 2, "max_steps": 4}
    found = []
    for precompute in (True, False):
        trainer = make_trainer(tmp_path, precompute=precompute, **settings)
        assert [len(cache.dataset) for cache in trainer.noised_caches] == ([6, 2] if precompute else [])
        trainer.args.max_steps = 6
        trainer.train()
        found.append(losses(trainer))
    assert len(found[0]) == 6
    torch.testing.assert_close(*found, atol=2e-4, rtol=0)


def test_rows_to_evaluate_on_are_encoded_whole(tmp_path):
    """Also where no evaluation is asked for: `evaluate` may be called."""
    trainer = make_trainer(tmp_path, max_steps=1, eval_strategy="no", eval_dataset=tiny.pairs(5))
    assert len(encoded(trainer)) == 2 and len(trainer.eval_dataset) == 5
    live = make_trainer(tmp_path, precompute=False, max_steps=1, eval_dataset=tiny.pairs(5))
    assert trainer.evaluate()["eval_errors/chosen"] == pytest.approx(live.evaluate()["eval_errors/chosen"], abs=1e-6)


@pytest.mark.parametrize("prompt_dropout", [0.0, 0.5])
def test_only_prompts_of_visited_rows_are_encoded(tmp_path, prompt_dropout):
    """With the unconditional branch where prompts are dropped; of both stages of CPO those with the rows' attributes."""
    dataset = tiny.pairs(8).map(lambda row: {"prompt": f"a {row['id'][-1]}"})
    trainer = make_trainer(tmp_path, dataset, max_steps=2, prompt_dropout=prompt_dropout)
    rows = encoded(trainer)
    unconditional = [None] if prompt_dropout else []
    assert trainer.encoder.prompt_cache.dataset["prompt"][:] == [f"a {row[-1]}" for row in rows] + unconditional

    (tmp_path / "tiny.yaml").write_text(tiny.CRITERIA)
    paintings = tiny.paintings(8).map(lambda row: {"prompt": f"{row['prompt']} {row['id'][-1]}"})
    settings = FAST | {"criteria": str(tmp_path / "tiny.yaml"), "precompute": True, "max_steps": 2}
    settings |= {"prompt_dropout": prompt_dropout, "precompute_dir": str(tmp_path / "cache")}
    expert = AttributeSFTTrainer(
        tiny.sd_pipeline(), AttributeSFTConfig(str(tmp_path / "expert"), **settings), train_dataset=paintings
    )
    args = ComplexPOConfig(str(tmp_path / "policy"), **settings)
    for trainer in (expert, ComplexPOTrainer(tiny.sd_pipeline(), expert, args, train_dataset=paintings)):
        rows = [row for row in paintings if row["id"] in encoded(trainer)]
        assert len(rows) == 4
        asked = {prompt for row in rows for prompt in trainer.prompts_of(row)}
        assert set(trainer.encoder.prompt_cache.dataset["prompt"]) == asked and (None in asked) == bool(unconditional)
        if trainer is expert:
            trainer.train()


def test_a_dataset_with_a_transform_and_one_that_is_a_selection(tmp_path):
    """Rows are found by what a transform gives, and by their place in a selection."""
    settings = {"max_steps": 2}
    kinds = {
        "transform": tiny.pairs(9).with_transform(lambda batch: {**batch, "prompt": ["a cat"] * len(batch["id"])}),
        "selection": tiny.pairs(12).shuffle(seed=1).select(range(9)),
        "no ids": tiny.pairs(9).remove_columns("id"),
    }
    for name, dataset in kinds.items():
        runs = [make_trainer(tmp_path, dataset, precompute=on, **settings) for on in (False, True)]
        one, other = (visits(trainer) for trainer in runs)
        assert one == other and ids(one) == encoded(runs[1]), name
        torch.testing.assert_close(losses(runs[0]), losses(runs[1]), atol=2e-4, rtol=0)


def test_the_union_of_epochs():
    """All rows once each is among them."""
    one, other = np.array([0, 2]), np.array([1, 2])
    assert union([one, other], 4).tolist() == [0, 1, 2]
    assert union([one, other], 3) is None and union([one, None], 4) is None
