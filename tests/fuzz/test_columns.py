# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Columns of every type that Arrow has, for the three trainers, the check, the annotation and the join."""

import pyarrow as pa
import pytest
from datasets import Dataset, Features
from datasets.table import InMemoryTable
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.strategies import CONTROL, IMAGES, few, lawful, many, texts, writable_texts
from trl_diffusion import Criteria, join_annotations
from trl_diffusion.annotation.records import (
    PAIR_ANNOTATION_FEATURES,
    image_columns,
    pair_columns,
    prepare_rows,
    read_pair,
)
from trl_diffusion.data.check import as_text, check_dataset
from trl_diffusion.data.collators import AttributeCollator, InstancePairCollator
from trl_diffusion.data.columns import with_nested_columns
from trl_diffusion.data.formats import check_attribute_columns, prepare_dataset
from trl_diffusion.data.presets import training_columns


PAIR, SINGLE = ("prompt", "chosen", "rejected"), ("prompt", "image", "positive_attributes", "negative_attributes")
PAINTING = Criteria.load("painting")
ATTRIBUTE = PAINTING.attributes[0].id
BOX = [0.0, 0.0, 4.0, 4.0]
INSTANCE = {"label": "dog", "chosen_box": BOX, "rejected_box": BOX, "preference": "tie"}
STORED = {"bytes": IMAGES["png"], "path": None}


def arrays(value) -> list[pa.Array]:
    """Two rows of one value in every type that holds it, and of other types."""
    made = []
    for kind in (None, *KINDS):
        for values in ([value, value], [value, None], [None, None], [None, value]):
            try:
                made.append(pa.array(values, kind))
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                continue
    return made


box_kinds = (
    pa.list_(pa.float32()),
    pa.list_(pa.float64(), 4),
    pa.large_list(pa.float32()),
    pa.list_(pa.int64()),
    pa.list_(pa.uint64(), 4),
)
KINDS = [
    *(
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.binary(4),
    ),
    *(pa.int8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.null()),
    *(pa.date32(), pa.timestamp("ns"), pa.duration("s"), pa.decimal128(5), pa.time64("us")),
    *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.int64())),
    *(
        pa.list_(pa.string()),
        pa.large_list(pa.string()),
        pa.list_(pa.string(), 1),
        pa.list_(pa.null()),
        pa.list_(pa.int64()),
    ),
    *(pa.list_(pa.list_(pa.string())), pa.list_view(pa.string())),
    *(pa.list_(pa.string_view()), pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()}),
    pa.struct({"bytes": pa.int64(), "path": pa.string()}),
    pa.struct({"bytes": pa.binary()}),
    pa.struct({"path": pa.list_(pa.string())}),
    pa.struct({"bytes": pa.null(), "path": pa.string_view()}),
    *(
        pa.list_(pa.struct({"label": label, "chosen_box": box, "rejected_box": box, "preference": preference}))
        for label in (pa.string(), pa.list_(pa.string()))
        for box in (*box_kinds, pa.list_(pa.string()), pa.list_(pa.null()), pa.string())
        for preference in (
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.int64(),
            pa.dictionary(pa.int32(), pa.string()),
        )
    ),
    pa.large_list(pa.struct({"chosen_box": box_kinds[0], "rejected_box": box_kinds[0], "preference": pa.string()})),
    pa.list_(pa.struct({"chosen_box": box_kinds[0], "rejected_box": box_kinds[0], "preference": pa.string()}), 1),
    pa.list_(pa.struct({"chosen_box": box_kinds[0]})),
    pa.struct({"label": pa.list_(pa.string()), "chosen_box": pa.list_(box_kinds[0])}),
]
VALUES = [
    *("a dog", "/etc/passwd", "\x1b[2J", "", b"", b"\xff\xfe", 5, -1, 2**63, 1.5, float("nan"), True),
    *([], [ATTRIBUTE], ["\x1b"], [0], [None], [[ATTRIBUTE]], [ATTRIBUTE, ATTRIBUTE]),
    *(
        STORED,
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": None, "path": "/dev/zero"},
        {"bytes": b"", "path": ""},
        {"path": ["a"]},
    ),
    *(
        [INSTANCE],
        [INSTANCE | {"preference": "x\x1b"}],
        [INSTANCE | {"chosen_box": [0, 0, 2**62, 2**63]}],
        [INSTANCE | {"chosen_box": [1]}],
    ),
    *(
        [INSTANCE | {"chosen_box": None}],
        [INSTANCE | {"chosen_box": [None] * 4}],
        [INSTANCE | {"chosen_box": [float("nan")] * 4}],
    ),
    *(
        [INSTANCE | {"chosen_box": ["0", "0", "1", "1"]}],
        [INSTANCE | {"preference": 1}],
        [INSTANCE | {"preference": None}],
        [None],
    ),
]
ARRAYS = [array for value in VALUES for array in arrays(value)]
GOOD = {
    "id": pa.array(["r1", "r2"]),
    "prompt": pa.array(["a dog", "a cat"]),
    **{name: pa.array([STORED, STORED]) for name in ("chosen", "rejected", "image")},
    "positive_attributes": pa.array([[ATTRIBUTE], []]),
    "negative_attributes": pa.array([[], []], pa.list_(pa.string())),
    "instances": pa.array([[INSTANCE], []]),
}


def through_every_door(columns: dict[str, pa.Array]) -> None:
    try:
        dataset = Dataset(InMemoryTable.from_pydict(columns))
    except Exception:  # `datasets` itself does not take the type, or the name
        return
    pairs = lawful(lambda: prepare_dataset(dataset, "train_dataset", PAIR, PAIR[1:]), "`train_dataset`")
    if isinstance(pairs, Dataset):
        lawful(lambda: InstancePairCollator(8)(list(pairs)))
    images = lawful(lambda: prepare_dataset(dataset, "train_dataset", SINGLE, ("image",)), "`train_dataset`")
    if isinstance(images, Dataset):
        lawful(lambda: check_attribute_columns(images, "train_dataset", PAINTING, True))
        lawful(lambda: AttributeCollator(8, criteria=PAINTING)(list(images)))
    for wanted, criteria in ((PAIR, None), (SINGLE, PAINTING)):
        pictures = tuple({"chosen", "rejected", "image"} & set(wanted))
        report = lawful(lambda: check_dataset(dataset, wanted, pictures, 8, criteria, True))  # noqa: B023
        assert not any(CONTROL.search(line) for line in (as_text(report) if isinstance(report, dict) else ()))
    lawful(lambda: training_columns(dataset))
    for find in (pair_columns, image_columns):
        found = lawful(lambda: prepare_rows(dataset, find))  # noqa: B023
        if isinstance(found, tuple) and find is pair_columns:
            rows, names = found
            for number in range(len(rows)):
                lawful(lambda: read_pair(rows[number], names))  # noqa: B023


@st.composite
def tables(draw) -> dict[str, pa.Array]:
    """Good columns of which some are others, or are missing."""
    columns = dict(GOOD)
    for name in draw(
        st.lists(st.sampled_from([*GOOD, "label_0", "image_0", "image_1", "has_label"]), min_size=1, max_size=3)
    ):
        columns[name] = draw(st.sampled_from(ARRAYS))
    for name in draw(st.lists(st.sampled_from(list(GOOD)), max_size=1)):
        columns.pop(name)
    return columns


@few(12)
@given(tables())
def test_any_columns(columns):
    """Columns of any types are read, or the dataset and the column are named."""
    through_every_door(columns)


@pytest.mark.slow
@many(150)
@given(tables())
def test_many_columns(columns):
    """Columns of any types are read, or the dataset and the column are named."""
    through_every_door(columns)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_every_type_in_every_column(name):
    """Each of the arrays in each of the columns."""
    for array in ARRAYS:
        columns = GOOD | {name: array}
        try:
            dataset = Dataset(InMemoryTable.from_pydict(columns))
        except Exception:  # noqa: S112 `datasets` itself does not take the type
            continue
        lawful(lambda: list(prepare_dataset(dataset, "train_dataset", PAIR, PAIR[1:])), "`train_dataset`")  # noqa: B023
        lawful(lambda: list(prepare_dataset(dataset, "train_dataset", SINGLE, ("image",))), "`train_dataset`")  # noqa: B023
        lawful(lambda: check_attribute_columns(dataset, "train_dataset", PAINTING, True))  # noqa: B023


@pytest.mark.parametrize(
    "images",
    [[[], []], [{"bytes": [], "path": None}] * 2, [{"bytes": 5}] * 2, [{"path": [None]}] * 2, [[None], [None]]],
    ids=str,
)
def test_what_is_no_image_in_the_place_of_images(images):
    """Empty lists, numbers and lists of nothing, also as the bytes or the path of an image."""
    dataset = Dataset(InMemoryTable.from_pydict(GOOD | {"chosen": pa.array(images)}))
    message = lawful(lambda: prepare_dataset(dataset, "train_dataset", PAIR, PAIR[1:]), "`chosen`", "`train_dataset`")
    assert isinstance(message, str)


@pytest.mark.parametrize("column", ["positive_attributes", "negative_attributes"])
@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.null()], ids=str)
def test_attributes_that_are_all_null(column, kind):
    """They are no attributes, whatever their type is."""

    def check(kind):
        dataset = Dataset(InMemoryTable.from_pydict(GOOD | {column: pa.array([None, None], kind)}))
        return lawful(lambda: check_attribute_columns(dataset, "train_dataset", PAINTING, True))

    assert check(kind) == check(pa.list_(pa.string()))


names_of_columns = st.one_of(
    st.sampled_from([*GOOD, "a.b", "json.caption", "prompt.x", ".", "..", "chosen.bytes", "instances.label"]),
    texts,
    st.integers(),
    st.none(),
    st.lists(texts, max_size=2),
)


@few(30)
@given(
    st.dictionaries(
        st.one_of(st.sampled_from([*GOOD, "image_0", "image_1", "label_0", "has_label"]), texts),
        names_of_columns,
        max_size=4,
    )
)
@example({"prompt": 5})
@example({"prompt": ["prompt"]})
def test_any_mapping(mapping):
    """Whatever `--columns` names, from Python too."""
    dataset = Dataset(InMemoryTable.from_pydict(GOOD))
    lawful(lambda: training_columns(dataset, mapping))
    lawful(lambda: prepare_rows(dataset, pair_columns, mapping))
    lawful(lambda: prepare_rows(dataset, image_columns, mapping))
    lawful(lambda: with_nested_columns(dataset, [name for name in mapping.values() if isinstance(name, str)]))


@few(8)
@given(st.lists(writable_texts, min_size=1, max_size=6, unique=True))
@example(["\x1b[2J", "prompt\n"])
@example([f"column {number}" for number in range(200)])
def test_any_names_of_columns(names):
    """A dataset with any names of columns."""
    through_every_door({name: pa.array(["a", "b"]) for name in names})
    through_every_door({name: pa.array(["a", "b"]) for name in names} | GOOD)


def annotations(**changes: pa.Array) -> Dataset:
    rows = {
        "id": ["r1", "r2"],
        "prompt": ["a dog", "a cat"],
        "status": [0, 0],
        "reason": ["", ""],
        "tie": [False, False],
        "planner_answer": ["", ""],
        "instances": [
            [
                INSTANCE
                | {"preference": 1, "chosen_score": 1.0, "rejected_score": 1.0, "answer": "", "swapped_answer": ""}
            ],
            [],
        ],
        "dropped": [[], []],
    }
    features = Features({name: kind for name, kind in PAIR_ANNOTATION_FEATURES.items() if name in rows})
    table = Dataset.from_dict(rows, features=features).data.table
    for name, array in changes.items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, array)
    return Dataset(InMemoryTable(table.replace_schema_metadata(None)))


@few(10)
@given(st.sampled_from(["id", "status", "tie", "instances", "chosen_uid", "rejected_uid"]), st.sampled_from(ARRAYS))
def test_any_annotations(name, array):
    """Annotations with a column of any type are joined, or are refused."""
    found = lawful(lambda: annotations(**{name: array}))
    if isinstance(found, Dataset):
        source = Dataset(InMemoryTable.from_pydict(GOOD))
        lawful(lambda: list(join_annotations(source, found)), seconds=30)


@pytest.mark.parametrize("column", ["tie", "status"])
def test_lists_in_the_place_of_single_values_of_annotations(column):
    """They are refused by their column."""
    source, found = Dataset(InMemoryTable.from_pydict(GOOD)), annotations(**{column: pa.array([[], []])})
    assert isinstance(lawful(lambda: list(join_annotations(source, found)), column), str)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["id", "status", "tie", "instances", "chosen_uid", "rejected_uid"])
def test_annotations_with_every_type(name):
    """Each of the arrays in each of the columns of annotations."""
    source = Dataset(InMemoryTable.from_pydict(GOOD))
    for array in ARRAYS:
        try:
            found = annotations(**{name: array})
        except Exception:  # noqa: S112 `datasets` itself does not take the type
            continue
        lawful(lambda: list(join_annotations(source, found)), seconds=30)  # noqa: B023
