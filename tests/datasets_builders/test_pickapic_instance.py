# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset, load_dataset_builder
from huggingface_hub import HfApi

from datasets_builders import common
from datasets_builders.pickapic_instance import PickapicInstance
from tests import tiny
from tests.datasets_builders import sources
from tests.datasets_builders.fake_hub import REPO, FakeHub
from tests.datasets_builders.sources import rows
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, instance_pair_features
from trl_diffusion.annotation import join
from trl_diffusion.annotation.instances import count_instances
from trl_diffusion.annotation.join import join_annotations, load_annotations
from trl_diffusion.annotation.records import (
    PAIR_ANNOTATION_FEATURES,
    STATUSES,
    Instance,
    PairRecord,
    pair_columns,
    prepare_rows,
    read_pair,
)
from trl_diffusion.annotation.run import MANIFEST, Task, run, run_locally
from trl_diffusion.data.formats import PREFERENCES
from trl_diffusion.data.sources import load_source


PICTURES = [f"images/example-{number}.png" for number in range(3)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two splits of pairs, annotated and built: `source`, `annotations`, `out`."""
    folder = tmp_path_factory.mktemp("world")
    source = sources.save(folder / "source", train=sources.pairs(24), validation=sources.pairs(8, seed=1))
    for split, pairs in (("train", sources.pairs(24)), ("validation", sources.pairs(8, seed=1))):
        sources.annotate_pairs(pairs, folder / "annotations", split, name=str(source))
    sources.build_pairs(source, folder / "annotations", folder / "out")
    return folder


@pytest.fixture(scope="module")
def pick_a_pic(tmp_path_factory) -> Path:
    """The columns of Pick-a-Pic, every kind of row, and annotated ties."""
    folder = tmp_path_factory.mktemp("pick_a_pic")
    sources.save(folder / "source", train=sources.pick_a_pic())
    sources.annotate_pairs(
        sources.pick_a_pic(),
        folder / "annotations",
        tie_policy="keep",
        vlm=sources.StumblingVLM(),
        name="user/pickapic",
    )
    sources.build_pairs(folder / "source", folder / "annotations", folder / "out")
    return folder


# ----- the folder -----


def test_a_folder_loads_as_the_source_with_instances(world):
    """In memory and streamed, rows have exactly the trainer's columns, with the source's unchanged bytes and the
    annotated instances."""
    source = sources.pairs(24)
    for name, expected in (("train", source), ("validation", sources.pairs(8, seed=1))):
        dataset = load_dataset(str(world / "out"), split=name)
        stream = load_dataset(str(world / "out"), split=name, streaming=True)
        assert dataset.features == stream.features == instance_pair_features()
        assert (
            rows(dataset)
            == rows(stream)
            == rows(join_annotations(expected, load_annotations(world / "annotations", name)))
        )
        assert [row["chosen"]["bytes"] for row in rows(dataset)] == [row["chosen"]["bytes"] for row in rows(expected)]
        assert [row["rejected"]["bytes"] for row in rows(dataset)] == [
            row["rejected"]["bytes"] for row in rows(expected)
        ]
        assert dataset["id"] == expected["id"] and dataset["prompt"] == expected["prompt"]
    assert set(load_dataset(str(world / "out"))) == {"train", "validation"}


def test_the_annotations_configuration_is_what_the_run_wrote(world, pick_a_pic):
    """The configuration `annotations` has all rows of the shards, with the same types."""
    for folder in (world, pick_a_pic):
        dataset = load_dataset(str(folder / "out"), "annotations", split="train")
        assert dataset.features == PAIR_ANNOTATION_FEATURES
        assert list(dataset) == list(load_annotations(folder / "annotations", "train"))
    assert dataset["id"] == [str(number) for number in sources.pick_a_pic()["ranking_id"]]


def test_ids_come_out_by_their_status(pick_a_pic):
    """Rows that are ok are in `train` or, if they are ties, in `train_ties`; the others are only in `annotations`."""
    annotations = load_dataset(str(pick_a_pic / "out"), "annotations", split="train")
    built = load_dataset(str(pick_a_pic / "out"))
    assert set(built) == {"train", "train_ties"}
    ids = {
        tie: [row["id"] for row in annotations if STATUSES[row["status"]] == "ok" and row["tie"] == tie]
        for tie in (False, True)
    }
    assert built["train"]["id"] == ids[False] and built["train_ties"]["id"] == ids[True]
    assert Counter(STATUSES[status] for status in annotations["status"]) == {"ok": 14, "rejected": 4, "error": 6}
    assert len(ids[False]) == 11 and len(ids[True]) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_annotations_and_source_joined_are_the_pairs(streaming, world, pick_a_pic):
    """Joining the published annotations with the source gives the configuration `pairs`, row by row."""
    for folder, source in ((world, sources.pairs(24)), (pick_a_pic, sources.pick_a_pic())):
        annotations = load_dataset(str(folder / "out"), "annotations", split="train")
        source = source.to_iterable_dataset(num_shards=3) if streaming else source
        built = load_dataset(str(folder / "out"))
        assert rows(join_annotations(source, annotations)) == rows(built["train"])
    assert rows(join_annotations(source, annotations, ties=True)) == rows(built["train_ties"])


def test_a_trainer_trains_on_the_folder(world, tmp_path):
    """A training step on the loaded, streamed or joined dataset gives the same weights, and changes them."""
    annotations = load_dataset(str(world / "out"), "annotations", split="train")
    kinds = {
        "loaded": load_dataset(str(world / "out"), split="train"),
        "streamed": load_dataset(str(world / "out"), split="train", streaming=True),
        "joined": join_annotations(sources.pairs(24).to_iterable_dataset(num_shards=3), annotations),
    }
    settings = {**tiny.FAST, "max_steps": 1, "train_sampling_strategy": "sequential"}
    ends = {}
    for name, dataset in kinds.items():
        args = InstanceDPOConfig(str(tmp_path / name), resolution=32, **settings)
        trainer = InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=dataset)
        trainer.train()
        assert trainer.state.global_step == 1
        ends[name] = tiny.weights(trainer.model)
    assert tiny.max_difference(ends["loaded"], tiny.weights(tiny.sd_pipeline().unet)) > 0
    assert tiny.max_difference(ends["loaded"], ends["streamed"]) == 0
    assert tiny.max_difference(ends["loaded"], ends["joined"]) == 0


def test_the_builder_by_itself(pick_a_pic):
    """The builder has the name of its module and two configurations, and streams each split without writing it."""
    options = {"annotations_dir": str(pick_a_pic / "annotations"), "source": str(pick_a_pic / "source")}
    builder = PickapicInstance(**options)
    assert builder.name == "pickapic_instance" and builder.config.name == "pairs"
    assert list(builder.builder_configs) == ["pairs", "annotations"] and str(builder.config.version) == "1.0.0"
    for split, built in load_dataset(str(pick_a_pic / "out")).items():
        stream = builder.as_streaming_dataset(split)
        assert stream.features == instance_pair_features() and rows(stream) == rows(built)
    annotations = PickapicInstance(config_name="annotations", **options).as_streaming_dataset("train")
    assert list(annotations) == list(load_annotations(pick_a_pic / "annotations"))


def test_files_are_cut_at_a_size(world, tmp_path, monkeypatch):
    """Rows are split into files by size, in order, and every file name contains the number of files."""
    monkeypatch.setattr(common, "SHARD_BYTES", 4000)
    monkeypatch.setattr(PickapicInstance, "DEFAULT_WRITER_BATCH_SIZE", 2)
    sources.build_pairs(world / "source", world / "annotations", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out" / "pairs").glob("train-*"))
    assert len(names) > 3
    assert names == [f"train-{index:05d}-of-{len(names):05d}.parquet" for index in range(len(names))]
    loaded = load_dataset(str(tmp_path / "out"), split="train")
    assert rows(loaded) == rows(load_dataset(str(world / "out"), split="train"))


def test_only_what_is_read_is_left(world):
    """The folder contains the rows, the card and its pictures, and no temporary files remain in its parent."""
    files = sorted(str(path.relative_to(world / "out")) for path in (world / "out").rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "annotations/train-00000-of-00001.parquet",
        "annotations/validation-00000-of-00001.parquet",
        *PICTURES,
        "pairs/train-00000-of-00001.parquet",
        "pairs/validation-00000-of-00001.parquet",
    ]
    assert sorted(path.name for path in world.iterdir()) == ["annotations", "out", "source"]


def test_images_in_files_end_up_inside(tmp_path):
    """The files of a folder of images are in the Parquet files with the same bytes."""
    (tmp_path / "source").mkdir()
    lines = []
    for index, row in enumerate(sources.pairs(4)):
        for name in ("chosen", "rejected"):
            row[name].save(tmp_path / "source" / f"{index}_{name}.jpg", quality=98)
        names = {f"{name}_file_name": f"{index}_{name}.jpg" for name in ("chosen", "rejected")}
        lines.append(json.dumps({"id": row["id"], "prompt": row["prompt"], **names}))
    (tmp_path / "source" / "metadata.jsonl").write_text("\n".join(lines))
    source = load_dataset(str(tmp_path / "source"), split="train")
    sources.annotate_pairs(source, tmp_path / "annotations")
    sources.build_pairs(tmp_path / "source", tmp_path / "annotations", tmp_path / "out")
    shutil.rmtree(tmp_path / "annotations")
    built = rows(load_dataset(str(tmp_path / "out"), split="train"))
    images = [(tmp_path / "source" / f"{index}_chosen.jpg").read_bytes() for index in range(4)]
    assert [row["chosen"] for row in built] == [{"bytes": image, "path": None} for image in images]
    assert images[0].startswith(b"\xff\xd8")


def test_what_an_annotator_sees_comes_out(tmp_path):
    """If the annotator knows the instances, the built dataset equals the original, for pairs of several sizes."""
    pairs = tiny.pairs()
    source = sources.save(tmp_path / "source", train=pairs.remove_columns("instances"))
    by_id = {row["id"]: row["instances"] for row in pairs}

    def annotate(records: list[PairRecord]):
        for pair in records:
            for instance in by_id[pair.id]:
                boxes = [
                    [
                        number / size
                        for number, size in zip(instance[f"{name}_box"], 2 * image.upright.size, strict=True)
                    ]
                    for name, image in (("chosen", pair.chosen), ("rejected", pair.rejected))
                ]
                preference = PREFERENCES[instance["preference"]]
                pair.instances.append(Instance(instance["label"], *boxes, 1.0, 1.0, preference=preference))

    rows_in, columns = prepare_rows(pairs, pair_columns)
    description = {"task": "instances", "dataset": {"name": "tiny", "split": "train"}, "columns": columns}
    description |= {"tie_policy": "drop"} | {role: {"model": "a person"} for role in ("planner", "detector", "judge")}
    read = partial(read_pair, columns=columns)
    task = Task(read, (annotate,), PAIR_ANNOTATION_FEATURES, description, count_instances, "train", 3, 2)
    run(rows_in, task, tmp_path / "annotations", run_locally)
    sources.build_pairs(source, tmp_path / "annotations", tmp_path / "out")
    built = rows(load_dataset(str(tmp_path / "out"), split="train"))
    for row, given in zip(built, rows(pairs), strict=True):
        for instance, expected in zip(row["instances"], given["instances"], strict=True):
            for name in ("chosen_box", "rejected_box"):
                assert instance.pop(name) == pytest.approx(expected.pop(name), abs=1e-5)  # float32, up to 64 pixels
        assert row == given
    assert "of the 16 objects, 4 (25.0 %)" in sources.card_of(tmp_path / "out")[1]


def test_columns_are_those_that_are_named(world, tmp_path):
    """`--columns` names the columns of the source, and the example in the card uses them."""
    mapping = {"id": "key", "prompt": "text", "chosen": "winner", "rejected": "loser"}
    renamed = {split: pairs.rename_columns(mapping) for split, pairs in load_splits(world).items()}
    source = sources.save(tmp_path / "source", **renamed)
    sources.build_pairs(source, world / "annotations", tmp_path / "out", "--columns", json.dumps(mapping))
    loaded = load_dataset(str(tmp_path / "out"), split="train")
    assert rows(loaded) == rows(load_dataset(str(world / "out"), split="train"))
    assert f"columns={mapping})" in sources.card_of(tmp_path / "out")[1]


def load_splits(world: Path) -> dict[str, Dataset]:
    return {"train": sources.pairs(24), "validation": sources.pairs(8, seed=1)}


# ----- what does not fit -----


def test_what_does_not_fit_is_refused(world, tmp_path):
    """Changed images, missing rows, and unfinished or unrelated runs raise a ValueError, and no folder is written."""
    train, validation = sources.pairs(24), sources.pairs(8, seed=1)
    other = sources.undecoded(sources.pairs(1, seed=2))[0]["chosen"]
    changed = sources.undecoded(train).map(
        lambda row, index: {"chosen": other} if index == 5 else {}, with_indices=True
    )
    cases = {
        "id 'world-0-00005' has other images": {"train": changed, "validation": validation},
        "The split train has 24 annotated rows, but the source has only 20": {
            "train": train.select(range(20)),
            "validation": validation,
        },
        "no split `validation`": {"train": train},
    }
    for message, splits in cases.items():
        source = sources.save(tmp_path / "source", **splits)
        with pytest.raises(ValueError, match=message):
            sources.build_pairs(source, world / "annotations", tmp_path / "out")
        shutil.rmtree(source)
    shutil.copytree(world / "annotations", tmp_path / "annotations")
    (run,) = (tmp_path / "annotations").glob("train-*")
    manifest = json.loads((run / MANIFEST).read_text())
    (run / MANIFEST).write_text(json.dumps(manifest | {"complete": False}))
    with pytest.raises(ValueError, match="is not finished"):
        sources.build_pairs(world / "source", tmp_path / "annotations", tmp_path / "out")
    (run / MANIFEST).write_text(json.dumps(manifest | {"task": "attributes"}))
    with pytest.raises(
        ValueError, match="holds annotations of attributes, but `pickapic_instance` needs annotations of instances"
    ):
        sources.build_pairs(world / "source", tmp_path / "annotations", tmp_path / "out")
    manifest["judge"]["crop_size"] = 96
    (run / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"not annotated in the same way: they differ in judge.crop_size \((96, 64|64, 96)\)"
    ):
        sources.build_pairs(world / "source", tmp_path / "annotations", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["annotations"]


def test_annotations_of_which_none_is_ok_are_refused(tmp_path):
    """If every pair is a rejected tie, building is refused."""
    ties = sources.pick_a_pic().filter(lambda row: row["label_0"] == 0.5)
    sources.annotate_pairs(ties, tmp_path / "annotations")
    sources.save(tmp_path / "source", train=ties)
    with pytest.raises(ValueError, match="No row in .* has the status ok: there is nothing to train on"):
        sources.build_pairs(tmp_path / "source", tmp_path / "annotations", tmp_path / "out")
    sources.build_pairs(tmp_path / "source", tmp_path / "annotations", tmp_path / "out", "--no_images")
    assert Counter(load_dataset(str(tmp_path / "out"), split="train")["status"]) == {1: 8}


def test_flags_that_do_not_fit_are_refused(world, tmp_path):
    """A folder that is not empty, flags of a push without a repository, and what is no name of one are refused."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="out exists and is not empty"):
        sources.build_pairs(world / "source", world / "annotations", tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"
    for flags in (["--push_images"], ["--private"], ["--hub_revision", "x"], ["--hub_token", "hf_secret"]):
        with pytest.raises(ValueError, match=f"`{flags[0]}` needs a repository: name one with `--push_to_hub`"):
            sources.build_pairs(world / "source", world / "annotations", tmp_path / "new", *flags)
    for name in ("datasets/user/name", "user/na me", "user/", "/name", "user/name--x", ".name", "name.git", "u" * 97):
        with pytest.raises(ValueError, match=f"`--push_to_hub` '{re.escape(name)}' is no name on the Hub"):
            sources.build_pairs(world / "source", world / "annotations", tmp_path / "new", "--push_to_hub", name)
    assert not (tmp_path / "new").exists()


def test_a_push_that_fails_leaves_the_folder(world, tmp_path, monkeypatch):
    """Without a token the Hub refuses: the error says how to log in and where the dataset is, and the dataset is there."""

    def refused(*args, **kwargs):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(HfApi, "create_repo", refused)
    monkeypatch.setattr("trl_diffusion.hub.get_token", lambda: None)
    with pytest.raises(
        ValueError, match="401 Unauthorized. The dataset is saved in .*new. There is no token: run `hf auth login`"
    ):
        sources.build_pairs(world / "source", world / "annotations", tmp_path / "new", "--push_to_hub", REPO)
    assert load_dataset(str(tmp_path / "new"), split="train").num_rows


def test_rows_that_the_source_has_once_more_are_no_matter(world, tmp_path):
    """A source that has grown since it was annotated builds the same rows."""
    grown = concatenate_datasets([sources.pairs(24), sources.pairs(4, seed=5)])
    source = sources.save(tmp_path / "source", train=grown, validation=sources.pairs(8, seed=1))
    sources.build_pairs(source, world / "annotations", tmp_path / "out")
    loaded = load_dataset(str(tmp_path / "out"), split="train")
    assert rows(loaded) == rows(load_dataset(str(world / "out"), split="train"))


# ----- the card -----


def test_the_cards_figures_are_those_of_the_shards(world, pick_a_pic):
    """Every table of the card equals counts of the annotations, and its sums equal the counts of the manifests."""
    for folder, splits in ((world, ("train", "validation")), (pick_a_pic, ("train",))):
        found = sources.tables(sources.card_of(folder / "out")[1])
        statuses, figures = found[0], {line[0]: line[1:] for line in found[1]}
        assert [line[0] for line in statuses] == sorted(splits)
        for split, *numbers in statuses:
            annotations = list(load_annotations(folder / "annotations", split))
            status = Counter(STATUSES[row["status"]] for row in annotations)
            ties = sum(row["tie"] for row in annotations)
            assert [int(number) for number in numbers] == [
                *(len(annotations), status["ok"], status["rejected"], status["error"], ties)
            ]
            ok = [row for row in annotations if STATUSES[row["status"]] == "ok"]
            for name, tie in ((split, False), (f"{split}_ties", True)):
                chosen = [row for row in ok if row["tie"] == tie]
                assert bool(chosen) == (name in figures)
                if chosen:
                    counts = count_instances(chosen)
                    share = 100 * counts["conflicts"] / counts["instances"]
                    assert figures[name] == [
                        *(str(len(chosen)), str(counts["without_instances"]), str(counts["instances"])),
                        f"{counts['conflicts']} ({share:.1f} %)",
                        f"{counts['instance_ties']} ({100 * counts['instance_ties'] / counts['instances']:.1f} %)",
                        str(counts["dropped_instances"]),
                    ]
            manifest = json.loads(next((folder / "annotations").glob(f"{split}-*/{MANIFEST}")).read_text())
            of_split = [numbers for name, numbers in figures.items() if name.split("_")[0] == split]
            for index, name in ((2, "instances"), (3, "conflicts"), (4, "instance_ties"), (5, "dropped_instances")):
                assert sum(int(numbers[index].split()[0]) for numbers in of_split) == manifest["counts"][name]


def test_the_card_says_why_rows_are_left_out(pick_a_pic, world):
    """Reasons are counted by their beginnings, with dropped objects; without any, the card says so."""
    text = sources.card_of(pick_a_pic / "out")[1]
    reasons, dropped = sources.tables(text)[-2:]
    assert reasons == [
        ["train", "error", "planner: …", "5"],
        ["train", "rejected", "the pair has no label: …", "4"],
        ["train", "error", "rejected: …", "1"],
    ]
    assert dropped == [["train", "not detected in the chosen and the rejected image", "1"]]
    text = sources.card_of(world / "out")[1]
    assert "No row is left out." in text and "No object is dropped." in text


def test_the_card_describes_the_annotation(pick_a_pic):
    """Models, settings and prompts are those of the manifest, without local paths."""
    text = sources.card_of(pick_a_pic / "out")[1]
    manifest = json.loads(next((pick_a_pic / "annotations").glob(f"*/{MANIFEST}")).read_text())
    for role in ("planner", "judge"):
        assert manifest[role]["prompt"]["text"].strip() in text
    assert "| crop_size | 64 |" in text and "| model | oracle |" in text and "| crop_margin | 1.25 |" in text
    assert "from `user/pickapic`" in text and "Pick-a-Pic v2 names no license" in text
    assert "annotated too" in text and "called `..._ties`" in text
    for package, number in manifest["versions"].items():
        assert f"{package} {number}" in text
    assert str(pick_a_pic) not in text and "None" not in re.sub("None is declared", "", text)


def test_a_path_or_an_address_does_not_get_into_a_card():
    """Of a model's folder, only the name is published, of a server nothing; Hub ids are unchanged."""
    role = {
        "model": {"model": "/data/models/judge", "revision": "sha256:0", "server": "http://10.0.0.1/v1"},
        "crop": 3,
    }
    assert common.describe_role(role) == {
        "settings": {"model": "judge", "revision": "sha256:0", "crop": 3},
        "prompt": None,
    }
    assert common.public("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert common.public("./models/judge") == common.public("my/models/judge") == "judge"


def test_a_prompt_with_fences_stays_one_block():
    """A prompt that contains a fence gets a longer one."""
    assert common.fenced("a\n````\nb") == "`````text\na\n````\nb\n`````"
    assert common.cell("a | b\nc") == "a \\| b c"


def test_the_cards_code_is_python(world, pick_a_pic):
    """Every code block is valid, loads this dataset, and joins it with its source."""
    for folder, source in ((world, "source"), (pick_a_pic, "source")):
        blocks = re.findall(r"```python\n(.*?)```", sources.card_of(folder / "out")[1], re.DOTALL)
        assert len(blocks) == 2
        for block in blocks:
            ast.parse(block)
        assert 'load_dataset("out", split="train")' in blocks[0]
        assert 'load_dataset("out", "annotations", split="train")' in blocks[1]
        assert f'load_dataset("{source}", split="train")' in blocks[1]


def test_the_cards_metadata(world, pick_a_pic):
    """The YAML declares configurations with their files, columns and sizes, the size category, and no license."""
    metadata, _ = sources.card_of(world / "out")
    assert metadata["license"] == "unknown" and metadata["size_categories"] == ["n<1K"]
    assert metadata["task_categories"] == ["text-to-image"] and "iapo" in metadata["tags"]
    assert metadata["configs"] == [
        {
            "config_name": "annotations",
            "data_files": [{"split": name, "path": f"annotations/{name}-*"} for name in ("train", "validation")],
        },
        {
            "config_name": "pairs",
            "data_files": [{"split": name, "path": f"pairs/{name}-*"} for name in ("train", "validation")],
            "default": True,
        },
    ]
    infos = {info["config_name"]: info for info in sources.card_of(pick_a_pic / "out")[0]["dataset_info"]}
    assert [(split["name"], split["num_examples"]) for split in infos["pairs"]["splits"]] == [
        ("train", 11),
        ("train_ties", 3),
    ]
    assert [(split["name"], split["num_examples"]) for split in infos["annotations"]["splits"]] == [("train", 24)]
    size = sum(path.stat().st_size for path in (pick_a_pic / "out" / "pairs").iterdir())
    assert infos["pairs"]["download_size"] == size
    builder = load_dataset_builder(str(world / "out"))
    assert builder.config.name == "pairs" and builder.info.features == instance_pair_features()


# ----- the Hub -----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return FakeHub(tmp_path, monkeypatch)


def test_annotations_alone_are_pushed_by_default(world, tmp_path, hub):
    """Without `--push_images`, only annotations and a card for them are pushed, with pictures of boxes alone, and earlier shards are
    deleted."""
    (hub.folder / "annotations").mkdir()
    (hub.folder / "annotations" / "train-00000-of-00002.parquet").write_bytes(b"of an earlier push")
    sources.build_pairs(world / "source", world / "annotations", tmp_path / "out", "--push_to_hub", REPO, "--private")
    assert [call["private"] for call in hub.created] == [True]
    assert hub.files == [
        "README.md",
        "annotations/train-00000-of-00001.parquet",
        "annotations/validation-00000-of-00001.parquet",
        *PICTURES,
    ]
    metadata, text = sources.card_of(hub.folder)
    assert [config["config_name"] for config in metadata["configs"]] == ["annotations"]
    assert "annotations, and no images" in text and "not ours to publish" in text
    assert f'load_dataset("{REPO}", "annotations", split="train")' in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(block)
    annotations = load_dataset(str(hub.folder), split="train")
    assert list(annotations) == list(load_annotations(world / "annotations", "train"))
    assert list(load_source(str(hub.folder))["train"]) == list(annotations)  # what `--dataset_name` reads
    assert rows(join_annotations(sources.pairs(24), annotations)) == rows(
        load_dataset(str(tmp_path / "out"), split="train")
    )


def test_images_that_were_built_are_pushed_as_they_are(pick_a_pic, tmp_path, hub):
    """With `--push_images` the Hub gets the folder, file by file."""
    flags = ("--push_to_hub", REPO, "--push_images")
    sources.build_pairs(pick_a_pic / "source", pick_a_pic / "annotations", tmp_path / "out", *flags)
    assert hub.files == sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    for name in hub.files:
        assert (hub.folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert hub.created[0].get("private") is None


def test_images_go_from_the_source_to_the_hub_without_a_copy(pick_a_pic, tmp_path, hub, monkeypatch):
    """With `--no_images --push_images`, rows are read one batch ahead of the upload, one file at a time is on the
    disk, and the pushed dataset equals the built one."""
    source, read, uploaded = sources.pick_a_pic(), [], []
    of_splits = [set(split["id"]) for split in load_dataset(str(pick_a_pic / "out")).values()]

    def generate(shards: list[int]):
        for shard in shards:
            for row in source.select(range(6 * shard, 6 * shard + 6)):
                read.append(row["ranking_id"])
                yield row

    def load_rows(args, find_columns):
        shards = {"shards": [0, 1, 2, 3]}
        stream = IterableDataset.from_generator(generate, features=source.features, gen_kwargs=shards)
        return stream, find_columns(source.column_names, None), None

    def on_upload(path: Path):
        assert list(hub.scratch.rglob("*.parquet")) == [path]
        uploaded.extend(int(row_id) for row_id in pq.read_table(path)["id"].to_pylist())
        split = next(ids for ids in of_splits if str(uploaded[-1]) in ids)
        assert len([row_id for row_id in set(read) - set(uploaded) if str(row_id) in split]) <= 2

    hub.on_upload = on_upload
    monkeypatch.setattr(common, "load_rows", load_rows)
    monkeypatch.setattr(common, "SHARD_BYTES", 1000)
    monkeypatch.setattr(common, "ROW_GROUP", 2)
    monkeypatch.setattr(join, "ROWS_AT_ONCE", 2)
    (hub.folder / "pairs").mkdir()
    (hub.folder / "pairs" / "train-00000-of-00001.parquet").write_bytes(b"of an earlier push")
    flags = ("--no_images", "--push_to_hub", REPO, "--push_images")
    sources.build_pairs(pick_a_pic / "source", pick_a_pic / "annotations", tmp_path / "out", *flags)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "annotations"]
    assert not list(hub.scratch.rglob("*.parquet"))
    assert len(read) == 48  # the source once for each split
    files = [f"pairs/train-{index:05d}.parquet" for index in range(6)]
    files += [f"pairs/train_ties-{index:05d}.parquet" for index in range(2)]
    assert hub.files == ["README.md", "annotations/train-00000-of-00001.parquet", *files]
    assert hub.commits == [
        [*files, "annotations/train-00000-of-00001.parquet", "README.md", "pairs/train-00000-of-00001.parquet"]
    ]
    pushed, built = load_dataset(str(hub.folder)), load_dataset(str(pick_a_pic / "out"))
    assert set(pushed) == set(built)
    for split in built:
        assert pushed[split].features == built[split].features
        assert rows(pushed[split]) == rows(built[split])
    metadata, text = sources.card_of(hub.folder)
    expected, expected_text = sources.card_of(pick_a_pic / "out")
    assert metadata["configs"] == expected["configs"]
    # Different are only the pictures, which are drawn of images on the disk, and the size of the files
    without, expected_without = (
        re.sub("## Examples.*?<details>|The files have .*?\n", "", card, flags=re.DOTALL)
        for card in (text, expected_text)
    )
    assert without == expected_without.replace('"out"', f'"{REPO}"').replace("# out", f"# {REPO}")
    assert "There are no pictures here" in text and "](images/" in expected_text
    annotations = load_dataset(str(hub.folder), "annotations", split="train")
    assert list(annotations) == list(load_annotations(pick_a_pic / "annotations"))


def test_a_push_from_a_source_that_lacks_rows_commits_none_of_them(world, tmp_path, hub):
    """Missing rows during a push raise an error, and nothing is committed, not the annotations either."""
    source = sources.save(
        tmp_path / "source", train=sources.pairs(24).select(range(20)), validation=sources.pairs(8, seed=1)
    )
    flags = ("--no_images", "--push_to_hub", REPO, "--push_images")
    with pytest.raises(ValueError, match="The split train has 24 annotated rows, but the source has only 20"):
        sources.build_pairs(source, world / "annotations", tmp_path / "out", *flags)
    assert hub.files == [] and hub.commits == []


# ----- the command -----


def test_the_command(world, tmp_path):
    """`python -m datasets_builders.pickapic_instance` builds the same rows in its own process, from a stream."""
    command = [sys.executable, "-m", "datasets_builders.pickapic_instance", "--dataset_streaming"]
    source = tmp_path / "source"
    source.mkdir()
    for split, pairs in load_splits(world).items():
        pairs.to_parquet(source / f"{split}.parquet")
    result = subprocess.run(
        command + sources.arguments(source, world / "annotations", tmp_path / "out"),
        cwd=Path(common.__file__).parents[1],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "pairs, train: 24 rows" in result.stdout and "annotations, validation: 8 rows" in result.stdout
    loaded = load_dataset(str(tmp_path / "out"), split="train")
    assert rows(loaded) == rows(load_dataset(str(world / "out"), split="train"))
