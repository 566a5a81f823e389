# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Datasets that the builders push arrive whole, replace what was there, and tell nothing of the machine."""

import ast
import getpass
import io
import json
import re
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from huggingface_hub import CommitOperationAdd, HfApi

from datasets_builders import common
from datasets_builders.pickapic_instance import PickapicInstance
from tests import tiny
from tests.datasets_builders import sources
from tests.datasets_builders.sources import rows
from tests.hub.card_rules import check_card
from tests.hub.stand_in import StandIn
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, instance_pair_features
from trl_diffusion.annotation.join import load_annotations
from trl_diffusion.annotation.run import MANIFEST
from trl_diffusion.quickstart.paintings import painting_dataset
from trl_diffusion.quickstart.world import preference_dataset


NAME = "user/pickapic-instance"
SECRET = "folder of somebody"  # in the path of everything that a builder reads
EXAMPLES = Path(__file__).parents[2] / "examples" / "scripts"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two splits of pairs with every kind of row, and their annotations."""
    folder = tmp_path_factory.mktemp("world") / SECRET
    train, validation = sources.pick_a_pic(), sources.pick_a_pic(9)
    source = sources.save(folder / "source", train=train, validation=validation)
    for split, pairs in (("train", train), ("validation", validation)):
        sources.annotate_pairs(pairs, folder / "annotations", split, tie_policy="keep", name=str(source))
    sources.build_pairs(source, folder / "annotations", folder / "out")
    return folder


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    """A commit that is tried again is so at once."""
    monkeypatch.setattr("trl_diffusion.hub.time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))


def push(world: Path, out: Path, *flags: str, name: str = NAME) -> None:
    sources.build_pairs(world / "source", world / "annotations", out, "--push_to_hub", name, *flags)


def tables(hub: StandIn, repo_id: str = NAME, revision: str = "main") -> list[str]:
    return [name for name in hub.files(repo_id, "dataset", revision) if name.endswith(".parquet")]


# ----- what arrives -----


def test_all_of_it_loads_and_streams(world, tmp_path, hub):
    """Both configurations and all splits have the rows and columns of the built folder, in memory and streamed, for a name
    without its user too; it is one commit."""
    push(world, tmp_path / "out", "--push_images", name="pickapic-instance")
    assert [commit.message for commit in hub.commits(NAME, "dataset")[1:]] == ["Upload pairs and annotations"]
    built = load_dataset(str(world / "out"))
    assert list(built) == ["train", "train_ties", "validation", "validation_ties"]
    for streaming in (False, True):
        pairs = load_dataset(NAME, streaming=streaming)
        annotations = load_dataset(NAME, "annotations", streaming=streaming)
        assert list(pairs) == list(built) and list(annotations) == ["train", "validation"]
        for split, dataset in pairs.items():
            assert dataset.features == instance_pair_features()
            assert rows(dataset) == rows(built[split])
        for split, dataset in annotations.items():
            expected = load_annotations(world / "annotations", split)
            assert dataset.features == expected.features and list(dataset) == list(expected)
    card = hub.files(NAME, "dataset")["README.md"].decode()
    assert f'load_dataset("{NAME}", split="train")' in card and f"# {NAME}" in card
    assert check_card(card, "dataset")[0] == [] and not hub.unknown


def test_attributes_arrive_with_their_names(tmp_path, hub):
    """Paintings come with class labels of the tree, in three splits, loaded and streamed, and with the tree."""
    sources.save(tmp_path / "source", train=sources.paintings())
    sources.annotate_paintings(sources.paintings(), tmp_path / "annotations")
    flags = ("--push_to_hub", "org/paintings", "--push_images", "--private")
    sources.build_paintings(tmp_path / "source", tmp_path / "annotations", tmp_path / "out", *flags)
    built = load_dataset(str(tmp_path / "out"))
    for streaming in (False, True):
        pushed = load_dataset("org/paintings", streaming=streaming)
        for split in ("train", "validation", "test"):
            assert pushed[split].features == built[split].features
            assert rows(pushed[split]) == rows(built[split])
    names = built["train"].features["positive_attributes"].feature.names
    assert (
        load_dataset("org/paintings", "annotations", split="test").features["negative_attributes"].feature.names
        == names
    )
    assert hub.files("org/paintings", "dataset")["criteria.yaml"] == Path(sources.CRITERIA).read_bytes()
    assert [facts.private for facts in hub.repositories] == [True]


def test_a_trainer_trains_on_what_was_pushed(world, tmp_path, hub):
    """A step on the loaded and on the streamed dataset gives the weights of a step on the built folder, and changes them."""
    push(world, tmp_path / "out", "--push_images")
    kinds = {
        "built": load_dataset(str(world / "out"), split="train"),
        "loaded": load_dataset(NAME, split="train"),
        "streamed": load_dataset(NAME, split="train", streaming=True),
    }
    settings = {**tiny.FAST, "max_steps": 1, "train_sampling_strategy": "sequential"}
    ends = {}
    for name, dataset in kinds.items():
        args = InstanceDPOConfig(str(tmp_path / name), resolution=32, **settings)
        trainer = InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=dataset)
        trainer.train()
        ends[name] = tiny.weights(trainer.model)
    assert tiny.max_difference(ends["built"], tiny.weights(tiny.sd_pipeline().unet)) > 0
    assert tiny.max_difference(ends["built"], ends["loaded"]) == 0
    assert tiny.max_difference(ends["built"], ends["streamed"]) == 0


def test_a_branch_a_token_and_a_private_repository(world, tmp_path, hub):
    """With a branch, `main` stays empty; with a token, it is the one that is used; what is private loads with a token alone."""
    hub.add_user("colleague", "hf_colleague", orgs=("lab",))
    flags = ("--push_images", "--hub_revision", "draft/2", "--hub_token", "hf_colleague", "--private")
    push(world, tmp_path / "out", *flags, name="lab/pairs")
    assert list(hub.files("lab/pairs", "dataset")) == [".gitattributes"]
    assert "README.md" in hub.files("lab/pairs", "dataset", "draft/2")
    assert {request.token for request in hub.requests} == {"hf_colleague", None}  # none for signed addresses
    pairs = load_dataset("lab/pairs", revision="draft/2", token="hf_colleague", split="train", streaming=True)
    assert rows(pairs) == rows(load_dataset(str(world / "out"), split="train"))
    with pytest.raises(Exception, match="doesn't exist|cannot be accessed|Not Found"):
        load_dataset("lab/pairs", revision="draft/2")


# ----- what was there before -----


def test_an_earlier_dataset_is_replaced_in_the_same_commit(world, tmp_path, hub):
    """More shards, another configuration, tables of `Dataset.push_to_hub` and other descriptions are gone; what is no dataset is
    kept; and at every commit the repository is one dataset."""
    api = HfApi()
    DatasetDict({split: Dataset.from_list([{"old": 1}] * 3) for split in ("train", "test")}).push_to_hub(NAME)
    Dataset.from_list([{"older": 2}]).push_to_hub(NAME, "annotations", split="train")
    kept = {"LICENSE": b"mine", "notes/plan.md": b"to do", "logo.png": b"png"}
    stale = {
        "pairs/train-00007-of-00008.parquet": b"cut",
        "pairs/metadata.jsonl": b"{}",
        "criteria.yaml": b"of other annotations",
        "dataset_infos.json": json.dumps({"default": {"features": {}}}).encode(),
        ".huggingface.yaml": b"configs:\n- config_name: old\n  data_files: data/*\n",
        "pickapic-instance.py": b"raise ValueError",
    }
    operations = [CommitOperationAdd(name, content) for name, content in (kept | stale).items()]
    api.create_commit(NAME, operations, commit_message="By hand", repo_type="dataset")
    before = len(hub.commits(NAME, "dataset"))
    push(world, tmp_path / "out", "--push_images")
    assert len(hub.commits(NAME, "dataset")) == before + 1
    expected = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {*hub.files(NAME, "dataset")} == {".gitattributes", *expected, *kept}
    assert {name: hub.files(NAME, "dataset")[name] for name in kept} == kept
    assert {*load_dataset(NAME)} == {"train", "train_ties", "validation", "validation_ties"}
    assert rows(load_dataset(NAME, split="train")) == rows(load_dataset(str(world / "out"), split="train"))

    push(world, tmp_path / "alone")  # without images: they are not left beside a card that says there are none
    assert {name.split("/")[0] for name in tables(hub)} == {"annotations"}
    assert list(load_dataset(NAME, split="train")) == list(load_annotations(world / "annotations", "train"))


def test_the_same_push_again_sends_nothing(world, tmp_path, hub):
    """Pushed once more, from the folder or as a stream, no large file is uploaded and no commit is made."""
    for number, flags in enumerate((("--push_images",), ("--push_images", "--no_images"))):
        for again in range(2):
            sent, commits = hub.uploaded_files, len(hub.commits(NAME, "dataset")) if again else 0
            push(world, tmp_path / f"{number}-{again}", *flags)
        assert hub.uploaded_files == sent and len(hub.commits(NAME, "dataset")) == commits


@pytest.mark.parametrize("flags", [(), ("--no_images",)], ids=["built", "streamed"])
def test_an_interrupted_push_leaves_the_old_dataset_and_goes_on(flags, world, tmp_path, hub, monkeypatch):
    """If the connection breaks within the upload of a shard, the old dataset is there; the same push then sends only what is
    missing, and all of the new one is there."""
    old = Dataset.from_list([{"old": 1}])
    old.push_to_hub(NAME)
    if flags:
        monkeypatch.setattr(common, "SHARD_BYTES", 20_000)
        monkeypatch.setattr(common, "ROW_GROUP", 2)
    sent, commits = hub.uploaded_files, len(hub.commits(NAME, "dataset"))
    if flags:  # one after the other: some are there when it breaks
        fail_after(hub, 3)
    else:
        hub.fail("PUT", "/store/", cut_after=500, times=10**6)
    with pytest.raises(ValueError, match=r"The push to the Hub failed: .* The dataset is saved in .*first\. "):
        push(world, tmp_path / "first", "--push_images", *flags)
    hub.faults.clear()
    arrived = hub.uploaded_files - sent
    assert len(hub.commits(NAME, "dataset")) == commits
    assert list(load_dataset(NAME, split="train")) == list(old)
    push(world, tmp_path / "second", "--push_images", *flags)
    large = [name for name in hub.files(NAME, "dataset") if name.endswith((".parquet", ".png"))]
    assert hub.uploaded_files - sent == len(large) and arrived == (3 if flags else 0)
    assert len(hub.commits(NAME, "dataset")) == commits + 1
    pushed = load_dataset(NAME, download_mode="force_redownload")
    for split, built in load_dataset(str(world / "out")).items():
        assert rows(pushed[split]) == rows(built)


def fail_after(hub: StandIn, number: int) -> None:
    """Lets all uploads but the first ones break."""
    hub.fail("PUT", "/store/", cut_after=500, times=10**6)
    fault, start = hub.faults[-1], hub.uploaded_files

    class Path:
        def search(self, path: str) -> bool:
            return "/store/" in path and hub.uploaded_files - start >= number

    fault.path = Path()


# ----- what goes wrong -----


@pytest.mark.parametrize("status", [401, 403, 409, 429, 500, 503])
@pytest.mark.parametrize("where", ["api/repos/create", "/commit/main", "objects/batch"])
@pytest.mark.parametrize("flags", [(), ("--no_images",)], ids=["built", "streamed"])
def test_an_error_is_one_line(status, where, flags, world, tmp_path, hub):
    """Whatever the Hub refuses, and wherever: the error is one line that says so, where the dataset is and what to do, with no
    token; the dataset is there, and nothing was committed."""
    if where == "api/repos/create" and status == 409:
        pytest.skip("says that the repository exists, which is no error")
    hub.fail("POST", where, status=status, times=100)
    push_flags = ("--push_images", "--hub_token", "hf_user", *flags)
    with pytest.raises(ValueError) as error:
        push(world, tmp_path / "out", *push_flags)
    text = str(error.value)
    assert "\n" not in text and "hf_user" not in text
    assert text.startswith("The push to the Hub failed: ") and str(status) in text
    assert f"The dataset is saved in {tmp_path / 'out'}." in text
    assert load_dataset(str(tmp_path / "out"), "annotations", split="train").num_rows == 24
    if hub.repositories:
        assert list(hub.files(NAME, "dataset")) == [".gitattributes"]


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 412}, {"lost": True}], ids=["busy", "conflict", "lost"])
def test_the_commit_of_a_stream_is_tried_again(world, tmp_path, hub, fault):
    """Hours of streaming are not lost to one answer of the Hub, and a commit whose answer was lost is not made twice."""
    Dataset.from_list([{"old": 1}]).push_to_hub(NAME, "annotations", split="old")
    before = len(hub.commits(NAME, "dataset"))
    hub.fail("POST", "/commit/main", **fault)
    push(world, tmp_path / "out", "--push_images", "--no_images")
    assert len(hub.commits(NAME, "dataset")) == before + 1
    assert not [name for name in hub.files(NAME, "dataset") if "old" in name]
    assert load_dataset(NAME, split="train").num_rows > 0


# ----- nothing of the machine -----


def texts(value: Any) -> Iterator[str]:
    """All texts within a value of a table, and all bytes as such."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, bytes):
        yield value.decode("latin-1")
    elif value is not None:
        yield str(value)


def test_nothing_of_the_machine_is_pushed(tmp_path, hub):
    """Neither folders, nor the user, the host, a server or the token are in a file, in a table or in the metadata of one: not with
    images as files of which one is missing, nor with a judge behind a server, nor of other files beside."""
    folder = tmp_path / SECRET
    (folder / "images").mkdir(parents=True)
    lines = []
    for index, row in enumerate(sources.pairs(6)):
        paths = {}
        for name in ("chosen", "rejected"):
            paths[name] = str(folder / "images" / f"{index} {name}.png")
            row[name].save(paths[name])
        lines.append({"id": row["id"], "prompt": row["prompt"], **paths})
    source = Dataset.from_list(lines).cast_column("chosen", Image()).cast_column("rejected", Image())
    source.save_to_disk(folder / "source")
    DatasetDict({"train": source}).save_to_disk(folder / "source")
    (folder / "images" / "2 chosen.png").unlink()
    sources.annotate_pairs(source, folder / "annotations", name=str(folder / "source"))
    (manifest,) = (folder / "annotations").glob(f"*/{MANIFEST}")
    content = json.loads(manifest.read_text())
    content["judge"]["model"] |= {"server": "http://gpu-node-7:8000/v1", "model": str(folder / "judge")}
    manifest.write_text(json.dumps(content))
    reason = next(reason for reason in load_annotations(folder / "annotations")["reason"] if reason)
    assert SECRET in reason  # there is something to leave out
    sources.build_pairs(
        folder / "source", folder / "annotations", folder / "out", "--push_to_hub", NAME, "--push_images", "--hub_token",
        "hf_user",
    )  # fmt: skip
    told = [SECRET, str(tmp_path), str(Path.home()), "gpu-node-7", "hf_user", "pytest-of"]
    told += [name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 4]
    files = hub.files(NAME, "dataset")
    for name, content in files.items():
        found = [name, content.decode("latin-1")]
        if name.endswith(".parquet"):
            file = pq.ParquetFile(io.BytesIO(content))
            found += texts({**(file.schema_arrow.metadata or {}), **(file.metadata.metadata or {})})
            found += texts(file.read().to_pylist())
        assert not [word for word in told for text in found if word in text], name
    table = pq.read_table(io.BytesIO(files["pairs/train-00000-of-00001.parquet"])).to_pylist()
    assert {row[column]["path"] for row in table for column in ("chosen", "rejected")} == {None} and len(table) == 5
    reasons = load_dataset(NAME, "annotations", split="train")["reason"]
    assert "2 chosen.png" in " ".join(reasons)


def test_files_beside_the_dataset_stay(world, tmp_path, hub, monkeypatch):
    """A file that somebody else puts into the folder while it is pushed is not pushed."""
    original = common.push

    def with_a_diary(folder, *args):
        (folder / "diary.txt").write_text("dear diary")
        (folder / "pairs.old").mkdir()
        (folder / "pairs.old" / "x.parquet").write_text("old")
        return original(folder, *args)

    monkeypatch.setattr(common, "push", with_a_diary)
    push(world, tmp_path / "out", "--push_images")
    assert not [name for name in hub.files(NAME, "dataset") if "diary" in name or "old" in name]


def test_the_builders_own_rows_have_no_places_either(world):
    """What a builder streams by itself has the reasons of what it pushes."""
    options = {"annotations_dir": str(world / "annotations"), "source": str(world / "source")}
    stream = PickapicInstance(config_name="annotations", **options).as_streaming_dataset("train")
    assert not [row for row in stream if "/" in row["reason"]]
    row = {
        "reason": "chosen: '/home/me/x.png' is missing",
        "dropped": [{"label": "a/b/c", "reason": "by http://10.0.0.1/v1"}],
    }
    assert common.public_reasons(row) == {
        "reason": "chosen: 'x.png' is missing",
        "dropped": [{"label": "a/b/c", "reason": "by (an address)"}],
    }


# ----- the example scripts -----


def run_script(script: str, *args) -> None:
    """Runs an example in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, args)])
        patch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def check_code(card: str) -> None:
    """All Python of a card can be read."""
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        ast.parse(block)


def test_annotated_pairs_are_pushed_with_a_card(tmp_path, hub):
    """annotate_pairs.py pushes, from any folder, what `InstanceDPOTrainer` trains on, with the card of the builder, to a branch of a
    private repository; the same command again continues, and sends nothing."""
    (tmp_path / "data").mkdir()
    pairs = preference_dataset(6, seed=0)
    pairs.remove_columns("instances").to_parquet(tmp_path / "data" / "train.parquet")
    flags = [
        "--dataset_name",
        tmp_path / "data",
        "--vlm",
        "oracle",
        "--detector",
        "oracle",
        "--output_dir",
        tmp_path / "out",
    ]
    flags += ["--push_to_hub", "org/my-pairs", "--private", "--hub_revision", "first", "--hub_token", "hf_user"]
    environment = hub.environment("hf_user", tmp_path / "home")
    command = [sys.executable, str(EXAMPLES / "annotate_pairs.py"), *map(str, flags)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 of 12 instances contradict their pair's label." in result.stdout and "Pushed to" in result.stdout
    sent = hub.uploaded_files
    run_script("annotate_pairs.py", *flags)
    assert hub.uploaded_files == sent
    assert [facts.private for facts in hub.repositories] == [True] and len(
        hub.commits("org/my-pairs", "dataset", "first")
    ) == 2
    pushed = load_dataset("org/my-pairs", revision="first", split="train")
    assert pushed.features == pairs.features and pushed["id"] == pairs["id"]
    assert [[i["preference"] for i in found] for found in pushed["instances"]] == [
        [i["preference"] for i in true] for true in pairs["instances"]
    ]
    card = hub.files("org/my-pairs", "dataset", "first")["README.md"].decode()
    check_code(card)
    assert "12 objects, 3 (25.0 %)" in card and str(tmp_path) not in card


def test_annotated_paintings_are_pushed_with_a_card(tmp_path, hub, capsys):
    """annotate_paintings.py finds the attributes of the quickstart's paintings, and pushes what CPO trains on, with its tree."""
    (tmp_path / "data").mkdir()
    paintings = painting_dataset(30, seed=0)
    paintings.select_columns(["id", "prompt", "image"]).to_parquet(tmp_path / "data" / "train.parquet")
    flags = ["--dataset_name", tmp_path / "data", "--vlm", "oracle", "--criteria", sources.CRITERIA]
    run_script("annotate_paintings.py", *flags, "--output_dir", tmp_path / "out", "--push_to_hub", "my-paintings")
    out = capsys.readouterr().out
    assert "30 of 30 images have attributes." in out and "Pushed to" in out
    joined = load_from_disk(tmp_path / "out" / "dataset")
    truth = {row["id"]: row for row in paintings.remove_columns("image")}
    pushed = load_dataset("user/my-paintings")
    assert {*pushed} == {"train", "validation", "test"}
    names = pushed["train"].features["positive_attributes"].feature
    found = [row for split in pushed.values() for row in split.remove_columns("image")]
    assert len(found) == len(joined) == 30
    for row in found:
        assert names.int2str(row["positive_attributes"]) == truth[row["id"]]["positive_attributes"]
        assert names.int2str(row["negative_attributes"]) == truth[row["id"]]["negative_attributes"]
    check_code(hub.files("user/my-paintings", "dataset")["README.md"].decode())


def test_a_push_that_cannot_be_is_refused_before_anything_is_annotated(tmp_path, hub):
    """What is no name of a repository is refused at once by both scripts."""
    for script in ("annotate_pairs.py", "annotate_paintings.py"):
        with pytest.raises(ValueError, match="`--push_to_hub` 'a b' is no name on the Hub"):
            run_script(script, "--dataset_name", tmp_path, "--output_dir", tmp_path / "out", "--push_to_hub", "a b")
    assert not (tmp_path / "out").exists()
