# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import logging
import random
from collections import Counter

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher

from tests.datasets_builders import sources
from tests.datasets_builders.sources import rows
from trl_diffusion import Criteria, attribute_features, instance_pair_features
from trl_diffusion.annotation.join import ROWS_AT_ONCE, Join, join_annotations, load_annotations
from trl_diffusion.annotation.records import PAIR_ANNOTATION_FEATURES, STATUSES, pair_columns, prepare_rows
from trl_diffusion.annotation.run import MANIFEST


INSTANCE = ("label", "chosen_box", "rejected_box", "preference")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs over pairs in the trainers' columns, in those of Pick-a-Pic (ties kept), and over paintings."""
    folder = tmp_path_factory.mktemp("runs")
    sources.annotate_pairs(sources.pairs(), folder / "pairs")
    sources.annotate_pairs(sources.pick_a_pic(), folder / "pick_a_pic", tie_policy="keep", vlm=sources.StumblingVLM())
    sources.annotate_paintings(sources.paintings(), folder / "paintings")
    return folder


def streamed(dataset: Dataset) -> IterableDataset:
    return dataset.to_iterable_dataset(num_shards=3)


def expected(source: Dataset, annotations: Dataset) -> list[dict]:
    """The expected result for a source with the trainers' columns, computed independently."""
    found = {row["id"]: row for row in annotations}
    return [
        row
        | {name: {"bytes": row[name]["bytes"], "path": None} for name in ("chosen", "rejected")}
        | {"instances": [{name: instance[name] for name in INSTANCE} for instance in found[row["id"]]["instances"]]}
        for row in sources.undecoded(source)
        if row["id"] in found and STATUSES[found[row["id"]]["status"]] == "ok"
    ]


# ----- what comes out -----


@pytest.mark.parametrize("kind", [Dataset.with_format, streamed])
def test_rows_are_the_sources_with_the_annotations_instances(kind, runs):
    """Joined rows have exactly the trainers' columns and types, with the source's ids, prompts and bytes and the
    annotated instances."""
    source, annotations = sources.pairs(), load_annotations(runs / "pairs")
    joined = join_annotations(kind(source), annotations)
    assert isinstance(joined, type(kind(source)))
    assert joined.features == instance_pair_features() and list(joined.features) == list(instance_pair_features())
    assert rows(joined) == expected(source, annotations)
    assert len(rows(joined)) == 24 and sum(len(row["instances"]) for row in rows(joined)) == 48
    assert next(iter(joined))["chosen"].size == (32, 32)


@pytest.mark.parametrize("kind", [Dataset.with_format, streamed])
@pytest.mark.parametrize("with_uids", [True, False])
def test_pick_a_pic(kind, with_uids, tmp_path, runs):
    """The chosen image is `jpg_0` if label_0 is 1 and `jpg_1` if it is 0, with and without uids in the source."""
    source, folder = sources.pick_a_pic(with_uids=with_uids), runs / "pick_a_pic"
    if not with_uids:
        folder = tmp_path
        sources.annotate_pairs(source, folder, vlm=sources.StumblingVLM())
    annotations = load_annotations(folder)
    joined = {row["id"]: row for row in rows(join_annotations(kind(source), annotations))}
    assert list(joined) == [row["id"] for row in annotations if row["status"] == 0 and not row["tie"]]
    by_id = {str(row["ranking_id"]): row for row in source}
    labels = Counter()
    for row_id, row in joined.items():
        labels[by_id[row_id]["label_0"]] += 1
        chosen = 1 - int(by_id[row_id]["label_0"])
        assert row["chosen"] == {"bytes": by_id[row_id][f"jpg_{chosen}"], "path": None}
        assert row["rejected"] == {"bytes": by_id[row_id][f"jpg_{1 - chosen}"], "path": None}
        assert row["prompt"] == by_id[row_id]["caption"]
    assert labels == {1.0: 6, 0.0: 5}


def test_every_row_is_accounted_for(runs):
    """Joined rows and left out rows add up to all rows, and annotated ties are counted separately."""
    annotations, counts, ties = load_annotations(runs / "pick_a_pic"), Counter(), Counter()
    assert len(list(join_annotations(streamed(sources.pick_a_pic()), annotations, counts=counts))) == 11
    assert counts == {"joined": 11, "rejected": 4, "error": 6, "tie": 3}
    assert len(list(join_annotations(streamed(sources.pick_a_pic()), annotations, ties=True, counts=ties))) == 3
    assert ties == {"joined": 3, "rejected": 4, "error": 6, "no tie": 11}


@pytest.mark.parametrize("kind", [Dataset.with_format, streamed])
def test_ties_come_alone(kind, runs):
    """`ties=True` returns exactly the ties of the source, with the first image as chosen."""
    source = sources.pick_a_pic()
    joined = rows(join_annotations(kind(source), load_annotations(runs / "pick_a_pic"), ties=True))
    by_id = {str(row["ranking_id"]): row for row in source}
    assert [row["id"] for row in joined] == ["1002", "1008", "1020"]
    assert all(by_id[row["id"]]["label_0"] == 0.5 for row in joined)
    assert all(row["chosen"]["bytes"] == by_id[row["id"]]["jpg_0"] for row in joined)


@pytest.mark.parametrize("kind", [Dataset.with_format, streamed])
def test_images_with_attributes(kind, runs):
    """Attributes have the type of the annotations, strings or class labels; a broken image is left out."""
    source, annotations = sources.paintings(), load_annotations(runs / "paintings")
    joined = join_annotations(kind(source), annotations)
    assert joined.features == attribute_features()
    stored = {row["id"]: row for row in sources.undecoded(source)}
    found = {row["id"]: row for row in annotations}
    assert [row["id"] for row in rows(joined)] == [row_id for index, row_id in enumerate(source["id"]) if index != 3]
    for row in rows(joined):
        assert row["image"]["bytes"] == stored[row["id"]]["image"]["bytes"]
        assert row["positive_attributes"] == found[row["id"]]["positive_attributes"]
        assert len(row["positive_attributes"] + row["negative_attributes"]) == 4
    labels = attribute_features(Criteria.load(sources.CRITERIA))
    names = ("positive_attributes", "negative_attributes")
    typed = annotations.cast(datasets.Features({**annotations.features, **{name: labels[name] for name in names}}))
    labelled = join_annotations(kind(source), typed)
    assert labelled.features == labels
    names = labels["positive_attributes"].feature.int2str
    assert [names(row["positive_attributes"]) for row in rows(labelled)] == [
        row["positive_attributes"] for row in rows(joined)
    ]


def test_a_source_in_another_order(runs):
    """The order is that of the source, and rows do not depend on it."""
    source, annotations = sources.pairs(), load_annotations(runs / "pairs")
    order = random.Random(0).sample(range(24), 24)
    joined = rows(join_annotations(source.select(order), annotations))
    assert joined == [rows(join_annotations(source, annotations))[index] for index in order]


def test_what_is_chosen_follows_from_the_uids(runs):
    """Swapping chosen and rejected in the source does not change the joined rows."""
    source, annotations = sources.pairs(), load_annotations(runs / "pairs")
    swapped = source.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    assert rows(join_annotations(swapped, annotations)) == rows(join_annotations(source, annotations))


def test_columns_are_those_that_are_named(runs):
    """`columns` names the columns of the source, and other columns are dropped."""
    source, annotations = sources.pairs(), load_annotations(runs / "pairs")
    renamed = source.rename_columns({"id": "key", "prompt": "text", "chosen": "winner", "rejected": "loser"})
    renamed = renamed.add_column("licence", ["none"] * 24)
    columns = {"id": "key", "prompt": "text", "chosen": "winner", "rejected": "loser"}
    assert rows(join_annotations(renamed, annotations, columns)) == rows(join_annotations(source, annotations))
    with pytest.raises(ValueError, match="the columns key, text, winner, loser"):
        join_annotations(renamed, annotations)


def test_a_dataset_without_ids(tmp_path):
    """Rows without ids get the same row numbers for annotating and joining; a stream without ids is refused."""
    source = sources.pairs(6).remove_columns("id")
    sources.annotate_pairs(source, tmp_path / "run")
    annotations = load_annotations(tmp_path / "run")
    joined = rows(join_annotations(source, annotations))
    assert [row["id"] for row in joined] == ["0", "1", "2", "3", "4", "5"]
    assert [row["prompt"] for row in joined] == source["prompt"]
    with pytest.raises(ValueError, match="no column `id`"):
        join_annotations(streamed(source), annotations)


# ----- what does not fit -----


@pytest.mark.parametrize("kind", [Dataset.with_format, streamed])
@pytest.mark.parametrize("with_uids", [True, False])
def test_other_images_are_refused(kind, with_uids, runs):
    """A row whose image has another uid or other bytes than the annotated one raises an error that names the row."""
    if with_uids:
        source, annotations, row_id = sources.pick_a_pic(), load_annotations(runs / "pick_a_pic"), "1009"
        change = {"image_1_uid": "another"}
    else:
        source, annotations, row_id = sources.pairs(), load_annotations(runs / "pairs"), "world-0-00009"
        change = {"chosen": sources.undecoded(sources.pairs(1, seed=1))[0]["chosen"]}
    changed = sources.undecoded(source).map(lambda row, index: change if index == 9 else {}, with_indices=True)
    with pytest.raises(ValueError, match=f"id '{row_id}' has other images than were annotated"):
        rows(join_annotations(kind(changed), annotations))


def test_an_image_that_is_gone_is_refused(runs, tmp_path):
    """An image that can no longer be read raises an error that names the row."""
    source = sources.undecoded(sources.pairs())
    path = str(tmp_path / "gone.png")
    changed = source.map(lambda row: {"chosen": {"path": path, "bytes": None}} if row["id"].endswith("7") else {})
    with pytest.raises(ValueError, match=r"id 'world-0-00007' cannot be read: chosen: .*gone.png"):
        join_annotations(changed, load_annotations(runs / "pairs"))


def test_rows_without_an_annotation_are_counted(runs, caplog):
    """For a dataset, their number is logged; for a stream, the first and the tenth; `counts` has all of them."""
    annotations = load_annotations(runs / "pairs")
    source, counts = concatenate_datasets([sources.pairs(12, seed=1), sources.pairs()]), Counter()
    with caplog.at_level(logging.WARNING):
        joined = join_annotations(source, annotations, counts=counts)
    assert caplog.messages == [
        "12 of 36 rows of the source have no annotation and are left out: those with the ids world-1-00000, world-1-00001, "
        "world-1-00002, world-1-00003, world-1-00004 and 7 more."
    ]
    assert len(joined) == 24 and counts == {"joined": 24, "missing": 12}
    caplog.clear()
    counts.clear()
    with caplog.at_level(logging.WARNING):
        assert rows(join_annotations(streamed(source), annotations, counts=counts)) == rows(joined)
    assert counts == {"joined": 24, "missing": 12}
    assert [message.split(" has no annotation")[0] for message in caplog.messages] == [
        "The row with id 'world-1-00000'",
        "The row with id 'world-1-00009'",
    ]


def test_annotations_that_are_left_out_are_logged(runs, caplog):
    """The numbers of used and unused annotations are logged before the source is read."""
    annotations = load_annotations(runs / "pick_a_pic")
    with caplog.at_level(logging.WARNING):
        join_annotations(streamed(sources.pick_a_pic()), annotations)
    assert caplog.messages == ["11 of 24 annotations become training rows. Left out: rejected 4, error 6, ties 3."]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        join_annotations(sources.pick_a_pic().select(range(12)), annotations)
    absent = [row["id"] for row in annotations if row["status"] == 0 and not row["tie"] and int(row["id"]) >= 1012]
    assert len(absent) == 6
    assert caplog.messages[1] == (
        f"6 of 11 usable annotations have no row in the source: those with the ids {', '.join(absent[:5])} and 1 more."
    )


def test_ids_that_never_meet(runs):
    """A source without any annotated row is refused, with an example id of both sides."""
    with pytest.raises(ValueError, match="None of the 3 rows.*'world-1-00000'.*'world-0-00000'"):
        join_annotations(sources.pairs(3, seed=1), load_annotations(runs / "pairs"))


@pytest.mark.parametrize("kind", [Dataset.with_format, streamed])
def test_an_id_that_the_source_has_twice(kind, tmp_path):
    """A run rejects the second row with an id, and joining leaves it out, although the id has an annotation."""
    other = sources.pairs(1, seed=1).map(lambda row: {"id": "world-0-00002"})
    source = concatenate_datasets([sources.pairs(4), other])
    sources.annotate_pairs(source, tmp_path / "run")
    annotations, counts = load_annotations(tmp_path / "run"), Counter()
    joined = rows(join_annotations(kind(source), annotations, counts=counts))
    assert joined == expected(sources.pairs(4), annotations.select(range(4)))
    assert counts == {"joined": 4, "rejected": 1}


def test_annotations_of_two_runs(runs):
    """Rows that are annotated twice are refused."""
    annotations = load_annotations(runs / "pairs")
    with pytest.raises(ValueError, match="'world-0-00000' is annotated twice"):
        join_annotations(sources.pairs(), concatenate_datasets([annotations, annotations]))


def test_other_things_are_refused(runs):
    """Anything but annotations or a dataset raises a ValueError that says what to pass."""
    source, annotations = sources.pairs(), load_annotations(runs / "pairs")
    with pytest.raises(
        ValueError, match="`annotations` has the columns id, prompt.*, which are not those of annotations"
    ):
        join_annotations(source, source)
    with pytest.raises(ValueError, match="`annotations` must be a `datasets.Dataset`, got `IterableDataset`"):
        join_annotations(source, annotations.to_iterable_dataset())
    with pytest.raises(ValueError, match="`source` must be.*got `DatasetDict`"):
        join_annotations(DatasetDict(train=source), annotations)
    with pytest.raises(ValueError, match="`ties=True` is for annotations of pairs"):
        join_annotations(sources.paintings(), load_annotations(runs / "paintings"), ties=True)


# ----- how it is read -----


def test_a_stream_is_read_as_it_is_asked_for(runs):
    """Nothing is read before the first row is requested, and then at most one batch ahead."""
    read = Counter()

    def generate():
        for row in sources.undecoded(sources.pairs()):
            read["rows"] += 1
            yield row

    source = IterableDataset.from_generator(generate, features=sources.undecoded(sources.pairs()).features)
    joined = join_annotations(source, load_annotations(runs / "pairs"))
    assert not read
    for number, _ in enumerate(joined, 1):
        assert read["rows"] <= number + ROWS_AT_ONCE
    assert number == 24


def test_a_stream_goes_on_where_it_stood(runs):
    """The state of a stream, taken after any row, continues with the remaining rows."""
    source, annotations = sources.pick_a_pic(), load_annotations(runs / "pick_a_pic")
    whole = rows(join_annotations(streamed(source), annotations))
    for number in (1, 4, 7):
        stream = join_annotations(streamed(source), annotations).decode(False)
        iterator = iter(stream)
        first, state = [next(iterator) for _ in range(number)], stream.state_dict()
        rest = join_annotations(streamed(source), annotations).decode(False)
        rest.load_state_dict(state)
        assert first + list(rest) == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_share_a_stream(num_workers, runs):
    """Data loader workers together read each row once."""
    joined = join_annotations(streamed(sources.pick_a_pic()), load_annotations(runs / "pick_a_pic")).decode(False)
    assert joined.num_shards == 3
    loader = torch.utils.data.DataLoader(joined, batch_size=None, num_workers=num_workers)
    ids = [row["id"] for row in loader]
    assert sorted(ids) == [row["id"] for row in joined]


def test_a_joined_dataset_is_found_in_the_cache(runs):
    """The hash of a join in the cache of `datasets` depends on annotations and columns, not on its use."""
    annotations = load_annotations(runs / "pairs")
    source, columns = prepare_rows(sources.pairs(), pair_columns)
    fresh = Join(annotations, columns, instance_pair_features(), ties=False)
    used = Join(load_annotations(runs / "pairs"), columns, instance_pair_features(), ties=False)
    used(source[:2])
    assert used.counts == {"joined": 2}
    assert Hasher.hash(fresh) == Hasher.hash(used)
    assert Hasher.hash(fresh) != Hasher.hash(Join(annotations, columns, instance_pair_features(), ties=True))
    assert Hasher.hash(fresh) != Hasher.hash(Join(annotations.select([0]), columns, fresh.features, ties=False))


# ----- from a run's folder -----


def test_annotations_are_loaded_from_either_folder(runs):
    """The folder of a run and its parent give all rows in order, with the declared columns and the name of the
    split."""
    (run,) = (runs / "pairs").glob("train-*")
    annotations = load_annotations(run)
    assert annotations.features == PAIR_ANNOTATION_FEATURES and str(annotations.split) == "train"
    assert annotations["id"] == sources.pairs()["id"]
    assert list(load_annotations(runs / "pairs")) == list(annotations)


def test_a_split_is_named_where_there_are_several(tmp_path):
    """`split` selects one of several runs."""
    sources.annotate_pairs(sources.pairs(2), tmp_path)
    sources.annotate_pairs(sources.pairs(3, seed=1), tmp_path, split="test")
    with pytest.raises(ValueError, match="holds runs of the splits test, train"):
        load_annotations(tmp_path)
    with pytest.raises(ValueError, match="no run of the split 'validation'; it has test, train"):
        load_annotations(tmp_path, "validation")
    assert len(load_annotations(tmp_path, "train")) == 2 and len(load_annotations(tmp_path, "test")) == 3


def test_several_runs_of_a_split_are_refused(tmp_path):
    """Two runs of one split are refused, with their folders and differences; each loads by its own folder."""
    first = sources.annotate_pairs(sources.pairs(2), tmp_path)
    second = sources.annotate_pairs(sources.pairs(3), tmp_path, crop_size=96)
    with pytest.raises(ValueError) as error:
        load_annotations(tmp_path)
    assert first.folder.name in str(error.value) and second.folder.name in str(error.value)
    assert "judge.crop_size (" in str(error.value) and "64" in str(error.value) and "96" in str(error.value)
    assert "planner" not in str(error.value) and "counts" not in str(error.value)
    assert len(load_annotations(second.folder)) == 3


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    """An unfinished run is loaded only on request."""
    folder = sources.annotate_pairs(sources.pairs(7), tmp_path).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"complete": False}))
    (folder / "annotations-000001.parquet").unlink()
    with pytest.raises(ValueError, match="is not finished, 7 rows are done.*allow_incomplete"):
        load_annotations(tmp_path)
    assert len(load_annotations(tmp_path, allow_incomplete=True)) == 5


def test_a_folder_without_a_run_is_refused(tmp_path):
    """A folder without a manifest raises a ValueError that names the commands."""
    with pytest.raises(ValueError, match="is not a folder of annotations.*annotate-instances"):
        load_annotations(tmp_path)


def test_a_shard_that_was_written_again_is_read_again(tmp_path):
    """Loading uses the cache of `datasets`, but returns the current content of the files."""
    folder = sources.annotate_pairs(sources.pairs(2), tmp_path / "first").folder
    assert len(load_annotations(folder)) == 2
    other = sources.annotate_pairs(sources.pairs(3, seed=1), tmp_path / "second").folder
    for path in other.glob("*.parquet"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert load_annotations(folder)["id"] == sources.pairs(3, seed=1)["id"]
