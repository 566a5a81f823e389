# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a trainer says of whole columns when it is made: the dataset, the column, the row and the way out."""

import logging
import math

import pyarrow as pa
import pytest
from datasets import Dataset, Features, IterableDataset, List, Value

from tests import tiny
from trl_diffusion import instance_pair_features
from trl_diffusion.criteria import parse_criteria
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.column_checks import bad_instances, repeated
from trl_diffusion.data.formats import check_attribute_columns, check_box, check_preference, prepare_dataset


PAIR = ("prompt", "chosen", "rejected")
IMAGE = ("prompt", "image", "positive_attributes", "negative_attributes")
FILE = {"bytes": b"x", "path": None}
CRITERIA = parse_criteria(tiny.CRITERIA, "tiny.yaml")  # hue, kind, pet


def instance(**changes) -> dict:
    boxes = {"chosen_box": [2.0, 4.0, 16.0, 20.0], "rejected_box": [4.0, 2.0, 20.0, 16.0]}
    return {"label": "cat", "preference": "rejected"} | boxes | changes


def pairs(columns: dict[int, dict], rows: int = 100, **all_rows) -> Dataset:
    """Pairs, some of them changed by their row number."""
    plain = {"prompt": "a cat", "chosen": FILE, "rejected": FILE, "instances": [instance()]} | all_rows
    return Dataset.from_list([{"id": f"r{row}", **plain, **columns.get(row, {})} for row in range(rows)])


def prepare(dataset, columns=PAIR):
    return prepare_dataset(dataset, "train_dataset", columns, tuple(set(columns) & {"chosen", "rejected", "image"}))


VALUES = {
    "prompt": ({"prompt": None}, "`prompt` of the row with id 'r77' must be a string, got None"),
    "id": ({"id": None}, "A row has no `id`"),
    "image": ({"chosen": None}, "column `chosen` of the row with id 'r77' cannot be read: expected an image"),
    "empty image": ({"rejected": {"bytes": b"", "path": None}}, "column `rejected` of the row with id 'r77'"),
    "missing file": ({"chosen": {"bytes": None, "path": "no/such.png"}}, "'r77' cannot be read: .*no/such.png"),
    "box of 3": (
        {"instances": [instance(), instance(chosen_box=[1.0, 2.0, 3.0])]},
        r"`instances\[1\].chosen_box`.*'r77'",
    ),
    "null box": (
        {"instances": [instance(rejected_box=None)]},
        r"`instances\[0\].rejected_box` of the row .* not a box",
    ),
    "null in a box": ({"instances": [instance(chosen_box=[1.0, None, 3.0, 4.0])]}, "not a finite number"),
    "NaN in a box": ({"instances": [instance(chosen_box=[1.0, math.nan, 3.0, 4.0])]}, "not a finite number"),
    "inverted box": ({"instances": [instance(chosen_box=[5.0, 2.0, 3.0, 4.0])]}, "inverted or empty"),
    "box before 0": ({"instances": [instance(chosen_box=[-9.0, 2.0, 3.0, 4.0])]}, "reaches outside"),
    "null instance": ({"instances": [None]}, "`instances` of the row with id 'r77' must be a list of objects"),
    "null preference": ({"instances": [instance(preference=None)]}, "None is none of `chosen`"),
    "other preference": ({"instances": [instance(preference="better")]}, "'better' is none of `chosen`"),
}


@pytest.mark.parametrize("order", ["as it is", "shuffled", "selected", "in chunks"])
@pytest.mark.parametrize("name", VALUES)
def test_a_value_names_its_row(name, order):
    """One bad value in row 77 of 100 is found before training, wherever the row is in a selection, and nowhere else."""
    changes, message = VALUES[name]
    dataset, good = pairs({77: changes}), list(range(77))
    place = 77
    if order == "shuffled":
        dataset = dataset.shuffle(seed=0)
        place = list(dataset._indices.column(0).to_pylist()).index(77)
    elif order == "selected":
        dataset, place = dataset.select([80, 77, 3]), 1
    elif order == "in chunks":
        dataset = Dataset(pa.concat_tables([dataset.data.table.slice(0, 70), dataset.data.table.slice(70)]))
    with pytest.raises(ValueError, match=message) as error:
        prepare(dataset)
    assert f"It is row {place} of `train_dataset`." in str(error.value)
    prepare(pairs({77: changes}).select(good))  # the bad row is not selected


def test_a_row_without_an_id_is_named_by_its_number():
    """Without the column, ids are the row numbers, in the message too."""
    with pytest.raises(ValueError, match="`prompt` of the row with id '77' must be a string.* It is row 77 of"):
        prepare(pairs({77: {"prompt": None}}).remove_columns("id"))


def test_several_rows_are_counted():
    """The message has the first bad row, their number and the first 20."""
    with pytest.raises(
        ValueError, match="with id 'r5'.* first of 30 such rows of `train_dataset`: 5, 6, .*, 24 and 10 more"
    ):
        prepare(pairs({row: {"prompt": None} for row in range(5, 35)}))


TYPES = {
    "prompt of integers": ({"prompt": 3}, "`prompt` of `train_dataset` must contain strings, got Value('int64')"),
    "prompt of lists": ({"prompt": ["a"]}, "`prompt` of `train_dataset` must contain strings, got List"),
    "images of integers": ({"chosen": 3}, "`chosen` of `train_dataset` must contain images, got Value('int64')"),
    "images of lists": ({"chosen": ["a.png"]}, "`chosen` of `train_dataset` must contain images, got List"),
    "captions for images": ({"chosen": "a cat"}, "`chosen` of the row with id 'r0' cannot be read: .*'a cat'"),
    "integer preference": ({"instances": [instance(preference=1)]}, "`instances.preference` .* Numbers without names"),
    "float preference": ({"instances": [instance(preference=1.0)]}, "`instances.preference` of `train_dataset` must"),
    "boxes of strings": ({"instances": [instance(chosen_box="1 2 3 4")]}, "`instances.chosen_box` of `train_dataset`"),
    "boxes of lists of strings": ({"instances": [instance(chosen_box=["1"] * 4)]}, "`instances.chosen_box` of"),
    "instances without boxes": ({"instances": [{"preference": "tie"}]}, "`instances.chosen_box` of .*got None"),
    "null prompts": ({"prompt": None}, "`prompt` of the row with id 'r0' must be a string.* first of 100 such rows"),
    "null images": ({"chosen": None}, "column `chosen` of the row with id 'r0'.* first of 100 such rows"),
}


@pytest.mark.parametrize("name", TYPES)
def test_types(name):
    """A column of another type is refused as a whole."""
    changes, message = TYPES[name]
    message = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=message):
        prepare(pairs({}, **changes))


@pytest.mark.parametrize("name", [name for name, (_, text) in TYPES.items() if "must contain" in text])
def test_types_of_a_stream(name):
    """A stream that knows its types is judged by them without being read."""
    changes, message = TYPES[name]
    with pytest.raises(ValueError, match=message.split("(")[0]):
        prepare(pairs({}, **changes).to_iterable_dataset())


def test_ids(caplog):
    """Floats are refused with the way out, repetitions counted and named; integers and strings are taken."""
    caplog.set_level(logging.WARNING, "trl_diffusion")
    floats = pairs({}).remove_columns("id").add_column("id", [float(row) for row in range(100)])
    with pytest.raises(
        ValueError, match=r"`id` of `train_dataset` must contain strings or integers, got Value\('float64'\)"
    ) as error:
        prepare(floats)
    assert 'cast_column("id", Value("string"))' in str(error.value)
    twice = pairs({77: {"id": "r5"}, 80: {"id": "r9"}, 81: {"id": "r9"}})
    prepare(twice.remove_columns("id"))
    prepare(twice.select(range(77)))
    assert caplog.text == ""
    prepare(twice)
    assert "3 rows have the id of an earlier row, first 'r5' in the rows 5, 77" in caplog.text
    assert 'remove_columns("id")' in caplog.text
    prepare(pairs({}).select([3, 3, 4]))
    assert "1 row has the id of an earlier row, first 'r3' in the rows 0, 1" in caplog.text


def test_labels_with_names_are_taken():
    """Integers that are the indices of the three names are preferences; -1, a missing label, is none."""
    features = Features({**pairs({}).features, "instances": instance_pair_features()["instances"]})
    assert len(prepare(pairs({}).cast(features))) == 100
    bare = Features({**features, "instances": List({**features["instances"].feature, "preference": Value("int64")})})
    with pytest.raises(ValueError, match="Numbers without names could mean anything.*ClassLabel"):
        prepare(pairs({}).cast(features).cast(bare))
    missing = pa.array([[instance(preference=0)], [], None, [instance(preference=-1)], [instance(preference=2)]])
    assert bad_instances(missing).tolist() == [False, False, False, True, False]
    assert bad_instances(missing[2:]).tolist() == [False, True, False]


def test_a_number_in_a_stream_without_types():
    """It has no name, and is refused when its row is read."""
    row = {"id": "x", "prompt": "a cat", "chosen": tiny.image(0), "rejected": tiny.image(1)}
    stream = prepare(IterableDataset.from_generator(lambda: iter([row | {"instances": [instance(preference=1)]}])))
    with pytest.raises(
        ValueError, match=r"`instances\[0\].preference` of the row with id 'x' is a number without a name"
    ):
        InstancePairCollator(8)(list(stream))
    stream = prepare(IterableDataset.from_generator(lambda: iter([row | {"instances": [instance()]}])))
    assert InstancePairCollator(8)(list(stream))["conflicts"].tolist() == [[True]]


@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_preference(value):
    """`True` is not the preference of index 1."""
    with pytest.raises(ValueError, match="is none of"):
        check_preference(value)


def test_the_fast_check_agrees_with_the_slow_one():
    """Of boxes of every kind, Arrow refuses those that `check_box` refuses for an image without end."""
    boxes = [
        [a, b, c, d]
        for a in (-2.0, -1.0, 3.0)
        for b in (0.0, math.nan)
        for c in (3.0, math.inf, 9.0)
        for d in (0.0, 5.0)
    ]
    for box in [*boxes, [], [1.0], None, [1.0, 2.0, None, 4.0]]:
        try:
            check_box(box, math.inf, math.inf)
            bad = False
        except ValueError:
            bad = True
        assert bad_instances(pa.array([[instance()], [instance(rejected_box=box)]])).tolist() == [False, bad], box


def test_a_transform_of_the_user_is_left_alone():
    """Its rows are checked when they are read: the columns below it may be anything."""
    dataset = pairs({}, chosen=3).with_transform(lambda batch: batch)
    assert prepare(dataset)[0]["chosen"] == 3


def test_other_columns_are_ignored():
    """Of attributes that are no lists, and of instances that are none, only their trainers speak."""
    prepare(pairs({}, positive_attributes="hue"))
    images = Dataset.from_list([{"prompt": "a", "image": FILE, "positive_attributes": [], "instances": "none"}])
    prepare(images.add_column("negative_attributes", [["hue"]]), IMAGE)


def test_all_faults_at_once():
    """With a list, nothing is raised, and each column has its fault."""
    faults = []
    dataset = pairs({3: {"chosen": None}, 4: {"id": None}}, prompt=3)
    prepare_dataset(dataset, "d", PAIR, PAIR[1:], faults)
    assert [column for column, _ in faults] == ["prompt", "id", "chosen"]


def test_attributes_of_many_chunks_and_selections():
    """The first bad row of a selection is named by its own place, and rows without attributes are counted in it."""
    rows = [
        {"id": f"r{i}", "prompt": "a", "image": FILE, "positive_attributes": ["hue"], "negative_attributes": ["pet"]}
        for i in range(20)
    ]
    rows[7]["negative_attributes"] = ["hue"]
    rows[9] |= {"positive_attributes": [], "negative_attributes": None}
    dataset = Dataset.from_list(rows)
    dataset = Dataset(pa.concat_tables([dataset.data.table.slice(0, 8), dataset.data.table.slice(8)]))
    with pytest.raises(ValueError, match="id 'r7' has `hue` as positive and as negative at once.*It is row 2 of `d`"):
        check_attribute_columns(dataset.select([9, 8, 7]), "d", CRITERIA, allow_none=True)
    with pytest.raises(ValueError, match="^1 of the 2 rows of `d` .* the rows with id r9"):
        check_attribute_columns(dataset.select([9, 8]), "d", CRITERIA, allow_none=False)
    check_attribute_columns(dataset.select([9, 8]), "d", CRITERIA, allow_none=True)
    check_attribute_columns(dataset.select([3, 8]), "d", CRITERIA, allow_none=False)


def test_repetitions_are_counted():
    """Of [3, 1, 3, 2, 1, 3], three repeat an earlier one, and the first such value is in the rows 0, 2 and 5."""
    number, rows = repeated(Dataset.from_dict({"id": [3, 1, 3, 2, 1, 3]}), "id")
    assert number == 3 and rows.tolist() == [0, 2, 5]
