# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import io

import pytest
from datasets import Dataset, Image, Value
from PIL import Image as PILImage

from tests import tiny
from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.annotation.records import (
    IMAGE_ANNOTATION_FEATURES,
    PAIR_ANNOTATION_FEATURES,
    Instance,
    image_columns,
    pair_columns,
    prepare_rows,
    read_attribute_image,
    read_pair,
)
from trl_diffusion.annotation.tables import encode_row


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    tiny.image(seed).save(buffer, format="PNG")
    return buffer.getvalue()


def pick(label: float = 1, **changes) -> dict:
    """A row in the format of Pick-a-Pic v2."""
    return {
        "ranking_id": 7,
        "caption": "a cat",
        "jpg_0": png(0),
        "jpg_1": png(1),
        "label_0": label,
        "label_1": 1 - label,
        "image_0_uid": "zero",
        "image_1_uid": "one",
        "has_label": True,
        "user_id": 3,
    } | changes


PICK = pair_columns(list(pick()))


def test_pick_a_pic_is_known():
    """The columns of Pick-a-Pic are recognised, the image with label 1 is chosen, and uids and ranking id are kept."""
    first, second = read_pair(pick(1), PICK), read_pair(pick(0), PICK)
    assert (first.id, first.prompt, first.tie) == ("7", "a cat", False)
    assert (first.chosen_uid, first.rejected_uid) == ("zero", "one") == (second.rejected_uid, second.chosen_uid)
    assert first.chosen.data == second.rejected.data == png(0)
    assert first.status == second.status == "ok"


def test_ties():
    """A tie is rejected with a reason, or kept with image 0 as chosen and marked."""
    dropped, kept = read_pair(pick(0.5), PICK), read_pair(pick(0.5), PICK, tie_policy="keep")
    assert dropped.status == "rejected" and dropped.reason.startswith("tie") and dropped.tie
    assert kept.status == "ok" and kept.tie and kept.chosen_uid == "zero"
    assert dropped.to_row()["tie"] and dropped.to_row()["chosen_uid"] == "zero"


@pytest.mark.parametrize("row", [pick(0.3), pick(has_label=False), pick(label_0=None)])
def test_a_pair_without_label_is_rejected(row):
    """A pair without a label is rejected."""
    record = read_pair(row, PICK)
    assert record.status == "rejected" and "no label" in record.reason


def test_an_image_that_is_missing_is_an_error():
    """A null image or a lost file makes the row an error that names the column."""
    assert read_pair(pick(jpg_1=None), PICK).reason.startswith("jpg_1: expected an image")
    lost = read_pair(pick(jpg_0="/no/such/file.jpg"), PICK)
    assert lost.status == "error" and lost.reason.startswith("jpg_0: ")
    assert lost.to_row()["instances"] == []


def test_uids_follow_from_the_bytes_where_there_are_none():
    """Without a column of uids, the uid of an image is a hash of its bytes."""
    columns = pair_columns(["prompt", "chosen", "rejected", "id"])
    row = {"id": 1, "prompt": "x", "chosen": png(0), "rejected": png(0)}
    record = read_pair(row, columns)
    assert record.chosen_uid == record.rejected_uid == StoredImage(png(0)).uid and len(record.chosen_uid) == 32


@pytest.mark.parametrize(
    "present, mapping, expected",
    [
        (["prompt", "chosen", "rejected"], None, {"id": "id", "prompt": "prompt", "chosen": "chosen"}),
        (["text", "win", "lose", "key"], {"prompt": "text", "chosen": "win", "rejected": "lose", "id": "key"}, {"id": "key"}),
        (
            ["caption", "a", "b", "label_0", "n"],
            {"image_0": "a", "image_1": "b", "prompt": "caption", "id": "n", "label_0": "label_0"},
            {"image_0": "a", "label_0": "label_0"},
        ),
        (["prompt", "chosen", "rejected", "uid"], {"chosen_uid": "uid"}, {"chosen_uid": "uid", "chosen": "chosen"}),
    ],
)  # fmt: skip
def test_mappings(present, mapping, expected):
    """Columns are found by the trainers' names, by those of Pick-a-Pic, or by the user's mapping."""
    columns = pair_columns(present, mapping)
    assert expected.items() <= columns.items()
    assert set(columns.values()) - {"id"} <= set(present)


@pytest.mark.parametrize(
    "present, mapping, message",
    [
        (["text", "a", "b"], None, "neither `prompt`, `chosen` and `rejected` nor those of Pick-a-Pic"),
        (["prompt", "chosen", "rejected"], {"winner": "chosen"}, "`--columns` names winner; it may name"),
        (["prompt", "chosen", "rejected"], {"prompt": "text"}, "The dataset lacks text; it has the columns prompt"),
        (["prompt", "chosen", "rejected"], {"chosen_uid": "uid"}, "The dataset lacks uid"),
    ],
)
def test_mistakes_in_mappings(present, mapping, message):
    """The error names a missing column or an unknown name."""
    with pytest.raises(ValueError, match=message):
        pair_columns(present, mapping)


def test_images_with_attributes():
    """A dataset of images is read in the same way."""
    columns = image_columns(["picture", "prompt", "n"], {"image": "picture", "id": "n"})
    record = read_attribute_image({"picture": png(3), "prompt": "a", "n": 4}, columns)
    assert (record.id, record.status, record.image.data) == ("4", "ok", png(3))
    with pytest.raises(ValueError, match="The dataset lacks image"):
        image_columns(["picture", "prompt"])


def test_rows_are_prepared():
    """Images are not decoded, other columns are dropped, and rows in memory get row numbers as ids."""
    dataset = Dataset.from_list([{"prompt": "a", "chosen": tiny.image(0), "rejected": tiny.image(1), "x": 1}] * 2)
    rows, columns = prepare_rows(dataset.cast_column("chosen", Image()), pair_columns)
    assert rows["id"] == ["0", "1"] and "x" not in rows.column_names and rows.features["id"] == Value("string")
    assert isinstance(rows[0]["chosen"]["bytes"], bytes)
    with pytest.raises(ValueError, match="The stream has no column `id`"):
        prepare_rows(dataset.to_iterable_dataset(), pair_columns)
    stream, _ = prepare_rows(dataset.add_column("id", [5, 6]).to_iterable_dataset(), pair_columns)
    assert [read_pair(row, columns).id for row in stream] == ["5", "6"]


def test_only_ok_rows_have_instances():
    """A row that fails at the judge has no instances."""
    record = read_pair(pick(), PICK)
    record.instances = [Instance("cat", [0, 0, 0.5, 1], [0.5, 0, 1, 1], 0.9, 0.8, "rejected", "a", "b")]
    row = record.to_row()
    assert row["instances"][0]["chosen_box"] == [0, 0, 20, 32] and row["instances"][0]["rejected_box"] == [
        20,
        0,
        40,
        32,
    ]
    assert set(row) == set(PAIR_ANNOTATION_FEATURES)
    record.fail("judge: no")
    assert record.to_row()["instances"] == [] and record.to_row()["status"] == "error"


def test_encoded_rows_are_those_of_the_features():
    """A written row equals its encoding by `datasets` with the declared features."""
    record = read_pair(pick(), PICK)
    record.instances = [
        Instance("cat", [0, 0, 0.5, 1], [0.5, 0, 1, 1], 0.9, 0.8, preference, "a", "b")
        for preference in ("chosen", "rejected", "tie")
    ]
    image = read_attribute_image({"image": png(3), "prompt": "a", "id": 4}, image_columns(["image", "prompt", "id"]))
    image.fail("no")
    for row, features in ((record.to_row(), PAIR_ANNOTATION_FEATURES), (image.to_row(), IMAGE_ANNOTATION_FEATURES)):
        assert encode_row(row) == features.encode_example(row)


def test_a_stored_image_travels_without_its_pixels():
    """Pickling contains only the encoded bytes."""
    import pickle

    image = StoredImage(png(0))
    assert isinstance(image.upright, PILImage.Image)
    assert len(pickle.dumps(image)) < len(image.data) + 200
    assert pickle.loads(pickle.dumps(image)).upright.tobytes() == image.upright.tobytes()
