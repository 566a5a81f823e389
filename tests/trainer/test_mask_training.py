# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Trainings on instances with segmentation masks, and with margins around boxes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests import tiny
from tests.tiny import FAST, losses
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, instance_pair_features


def boxed_rows() -> list[dict]:
    """Pairs that are cropped but not resized to 32 pixels, so that boxes end where pixels do."""
    return [tiny.pairs()[number] for number in (0, 1, 3, 4)]


def masked(row: dict, places: tuple[int, ...]) -> dict:
    """The row with rectangles as masks in the place of some boxes."""
    instances = [dict(instance) for instance in row["instances"]]
    for instance in (instances[place] for place in places):
        for name in ("chosen", "rejected"):
            left, top, right, bottom = (int(side) for side in instance[f"{name}_box"])
            mask = np.zeros(row[name].size[::-1], bool)
            mask[top:bottom, left:right] = True
            instance |= {f"{name}_box": None, f"{name}_mask": Image.fromarray(mask)}
    return row | {"instances": instances}


def rows(*places: tuple[int, ...]) -> Dataset:
    """The pairs, each with masks in the place of the boxes of some instances."""
    made = [masked(row, of_row) for row, of_row in zip(boxed_rows(), places, strict=True)]
    return Dataset.from_list(made, features=instance_pair_features(masks=True))


def trained(tmp_path: Path, dataset: Dataset, **settings) -> InstanceDPOTrainer:
    pipeline = tiny.sd_pipeline()
    settings = {
        "output_dir": str(tmp_path / "out"),
        **FAST,
        **tiny.settings(pipeline),
        "learning_rate": 1e-3,
        **settings,
    }
    trainer = InstanceDPOTrainer(pipeline, args=InstanceDPOConfig(**settings), train_dataset=dataset)
    trainer.train()
    return trainer


MIXED = ((0, 1), (1,), (), (0,))


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("mask_overlap", ["mean", "covering"])
def test_rectangles_as_masks_train_as_boxes(tmp_path, mask_overlap, precompute):
    """Rows with boxes, with masks and with both, cached or not, have the losses of their boxes, which the weights matter for."""
    settings = {"mask_overlap": mask_overlap, "w_neg": -0.5, "precompute": precompute}
    settings |= {"precompute_dir": str(tmp_path / "cache")} if precompute else {}
    expected = losses(trained(tmp_path, rows((), (), (), ()), **settings))
    found = losses(trained(tmp_path, rows(*MIXED), **settings))
    plain = losses(trained(tmp_path, rows((), (), (), ()), **settings | {"w_neg": 1.0}))
    assert found == pytest.approx(expected, abs=1e-5)
    assert plain != pytest.approx(expected, abs=1e-3)


def test_what_is_cached_is_what_is_trained_on(tmp_path):
    """With `precompute`, masks come from the cache: the second run reads it, and a row with another mask is made anew."""
    settings = {"precompute": True, "precompute_dir": str(tmp_path / "cache")}
    first = losses(trained(tmp_path, rows(*MIXED), **settings))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("images*.arrow")}
    assert losses(trained(tmp_path, rows(*MIXED), **settings)) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("images*.arrow")} == written
    other = [masked(row, (0, 1)) for row in boxed_rows()]
    for row in other:
        row["instances"][1]["chosen_mask"] = Image.fromarray(np.ones(row["chosen"].size[::-1], bool))
    changed = Dataset.from_list(other, features=instance_pair_features(masks=True))
    assert losses(trained(tmp_path, changed, **settings)) != pytest.approx(first, abs=1e-4)
    assert losses(trained(tmp_path, changed)) == pytest.approx(
        losses(trained(tmp_path, changed, **settings)), rel=1e-3
    )


def test_a_margin_reaches_the_boxes_that_are_trained_on(tmp_path):
    """`box_margin` widens the boxes of each batch, also of precomputed ones, and not the masks."""
    for settings in ({}, {"precompute": True, "precompute_dir": str(tmp_path / "cache")}):
        batches = [
            next(iter(trained(tmp_path, rows(*MIXED), box_margin=margin, **settings).get_train_dataloader()))
            for margin in (0.0, 0.25)
        ]
        assert batches[0]["id"] == batches[1]["id"]
        sides = [batch["rejected_boxes"][..., 2:] - batch["rejected_boxes"][..., :2] for batch in batches]
        has_box = sides[0].amin(dim=-1) > 0
        assert has_box.any() and (sides[1][has_box] > sides[0][has_box]).all() and sides[1][~has_box].eq(0).all()
        names = [name for name in ("chosen_masks", "rejected_masks") if name in batches[0]]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in names)


@pytest.mark.parametrize("margin", [-0.1, float("nan"), float("inf")])
def test_a_margin_below_0_is_refused(margin):
    """A margin is at least 0 and finite; the message names the parameter."""
    with pytest.raises(ValueError, match="`box_margin` must be at least 0"):
        InstanceDPOConfig("out", box_margin=margin, use_cpu=True)


def test_a_margin_with_another_collator_is_refused():
    """The trainer's own collator widens boxes; it is said before a model is loaded."""
    args = InstanceDPOConfig("out", box_margin=0.1, use_cpu=True)
    with pytest.raises(ValueError, match="`box_margin` needs the trainer's own collator"):
        InstanceDPOTrainer("no/such-model", args=args, data_collator=list)


def test_masks_are_drawn_on_the_card(tmp_path):
    """The mask examples of a card show the outlines of masks, in the color of a conflict."""
    trained(tmp_path, rows((0, 1), (0, 1), (0, 1), (0, 1)), mask_examples=2)
    picture = np.asarray(Image.open(tmp_path / "out" / "images" / "masks.png").convert("RGB"))
    assert (picture == [213, 94, 0]).all(axis=-1).sum() > 100


def test_a_stream_of_masks_trains(tmp_path):
    """A stream with masks has the losses of the same rows in memory, in their order."""
    settings = {"train_sampling_strategy": "sequential", "max_steps": 2}
    expected = losses(trained(tmp_path, rows(*MIXED), **settings))
    stream = rows(*MIXED).to_iterable_dataset()
    assert losses(trained(tmp_path, stream, **settings)) == pytest.approx(expected, abs=1e-6)
