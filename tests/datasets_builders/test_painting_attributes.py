# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, Features, load_dataset

from datasets_builders import common
from datasets_builders.painting_attributes.painting_attributes import split_of
from tests import tiny
from tests.datasets_builders import sources
from tests.datasets_builders.fake_hub import REPO, FakeHub
from tests.datasets_builders.sources import CRITERIA, rows
from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer, Criteria, attribute_features
from trl_diffusion.annotation.attributes import count_attributes
from trl_diffusion.annotation.join import join_annotations, load_annotations
from trl_diffusion.annotation.records import IMAGE_ANNOTATION_FEATURES, STATUSES
from trl_diffusion.annotation.run import MANIFEST
from trl_diffusion.data.formats import ATTRIBUTE_COLUMNS


SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def paintings(tmp_path_factory) -> Path:
    """Annotated and built: `source`, `annotations`, `out`."""
    folder = tmp_path_factory.mktemp("paintings")
    sources.save(folder / "source", train=sources.paintings())
    sources.annotate_paintings(sources.paintings(), folder / "annotations")
    sources.build_paintings(folder / "source", folder / "annotations", folder / "out")
    return folder


def annotations_of(folder: Path) -> Dataset:
    return load_annotations(folder / "annotations")


# ----- the split -----


def test_a_rows_split_follows_from_its_id():
    """The splits of ids equal recorded ones, in any order."""
    written = {"test": (0, 1), "validation": (2, 4, 7, 10), "train": (3, 5, 6, 8, 9, 11)}
    expected = {f"painting-0-{index:05d}": split for split, indices in written.items() for index in indices}
    expected |= {"": "test", "\u00e9": "validation"}
    for row_id in random.Random(0).sample(sorted(expected), len(expected)):
        assert split_of(row_id) == expected[row_id]


def test_eight_of_ten_rows_are_to_train_on():
    """For 10,000 ids, the shares are 80, 10 and 10 percent, within three standard deviations."""
    counts = Counter(split_of(f"row-{index}") for index in range(10_000))
    assert set(counts) == set(SPLITS)
    assert (
        abs(counts["train"] - 8000) < 120 and abs(counts["validation"] - 1000) < 90 and abs(counts["test"] - 1000) < 90
    )


# ----- the folder -----


def test_a_folder_loads_as_the_source_with_attributes(paintings):
    """In memory and streamed, rows have the source's unchanged bytes and the annotated attributes as labels, each in
    the split of its id."""
    criteria = Criteria.load(CRITERIA)
    source = {row["id"]: row for row in sources.undecoded(sources.paintings())}
    found = {row["id"]: row for row in annotations_of(paintings)}
    seen = []
    for split in SPLITS:
        dataset = load_dataset(str(paintings / "out"), split=split)
        stream = load_dataset(str(paintings / "out"), split=split, streaming=True)
        assert dataset.features == stream.features == attribute_features(criteria)
        assert rows(dataset) == rows(stream)
        assert dataset["id"] == [
            row_id for row_id in source if split_of(row_id) == split and found[row_id]["status"] == 0
        ]
        for row in rows(dataset):
            assert row["image"] == {"bytes": source[row["id"]]["image"]["bytes"], "path": None}
            assert row["prompt"] == source[row["id"]]["prompt"]
            for name in ATTRIBUTE_COLUMNS:
                names = [criteria.attributes[index].id for index in row[name]]
                assert names == found[row["id"]][name]
        seen += dataset["id"]
    assert sorted(seen) == sorted(row_id for row_id in source if row_id != "painting-0-00003")


def test_the_annotations_configuration_is_what_the_run_wrote(paintings):
    """Each row of the shards is in one split of `annotations`, with the same types except attributes as labels."""
    labels = attribute_features(Criteria.load(CRITERIA))
    built = load_dataset(str(paintings / "out"), "annotations")
    typed = Features({**IMAGE_ANNOTATION_FEATURES, **{name: labels[name] for name in ATTRIBUTE_COLUMNS}})
    for split in SPLITS:
        assert built[split].features == typed
        expected = [row for row in annotations_of(paintings).cast(typed) if split_of(row["id"]) == split]
        assert list(built[split]) == expected
    assert sum(map(len, built.values())) == 40


@pytest.mark.parametrize("streaming", [False, True])
def test_annotations_and_source_joined_are_the_images(streaming, paintings):
    """Joining the published annotations of a split with the whole source gives that split of `images`, row by row."""
    source = sources.paintings()
    source = source.to_iterable_dataset(num_shards=3) if streaming else source
    for split in SPLITS:
        annotations = load_dataset(str(paintings / "out"), "annotations", split=split)
        joined, built = join_annotations(source, annotations), load_dataset(str(paintings / "out"), split=split)
        assert joined.features == built.features
        assert rows(joined) == rows(built)


def test_a_trainer_trains_on_the_folder(paintings, tmp_path):
    """A training step on the loaded, streamed or joined dataset gives the same weights, and changes them."""
    annotations = load_dataset(str(paintings / "out"), "annotations", split="train")
    kinds = {
        "loaded": load_dataset(str(paintings / "out"), split="train"),
        "streamed": load_dataset(str(paintings / "out"), split="train", streaming=True),
        "joined": join_annotations(sources.paintings().to_iterable_dataset(num_shards=3), annotations),
    }
    settings = {**tiny.FAST, "max_steps": 1, "train_sampling_strategy": "sequential"}
    ends = {}
    for name, dataset in kinds.items():
        args = AttributeSFTConfig(str(tmp_path / name), criteria=CRITERIA, resolution=32, **settings)
        trainer = AttributeSFTTrainer(tiny.sd_pipeline(), args=args, train_dataset=dataset, peft_config=None)
        trainer.train()
        assert trainer.state.global_step == 1
        ends[name] = tiny.weights(trainer.model)
    assert tiny.max_difference(ends["loaded"], tiny.weights(tiny.sd_pipeline().unet)) > 0
    assert tiny.max_difference(ends["loaded"], ends["streamed"]) == 0
    assert tiny.max_difference(ends["loaded"], ends["joined"]) == 0


def test_splits_without_rows_are_left_out(tmp_path):
    """A split without rows is left out, and the dataset loads."""
    source = sources.paintings(12).select(range(2, 12))
    sources.save(tmp_path / "source", train=source)
    sources.annotate_paintings(source, tmp_path / "annotations")
    sources.build_paintings(tmp_path / "source", tmp_path / "annotations", tmp_path / "out")
    built = load_dataset(str(tmp_path / "out"))
    assert {split: len(rows) for split, rows in built.items()} == {"train": 5, "validation": 4}


# ----- what does not fit -----


def test_what_does_not_fit_is_refused(paintings, tmp_path):
    """Another tree, annotations of pairs, and runs of two splits raise a ValueError, and no folder is written."""
    with pytest.raises(
        ValueError, match="annotated with the criteria 'quickstart' of 4 attributes, but painting is another"
    ):
        sources.build_paintings(paintings / "source", paintings / "annotations", tmp_path / "out", criteria="painting")
    sources.annotate_pairs(sources.pairs(2), tmp_path / "pairs")
    with pytest.raises(ValueError, match="holds annotations of instances, but `painting_attributes` needs"):
        sources.build_paintings(paintings / "source", tmp_path / "pairs", tmp_path / "out")
    shutil.copytree(paintings / "annotations", tmp_path / "annotations")
    sources.annotate_paintings(sources.paintings(5), tmp_path / "annotations", split="test")
    with pytest.raises(ValueError, match="holds runs of several splits: test-.*, train-.*pass the folder of one run"):
        sources.build_paintings(paintings / "source", tmp_path / "annotations", tmp_path / "out")
    lacking = sources.save(tmp_path / "source", train=sources.paintings().select(range(30)))
    with pytest.raises(ValueError, match="The split .* annotated rows, but the source has only"):
        sources.build_paintings(lacking, paintings / "annotations", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations", "pairs", "source"]


# ----- the card -----


def test_the_cards_figures_are_those_of_the_shards(paintings):
    """Every table of the card equals counts of the annotations, and its sums equal the counts of the manifest."""
    statuses, figures, dimensions = sources.tables(sources.card_of(paintings / "out")[1])[:3]
    manifest = json.loads(next((paintings / "annotations").glob(f"*/{MANIFEST}")).read_text())
    annotations = list(annotations_of(paintings))
    assert [line[0] for line in statuses] == [line[0] for line in figures] == list(SPLITS)
    for (split, *numbers), (_, *counts) in zip(statuses, figures, strict=True):
        of_split = [row for row in annotations if split_of(row["id"]) == split]
        status = Counter(STATUSES[row["status"]] for row in of_split)
        assert [int(number) for number in numbers] == [len(of_split), *(status[name] for name in STATUSES)]
        expected = count_attributes(of_split)
        names = ("positive_attributes", "negative_attributes", "without_attributes")
        assert [int(number) for number in counts] == [status["ok"], *(expected[name] for name in names)]
    for index, name in ((1, "rows"), (2, "ok"), (3, "rejected"), (4, "error")):
        assert sum(int(line[index]) for line in statuses) == manifest["counts"][name]
    assert [line[:2] for line in dimensions] == [
        ["drawing", "1"],
        ["color", "1"],
        ["composition", "1"],
        ["light", "1"],
    ]
    assert sum(int(line[2]) for line in dimensions) == manifest["counts"]["positive_attributes"]
    assert sum(int(line[3]) for line in dimensions) == manifest["counts"]["negative_attributes"]


def test_the_cards_text_and_metadata(paintings):
    """The card has prompt, tree, valid code, labels and splits in the YAML, and the reason of the one error."""
    metadata, text = sources.card_of(paintings / "out")
    manifest = json.loads(next((paintings / "annotations").glob(f"*/{MANIFEST}")).read_text())
    assert manifest["attribute_expert"]["prompt"]["text"].strip() in text
    assert str(paintings) not in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)
    assert 'criteria = "out/criteria.yaml"' in text
    assert (paintings / "out" / "criteria.yaml").read_text() == Path(CRITERIA).read_text()
    (split,) = [split_of("painting-0-00003")]
    assert sources.tables(text)[-1] == [[split, "error", "image: …", "1"]]
    (images,) = [info for info in metadata["dataset_info"] if info["config_name"] == "images"]
    assert {split["name"]: split["num_examples"] for split in images["splits"]} == {
        name: len(load_dataset(str(paintings / "out"), split=name)) for name in SPLITS
    }
    labels = {str(index): leaf.id for index, leaf in enumerate(Criteria.load(CRITERIA).attributes)}
    assert images["features"][3] == {"name": "positive_attributes", "list": {"class_label": {"names": labels}}}


# ----- the Hub and the command -----


def test_annotations_and_tree_are_pushed(paintings, tmp_path, monkeypatch):
    """The annotations are pushed with the tree of their labels, and load from the Hub."""
    hub = FakeHub(tmp_path, monkeypatch)
    flags = ("--no_images", "--push_to_hub", REPO)
    sources.build_paintings(paintings / "source", paintings / "annotations", tmp_path / "out", *flags)
    assert hub.files == [
        "README.md",
        *(f"annotations/{split}-00000-of-00001.parquet" for split in sorted(SPLITS)),
        "criteria.yaml",
    ]
    text = sources.card_of(hub.folder)[1]
    assert f'hf_hub_download("{REPO}", "criteria.yaml", repo_type="dataset")' in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)
    annotations = load_dataset(str(hub.folder), split="test")
    built = load_dataset(str(paintings / "out"), split="test")
    assert rows(join_annotations(sources.paintings(), annotations)) == rows(built)


def test_images_go_from_the_source_to_the_hub(paintings, tmp_path, monkeypatch):
    """With `--no_images --push_images`, the pushed dataset equals the built one, in files of a given size."""
    hub = FakeHub(tmp_path, monkeypatch)
    monkeypatch.setattr(common, "SHARD_BYTES", 3000)
    monkeypatch.setattr(common, "ROW_GROUP", 4)
    flags = ("--no_images", "--push_to_hub", REPO, "--push_images")
    sources.build_paintings(paintings / "source", paintings / "annotations", tmp_path / "out", *flags)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "annotations", "criteria.yaml"]
    assert "images/train-00001.parquet" in hub.files
    for split in SPLITS:
        pushed, built = (load_dataset(str(folder), split=split) for folder in (hub.folder, paintings / "out"))
        assert pushed.features == built.features and rows(pushed) == rows(built)


def test_the_command(paintings, tmp_path):
    """`python -m datasets_builders.painting_attributes` builds the same rows in its own process."""
    command = [sys.executable, "-m", "datasets_builders.painting_attributes", "--criteria", CRITERIA]
    result = subprocess.run(
        command + sources.arguments(paintings / "source", paintings / "annotations", tmp_path / "out"),
        cwd=Path(common.__file__).parents[1],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for split in SPLITS:
        loaded, built = (load_dataset(str(folder), split=split) for folder in (tmp_path / "out", paintings / "out"))
        assert rows(loaded) == rows(built)
        assert f"images, {split}: {len(built)} rows" in result.stdout
