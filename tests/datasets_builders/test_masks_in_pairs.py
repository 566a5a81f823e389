# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A dataset of pairs that a segmenter has annotated, and its card."""

from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from tests.annotation.test_segmenter import pixels_of
from tests.datasets_builders import sources
from tests.datasets_builders.sources import rows
from trl_diffusion import instance_pair_features, join_annotations, load_annotations
from trl_diffusion.annotation.tables import PAIR_MASK_FEATURES
from trl_diffusion.quickstart.oracle import OracleSegmenter


class Patchy(OracleSegmenter):
    """Has no mask for every fourth box."""

    def segment(self, queries):
        return [None if place % 4 == 0 else mask for place, mask in enumerate(super().segment(queries))]


def with_arrays(dataset) -> list[dict]:
    """Rows with the bytes of the images, and with masks as arrays."""
    found = rows(dataset)
    for row in found:
        for instance in row["instances"]:
            for name in ("chosen_mask", "rejected_mask"):
                mask = pixels_of(instance[name])
                instance[name] = mask if mask is None else mask.tolist()
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Pairs, annotated and built: `source`, `annotations`, `out`."""
    folder = tmp_path_factory.mktemp("world")
    source = sources.save(folder / "source", train=sources.pairs(12))
    sources.annotate_pairs(sources.pairs(12), folder / "annotations", name=str(source), segmenter=Patchy())
    sources.build_pairs(source, folder / "annotations", folder / "out")
    return folder


def test_masks_are_in_both_configurations(world):
    """The pairs hold PNG images of the masks, the annotations their run lengths and what has none, in memory and streamed."""
    annotations = load_annotations(world / "annotations")
    joined = with_arrays(join_annotations(sources.pairs(12), annotations))
    for streaming in (False, True):
        pairs = load_dataset(str(world / "out"), split="train", streaming=streaming)
        assert pairs.features == instance_pair_features(masks=True) and with_arrays(pairs) == joined
    masks = [
        instance[name] for row in joined for instance in row["instances"] for name in ("chosen_mask", "rejected_mask")
    ]
    assert len(masks) == 48 and sum(mask is None for mask in masks) == 12
    again = load_dataset(str(world / "out"), "annotations", split="train")
    assert again.features == PAIR_MASK_FEATURES and list(again) == list(annotations)


def test_the_card_speaks_of_masks(world):
    """It describes the columns, the segmenter and the flag that names it."""
    _, text = sources.card_of(world / "out")
    for name in ("instances.chosen_mask", "instances.rejected_mask.counts", "without_mask.reason"):
        assert f"| `{name}` |" in text
    assert "The *segmenter* finds" in text and "--segmenter oracle" in text and "COCO's run lengths" in text
    assert "None" not in text.replace("None is declared", "")


def test_the_masks_of_the_folder_are_those_of_the_shapes(world):
    """A mask of a loaded pair is the oracle's, pixel by pixel."""
    source = sources.pairs(12)
    loaded = load_dataset(str(world / "out"), split="train")
    for row, drawn in zip(loaded, source, strict=True):
        boxes = [[side / 32 for side in instance["rejected_box"]] for instance in row["instances"]]
        expected = OracleSegmenter().segment([(drawn["rejected"].convert("RGB"), box) for box in boxes])
        for instance, mask in zip(row["instances"], expected, strict=True):
            assert (np.asarray(instance["rejected_mask"]) == mask).all()
