# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Datasets of the Hub know where they came from: by the genuine client, however they are loaded and changed."""

import json

import pytest
from datasets import Dataset, concatenate_datasets, load_dataset
from huggingface_hub import HfApi

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.cards.facts import DataFacts
from trl_diffusion.data.presets import training_columns
from trl_diffusion.data.sources import load_source
from trl_diffusion.trainer.provenance import data_facts


REPO = "user/TinyPairs"  # spelled so that no name of a folder tells it


@pytest.fixture
def pairs(hub) -> str:
    """Tiny pairs on the Hub, in two splits, with a card. Returns the commit."""
    for split, rows in (("train", 6), ("validation", 4)):
        tiny.pairs(rows).push_to_hub(REPO, split=split)
    path = "README.md"
    card = hub.files(REPO, "dataset")[path].decode().replace("---\n", "---\nlicense: cc-by-4.0\n", 1)
    HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo=path, repo_id=REPO, repo_type="dataset")
    return hub.commits(REPO, "dataset")[-1].sha


def test_loaded_rows(hub, pairs, tmp_path):
    """Rows, streams and members of what the commands load, prepared by a trainer and changed on the way."""
    found = DataFacts(REPO, None, "train", pairs, "cc-by-4.0", 6)
    stream = DataFacts(REPO, None, "train", pairs, "cc-by-4.0", None)
    rows = load_dataset(REPO, split="train")
    assert data_facts(rows, None) == found
    assert data_facts(load_source(REPO)["train"], REPO) == found
    assert data_facts(load_dataset(REPO, split="train", streaming=True), None) == stream
    streamed = load_source(REPO, streaming=True)["train"].shuffle(buffer_size=2).map(lambda row: row).take(2)
    assert data_facts(streamed, None) == stream
    changed = rows.map(lambda row: {"prompt": row["prompt"] + "!"}).filter(lambda row: True).shuffle(seed=1)
    assert data_facts(changed.select(range(3)).rename_column("prompt", "text"), None).revision == pairs
    halves = changed.train_test_split(2)
    assert data_facts(halves["test"], None).name == REPO
    both = concatenate_datasets([rows, load_dataset(REPO, split="validation")])
    assert data_facts(both, None) == DataFacts(REPO, None, None, pairs, "cc-by-4.0", 10)
    part = data_facts(load_dataset(REPO, split="train[:50%]"), None)
    assert (part.split, part.revision, part.num_rows) == ("train[:50%]", pairs, 3)
    mixed = concatenate_datasets([rows, tiny.pairs(2)])
    assert data_facts(mixed, None).name is None and data_facts(tiny.pairs(2), None).name is None

    args = InstanceDPOConfig(str(tmp_path / "out"), **tiny.FAST)
    for given in (rows, load_dataset(REPO, split="train", streaming=True)):
        trainer = InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=given, peft_config=tiny.lora())
        facts = data_facts(trainer.rows, None)
        assert (facts.name, facts.revision, facts.split) == (REPO, pairs, "train")


def test_an_older_commit_and_another_configuration(hub, pairs):
    """The commit is the one that was loaded, not the newest; a configuration is named."""
    tiny.pairs(3).push_to_hub(REPO, config_name="hard", split="train")
    newest = hub.commits(REPO, "dataset")[-1].sha
    assert newest != pairs
    assert data_facts(load_dataset(REPO, "default", split="train", revision=pairs), None).revision == pairs
    hard = data_facts(load_dataset(REPO, "hard", split="train"), None)
    assert (hard.config, hard.revision, hard.num_rows) == ("hard", newest, 3)
    streamed = data_facts(load_dataset(REPO, "hard", split="train", streaming=True), None)
    assert (streamed.config, streamed.revision) == ("hard", newest)


def test_rows_that_are_turned(hub):
    """Pairs with a label are joined again from two parts, and are still one split of one dataset."""
    rows = tiny.pairs(6)
    images = {"jpg_0": rows["chosen"][:], "jpg_1": rows["rejected"][:]}
    labelled = Dataset.from_dict(
        {"caption": rows["prompt"][:], **images, "label_0": [1.0, 0.0] * 3},
    )
    labelled = labelled.cast_column("jpg_0", rows.features["chosen"]).cast_column("jpg_1", rows.features["rejected"])
    labelled.push_to_hub("user/labelled", split="validation")
    loaded = training_columns(load_dataset("user/labelled", split="validation"), None)
    assert {"chosen", "rejected"} <= set(loaded.column_names)
    commit = hub.commits("user/labelled", "dataset")[-1].sha
    assert data_facts(loaded, None) == DataFacts("user/labelled", None, "validation", commit, None, 6)


def test_files_of_other_formats(hub):
    """JSON lines are read by another builder, whose streams keep their files in another way."""
    lines = "\n".join(json.dumps({"prompt": f"a {number}"}) for number in range(3)).encode()
    HfApi().create_repo("user/lines", repo_type="dataset")
    HfApi().upload_file(path_or_fileobj=lines, path_in_repo="data.jsonl", repo_id="user/lines", repo_type="dataset")
    commit = hub.commits("user/lines", "dataset")[-1].sha
    assert data_facts(load_dataset("user/lines", split="train"), None) == DataFacts(
        "user/lines", None, "train", commit, None, 3
    )
    streamed = load_dataset("user/lines", split="train", streaming=True)
    assert data_facts(streamed, None) == DataFacts("user/lines", None, "train", commit)
