# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""An image that nobody reads, and that cannot be read, stops nothing."""

import pytest
from datasets import Dataset, Features, Image, LargeList, List, Value, load_from_disk

from tests import tiny
from trl_diffusion.data.check import check_dataset
from trl_diffusion.data.columns import with_nested_columns, without_decoding
from trl_diffusion.data.formats import prepare_dataset
from trl_diffusion.data.sources import load_source


BROKEN = {"bytes": b"not an image at all", "path": None}
# Types of a column, and a broken value of each
COLUMNS = {
    "image": (Image(), BROKEN),
    "list": (List(Image()), [BROKEN]),
    "large list": (LargeList(Image()), [BROKEN]),
    "field": ({"name": Value("string"), "image": Image()}, {"name": "x", "image": BROKEN}),
    "list of fields": (List({"views": List(Image())}), [{"views": [BROKEN]}]),
}


def with_broken(kind: str, **columns: list) -> Dataset:
    """A dataset of some columns, with one more that is broken."""
    dataset = Dataset.from_dict(columns)
    feature, value = COLUMNS[kind]
    features = Features({**dataset.features, "broken": feature})
    return Dataset.from_dict({**columns, "broken": [value] * len(dataset)}, features=features)


@pytest.mark.parametrize("streams", [False, True], ids=["in memory", "stream"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_values_are_as_they_are_stored(kind, streams):
    """In columns, lists and fields; the other columns, and a dataset without images, are untouched."""
    dataset = with_broken(kind, number=[1, 2])
    dataset = dataset.to_iterable_dataset() if streams else dataset
    assert list(without_decoding(dataset)) == [{"number": number, "broken": COLUMNS[kind][1]} for number in (1, 2)]
    plain = dataset.remove_columns("broken")
    assert without_decoding(plain) is plain


def test_nothing_is_written_again(tmp_path):
    """The rows stay the mapped file's, and another feature is another fingerprint."""
    with_broken("list of fields", number=[1, 2]).save_to_disk(str(tmp_path / "data"))
    dataset = load_from_disk(str(tmp_path / "data"))
    undecoded = without_decoding(dataset)
    assert undecoded.cache_files == dataset.cache_files != []
    assert undecoded._fingerprint != dataset._fingerprint
    assert undecoded._fingerprint == without_decoding(dataset)._fingerprint
    with pytest.raises(Exception, match="cannot identify image file"):
        dataset[0]  # which is left as it was


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_transform_gets_what_it_was_written_for(kind):
    """Further columns of a dataset with a transform are decoded, for it may read them."""
    dataset = with_broken(kind, prompt=["a"], image=[tiny.image(0)])
    dataset = dataset.with_transform(
        lambda rows: {"prompt": rows["prompt"], "image": [tiny.image(0)] * len(rows["broken"])}
    )
    with pytest.raises(Exception, match="cannot identify image file"):
        prepare_dataset(dataset, "train_dataset", ("prompt", "image"), ("image",))[0]


def test_a_dataset_that_lacks_columns_is_still_checked():
    """What lacks is said, although the first row has an image that cannot be read."""
    report = check_dataset(with_broken("image", image=[tiny.image(0)]), ("prompt", "image"), ("image",), 32)
    assert "lacks the column `prompt`" in report["faults"][0]["message"]


def test_fields_of_a_stream():
    """Columns that names with dots mean are added, and the types of the others stay."""
    stream = with_broken("image", json=[{"caption": "a cat"}]).to_iterable_dataset()
    added = with_nested_columns(stream, ["json.caption"])
    assert added.features == {**stream.features, "json.caption": Value("string")}
    assert [row["json.caption"] for row in without_decoding(added)] == ["a cat"]


def test_a_file_of_rows_that_is_streamed(tmp_path):
    """The paths of images are found, and their rows get ids."""
    tiny.image(0).save(tmp_path / "cat.png")
    with_broken("list", file_name=["cat.png"], prompt=["a cat"]).to_parquet(str(tmp_path / "rows.parquet"))
    (row,) = without_decoding(load_source(str(tmp_path / "rows.parquet"), streaming=True)["train"])
    assert (row["id"], row["image"], row["broken"]) == ("cat", str(tmp_path / "cat.png"), [BROKEN])
