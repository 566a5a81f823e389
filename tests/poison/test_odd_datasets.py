# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Datasets as people have them: each of these once ended in an error that named nothing, or in a wrong number."""

import io
import json
import zipfile

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset

from tests import tiny
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.formats import prepare_dataset
from trl_diffusion.masks import instance_masks
from trl_diffusion.visualization import image_grid, mask_overlay


def prepare(dataset):
    return prepare_dataset(dataset, "train_dataset", ("prompt", "chosen", "rejected"), ("chosen", "rejected"))


def row(**changes) -> dict:
    return {"id": "row", "prompt": "a cat", "chosen": tiny.image(0), "rejected": tiny.image(1)} | changes


@pytest.mark.parametrize("instances", [[], None])
def test_a_dataset_in_which_no_row_has_instances_is_plain_pairs(instances):
    """Where every `instances` is empty or null, their type is unknown, and the batch has none."""
    batch = InstancePairCollator(8)(list(prepare(Dataset.from_list([row(instances=instances)] * 2))))
    assert batch["chosen_boxes"].shape == (2, 0, 4)


def test_instances_that_are_strings_are_refused():
    """A list of labels is no list of instances."""
    with pytest.raises(ValueError, match="`instances` of `train_dataset` must be a list of instances"):
        prepare(Dataset.from_list([row(instances=["cat"])]))


def test_a_null_among_the_instances_is_refused():
    """`instances: [null]` names the row."""
    with pytest.raises(ValueError, match="`instances` of the row with id 'row' must be a list of objects"):
        InstancePairCollator(8)([row(instances=[None])])


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_an_archive_are_read(tmp_path, streaming):
    """An ImageFolder in a zip file gives paths into the archive, which are opened."""
    buffer = io.BytesIO()
    tiny.image(0, 8, 8).save(buffer, "PNG")
    metadata = {"id": "x", "prompt": "x", "chosen_file_name": "a.png", "rejected_file_name": "a.png"}
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("a.png", buffer.getvalue())
        archive.writestr("metadata.jsonl", json.dumps(metadata))
    files = str(tmp_path / "train.zip")
    dataset = load_dataset(
        "imagefolder", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    pixels = InstancePairCollator(8)(list(prepare(dataset)))["chosen_pixel_values"]
    expected = torch.tensor(list(tiny.image(0, 8, 8).tobytes())).reshape(8, 8, 3).permute(2, 0, 1)
    assert torch.equal(pixels[0], expected.byte())


def test_a_null_id_is_refused():
    """Rows without an id would all share their noise."""
    with pytest.raises(ValueError, match="A row has no `id`"):
        InstancePairCollator(8)(list(prepare(Dataset.from_list([row(id=None), row()]))))


def test_an_empty_stream_has_no_rows():
    """A stream that ends at once is said to be empty, not to lack columns."""
    with pytest.raises(ValueError, match="`train_dataset` has no rows"):
        prepare(IterableDataset.from_generator(lambda: iter(())))


def test_a_numpy_format_changes_nothing():
    """A dataset formatted for numpy gives the same batch."""
    collate = InstancePairCollator(8)
    plain, formatted = (collate(list(prepare(d))) for d in (tiny.pairs(2), tiny.pairs(2).with_format("numpy")))
    assert torch.equal(plain["chosen_boxes"], formatted["chosen_boxes"])
    assert torch.equal(plain["chosen_pixel_values"], formatted["chosen_pixel_values"])


def test_masks_are_float32_under_autocast():
    """Autocast does not round the products that a covering mask is made of."""
    box, yes = torch.tensor([[[0.1, 0.1, 0.7, 0.63]]]), torch.ones(1, 1, dtype=torch.bool)
    expected = instance_masks(box, yes, yes, 9, 7, mask_overlap="covering")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(instance_masks(box, yes, yes, 9, 7, mask_overlap="covering"), expected)


def test_what_rounding_leaves_of_a_zero_mask_is_not_made_its_whole():
    """14 instances, 13 in conflict everywhere with w_neg -1/13: the weights cancel out, and the mask is zero."""
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 14, 4)
    judged = torch.ones(1, 14, dtype=torch.bool)
    conflicts = torch.arange(14)[None] < 13
    assert instance_masks(boxes, judged, conflicts, 8, 8, w_neg=-1 / 13).abs().max() == 0


@pytest.mark.parametrize("size", [110, 180, 200])
def test_an_overlay_is_at_least_256_pixels_high(size):
    """Small images are enlarged by a whole factor."""
    picture = mask_overlay(torch.zeros(3, size, size), torch.ones(8, 8), torch.zeros(0, 4), [], [])
    assert 256 <= picture.height < 256 + size


def test_labels_of_several_lines_are_put_on_one():
    """A prompt with line breaks does not stop a picture."""
    assert image_grid([[tiny.image(0)]], ["a\nb"], ["a\nb " * 40], 64).size == (80, 128)
