# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The ways that annotations go before they are joined with their images."""

import json

import datasets
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value, load_dataset, load_from_disk

from tests.datasets_builders import sources
from tests.datasets_builders.sources import rows
from trl_diffusion import (
    Criteria,
    attribute_features,
    instance_pair_features,
    join_annotations,
    load_annotations,
    save_annotations,
)
from trl_diffusion.annotation.records import PAIR_ANNOTATION_FEATURES
from trl_diffusion.data.sources import load_source


SOURCES = {"pairs": sources.pairs, "pick_a_pic": sources.pick_a_pic, "paintings": sources.paintings}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    sources.annotate_pairs(sources.pairs(), folder / "pairs")
    sources.annotate_pairs(sources.pick_a_pic(), folder / "pick_a_pic", tie_policy="keep")
    sources.annotate_paintings(sources.paintings(), folder / "paintings")
    return folder


def with_names(annotations: Dataset) -> Dataset:
    """The annotations with strings, computed independently."""
    found = []
    for row in annotations:
        row["status"] = ("ok", "rejected", "error")[row["status"]]
        for instance in row.get("instances", []):
            instance["preference"] = ("chosen", "rejected", "tie")[instance["preference"]]
        found.append(row)
    return Dataset.from_list(found)


def in_another_order(annotations: Dataset) -> Dataset:
    """Class labels with their names in another order, and so with other integers."""
    features = annotations.features.copy()
    features["status"] = ClassLabel(names=["error", "ok", "rejected"])
    if "instances" in features:
        instance = features["instances"].feature | {"preference": ClassLabel(names=["tie", "rejected", "chosen"])}
        features["instances"] = List(instance)
    return Dataset.from_list(list(with_names(annotations)), features=features)


def saved(suffix):
    def way(annotations, path):
        save_annotations(annotations, path.with_suffix(suffix))
        return load_annotations(path.with_suffix(suffix))

    return way


def saved_and_loaded(suffix, builder):
    def way(annotations, path):
        save_annotations(annotations, path.with_suffix(suffix))
        return load_dataset(builder, data_files=str(path.with_suffix(suffix)), split="train")

    return way


def to_disk(annotations, path):
    annotations.save_to_disk(path)
    assert list(load_annotations(path)) == list(load_from_disk(path))
    return load_from_disk(path)


def to_parquet(annotations, path):
    annotations.to_parquet(path.with_suffix(".parquet"))
    return load_source(str(path.with_suffix(".parquet")))["train"]


def names_to_json(annotations, path):
    with_names(annotations).to_json(path.with_suffix(".jsonl"))
    return load_source(str(path.with_suffix(".jsonl")))["train"]


def names_to_pandas(annotations, path):
    pd.DataFrame(with_names(annotations).to_list()).to_csv(path.with_suffix(".csv"), index=False)
    return load_annotations(path.with_suffix(".csv"))


def to_json_and_cast(annotations, path):
    annotations.to_json(path.with_suffix(".jsonl"))
    return Dataset.from_json(str(path.with_suffix(".jsonl"))).cast(annotations.features)


WAYS = {
    "save_annotations .jsonl": saved(".jsonl"),
    "save_annotations .csv": saved(".csv"),
    "save_annotations .parquet": saved(".parquet"),
    "save_annotations .jsonl, load_dataset": saved_and_loaded(".jsonl", "json"),
    "save_annotations .csv, load_dataset": saved_and_loaded(".csv", "csv"),
    "save_to_disk": to_disk,
    "to_parquet": to_parquet,
    "strings": lambda annotations, path: with_names(annotations),
    "strings to_json": names_to_json,
    "strings, pandas to_csv": names_to_pandas,
    "a cast to another order": lambda annotations, path: in_another_order(annotations),
    "to_json, cast back": to_json_and_cast,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", SOURCES)
def test_annotations_come_back(kind, way, runs, tmp_path):
    """After every way, the joined rows are those of the annotations as they were."""
    source, annotations = SOURCES[kind](), load_annotations(runs / kind)
    expected = rows(join_annotations(source, annotations))
    assert len(expected) > 10
    assert rows(join_annotations(source, WAYS[way](annotations, tmp_path / "annotations"))) == expected


@pytest.mark.parametrize("suffix", [None, ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("kind", SOURCES)
def test_joined_rows_without_images_come_back(kind, suffix, runs, tmp_path, caplog):
    """Rows for training whose images were left out are joined by their ids, and chosen is what the source says."""
    source = SOURCES[kind]()
    joined = join_annotations(source, load_annotations(runs / kind))
    bare = joined.remove_columns([name for name in ("chosen", "rejected", "image") if name in joined.column_names])
    if suffix:
        save_annotations(bare, tmp_path / f"rows{suffix}")
        bare = load_annotations(tmp_path / f"rows{suffix}")
    caplog.clear()
    assert rows(join_annotations(source, bare)) == rows(joined)
    if kind != "paintings":
        assert caplog.messages[0].startswith("The annotations have no uids: rows are matched by their ids alone")


def test_attributes_that_to_csv_wrote_come_back(runs, tmp_path):
    """`Dataset.to_csv` writes arrays of strings as numpy prints them, without commas."""
    source = sources.paintings()
    joined = join_annotations(source, load_annotations(runs / "paintings"))
    joined.remove_columns("image").to_csv(tmp_path / "rows.csv")
    assert "' '" in (tmp_path / "rows.csv").read_text()
    assert rows(join_annotations(source, load_annotations(tmp_path / "rows.csv"))) == rows(joined)


def test_class_labels_of_attributes_are_written_as_ids(runs, tmp_path):
    source, annotations = sources.paintings(), load_annotations(runs / "paintings")
    labels = attribute_features(Criteria.load(sources.CRITERIA))
    columns = {name: labels[name] for name in ("positive_attributes", "negative_attributes")}
    labelled = annotations.cast(Features({**annotations.features, **columns}))
    save_annotations(labelled, tmp_path / "a.jsonl")
    assert rows(join_annotations(source, load_annotations(tmp_path / "a.jsonl"))) == rows(
        join_annotations(source, annotations)
    )
    labelled.remove_columns("status").to_json(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="`positive_attributes` of the annotations holds integers without names"):
        join_annotations(source, load_annotations(tmp_path / "b.jsonl"))


def test_what_is_written(tmp_path):
    """Names in JSON lines, JSON in CSV."""
    box = [0.0, 0.0, 4.0, 4.0]
    instance = {"label": "é", "chosen_box": box, "rejected_box": box, "preference": 1}
    features = instance_pair_features()
    dataset = Dataset.from_list(
        [{"id": "01", "instances": [instance]}],
        features=Features({name: features[name] for name in ("id", "instances")}),
    )
    save_annotations(dataset, tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        "id": "01",
        "instances": [instance | {"preference": "rejected"}],
    }
    save_annotations(dataset, tmp_path / "a.csv")
    found = pd.read_csv(tmp_path / "a.csv", dtype=str)
    assert json.loads(found["instances"][0])[0]["preference"] == "rejected" and found["id"][0] == "01"
    with pytest.raises(ValueError, match="must end in .jsonl, .csv or .parquet"):
        save_annotations(dataset, tmp_path / "a.txt")


@pytest.mark.parametrize("drop_status", [False, True])
def test_integers_without_names_are_refused(drop_status, runs, tmp_path):
    """What `Dataset.to_json` makes of class labels has lost its meaning; the message says how to write them."""
    source, annotations = sources.pairs(), load_annotations(runs / "pairs")
    column = "instances.preference" if drop_status else "status"
    annotations = annotations.remove_columns("status") if drop_status else annotations
    annotations.to_json(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=f"`{column}` of the annotations .* no names.*save_annotations"):
        join_annotations(source, load_annotations(tmp_path / "a.jsonl"))


def test_integers_that_were_cast_to_strings_are_refused(runs):
    """A cast of class labels to strings gives '0', which is no name."""
    annotations = load_annotations(runs / "pairs")
    features = Features({**PAIR_ANNOTATION_FEATURES, "status": Value("string")})
    with pytest.raises(ValueError, match="`status` of the annotations is '0', which is none of ok, rejected, error"):
        join_annotations(sources.pairs(), annotations.cast(features))


def test_instances_that_to_csv_wrote_are_refused(runs, tmp_path):
    """The print of numpy arrays is no list."""
    load_annotations(runs / "pairs").to_csv(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="`instances` in row 0 of .*a.csv, counted from 0, is a text that is no JSON"):
        load_annotations(tmp_path / "a.csv")


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_ids_that_became_numbers(dtype, runs):
    """1000 and 1000.0 are the id '1000'."""
    source, annotations = sources.pick_a_pic(), load_annotations(runs / "pick_a_pic")
    features = Features({**annotations.features, "id": Value(dtype)})
    kind = {"int64": int, "float64": float}[dtype]
    numbers = annotations.map(lambda row: {"id": kind(row["id"])}, features=features)
    assert rows(join_annotations(source, numbers)) == rows(join_annotations(source, annotations))


def test_ids_that_lost_their_zeros_are_refused(tmp_path):
    """The id '001' of one side and 1 of the other never meet, and the message says why."""
    source = sources.pairs(3).map(lambda row, number: {"id": f"00{number + 1}"}, with_indices=True)
    sources.annotate_pairs(source, tmp_path / "run")
    annotations = load_annotations(tmp_path / "run")
    features = Features({**annotations.features, "id": Value("int64")})
    with pytest.raises(ValueError, match="The ids differ in leading zeros alone: one side was read as numbers"):
        join_annotations(source, annotations.map(lambda row: {"id": int(row["id"])}, features=features))
