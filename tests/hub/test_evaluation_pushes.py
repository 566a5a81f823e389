# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Evaluations that are pushed arrive whole as datasets, with a card that is true, and tell nothing of the machine."""

import getpass
import io
import json
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import markdown
import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value, load_dataset

from tests import tiny
from tests.hub.card_rules import check_card
from tests.hub.stand_in import StandIn
from trl_diffusion import push_evaluation
from trl_diffusion.data.pictures import upright_image
from trl_diffusion.evaluation import push
from trl_diffusion.evaluation.dataset_card import command_of, evaluation_card, licenses_of
from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.evaluation.prompts import load_prompts
from trl_diffusion.evaluation.protocols import load_protocol
from trl_diffusion.evaluation.push import cut, read_evaluation
from trl_diffusion.evaluation.run import evaluate_models
from trl_diffusion.metrics.scorer import Scorer, ScoringError, open_image
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.scripts.evaluate_models import main, make_parser


NAME = "user/compared"
SECRET = "folder of somebody"
HOSTILE = "a [x](javascript:1) | `code` <script>alert(1)</script> $x$ @me # head\n\n## big ![i](http://e/x.png) ~~a~~"
PROTOCOL = load_protocol(None, num_inference_steps=2, images_per_prompt=2)
PROMPTS = [
    {"id": "cat", "prompt": "a cat", "group": "animals"},
    {"id": "dog", "prompt": "a dog at /home/of/its/own", "group": "animals"},
    {"id": "hostile", "prompt": HOSTILE, "group": "| <b> /x/y/z"},
]


class Red(Scorer):
    """Mean red of an image, with weights in a folder."""

    name = "pickscore"

    def __init__(self, folder: Path):
        super().__init__("cpu")
        self.weights = {str(folder / "judge"): "sha256:1", "user/judge": "abc"}

    def prepare(self, image):
        return float(np.asarray(open_image(image))[..., 0].mean())

    def score_batch(self, prepared, prompts):
        return list(prepared)


class Blue(Red):
    """Mean blue; the darkest of an evaluation has none, because of a file and a server."""

    name, higher_is_better = "aesthetic", False

    def prepare(self, image):
        return float(np.asarray(open_image(image))[..., 2].mean())

    def score_batch(self, prepared, prompts):
        reason = f"no answer of http://gpu-node-7:8000/v1 to '/srv/{SECRET}/a.png' | `x` <b>"
        return [ScoringError(reason) if value == min(prepared) else value for value in prepared]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An evaluation of two folders of images, of which one holds files with metadata, and one image has no score."""
    folder = tmp_path_factory.mktemp("made") / SECRET
    for seed, name in enumerate(("first", "second")):
        (folder / name).mkdir(parents=True)
        for place, prompt in enumerate(PROMPTS):
            for index in range(2):
                image = tiny.image(100 * seed + 2 * place + index)
                path = folder / name / f"{prompt['id']}_{index}.png"
                if name == "first":
                    image.save(path)
                elif index:
                    exif = PIL.Image.Exif()
                    exif[PIL.Image.ExifTags.Base.Orientation], exif[PIL.Image.ExifTags.Base.Artist] = 6, SECRET
                    image.convert("RGB").save(path.with_suffix(".jpg"), exif=exif, quality=98)
                else:
                    info = PIL.PngImagePlugin.PngInfo()
                    info.add_text("workflow", f"/data/{SECRET}/model.safetensors")
                    image.save(path, pnginfo=info)
    (folder / "my prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    evaluate(folder)
    return folder


def evaluate(folder: Path, names: tuple[str, ...] = ("first", "second")) -> None:
    specs = [resolve_model(name, str(folder / name)) for name in names]
    scorers = {"pickscore": lambda: Red(folder), "aesthetic": lambda: Blue(folder)}
    prompts = load_prompts(folder / "my prompts.jsonl")
    evaluate_models(specs, prompts, PROTOCOL, scorers, folder / "evaluation", disable_tqdm=True, scoring_batch_size=64)


@pytest.fixture
def world(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / SECRET)


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    """A commit that is tried again is so at once."""
    monkeypatch.setattr("trl_diffusion.hub.time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))


def card_of(hub: StandIn, repo_id: str = NAME) -> str:
    return hub.files(repo_id, "dataset")["README.md"].decode()


# ----- what arrives -----


def test_all_of_it_loads_and_streams(world, hub):
    """There is a row for each image of each model, in the order of the scores, with its pixels and scores, in memory and streamed; and
    beside it exactly the tables, the plots, the picture and the card. It is one commit, for a name without its user too."""
    assert push_evaluation(world / "evaluation", "compared") == f"{hub.url}/datasets/{NAME}"
    assert [commit.message for commit in hub.commits(NAME, "dataset")[1:]] == ["Upload evaluation"]
    assert {*hub.files(NAME, "dataset")} == {
        *(
            ".gitattributes",
            "README.md",
            "data/train-00000-of-00001.parquet",
            "summary.json",
            "report.md",
            "tables.tex",
        ),
        *("distributions.png", "win_rates.png", "disputed.jpg"),
    }
    texts = {name: Value("string") for name in ("model", "prompt_id", "prompt", "group")}
    scores = {name: Value("float64") for name in ("pickscore", "aesthetic")}
    expected = pq.read_table(world / "evaluation" / "scores.parquet").to_pylist()
    for streaming in (False, True):
        dataset = load_dataset(NAME, split="train", streaming=streaming)
        assert dataset.features == Features(texts | {"index": Value("int64"), "image": Image()} | scores)
        found = list(dataset)
        assert len(found) == len(expected) == 12
        for row, given in zip(found, expected, strict=True):
            with PIL.Image.open(world / "evaluation" / given["image"]) as image:
                assert np.array_equal(np.asarray(upright_image(row["image"])), np.asarray(upright_image(image)))
            assert row | {"image": None} == given | {"image": None}
    assert [row["aesthetic"] for row in found].count(None) == 1
    stored = pq.read_table(io.BytesIO(hub.files(NAME, "dataset")["data/train-00000-of-00001.parquet"]))[
        "image"
    ].to_pylist()
    assert [image["path"] for image in stored][4:8] == ["hostile_0.png", "hostile_1.png", "cat_0.png", "cat_1.png"]
    assert stored[0]["bytes"] == (world / "first" / "cat_0.png").read_bytes()  # nothing had to be left out
    assert not hub.unknown and not list((world / "evaluation").glob(".push-*"))


def test_the_command_pushes_what_it_wrote(tmp_path, hub, capsys):
    """`evaluate --push_to_hub` pushes to a branch of a private repository of an organisation with the token that is given. An
    evaluation that is there is pushed by the same command, which then samples and scores nothing, or by the function."""
    hub.add_user("colleague", "hf_colleague", orgs=("lab",))
    base, expert = (shipped(name) for name in ("painting_base", "painting_expert"))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square")
    words = ["--models", f"base={base}", f"expert={expert}", "--base_model", str(base), "--use_cpu"]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--num_inference_steps", "2", "--metrics"]
    words += ["num_negative_attributes", "caption_match", "--vlm", "oracle", "--detector", "oracle"]
    words += ["--criteria", shipped("criteria.yaml"), "--output_dir", str(tmp_path / "evaluation")]
    main(*make_parser().parse_args_and_config(words))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "evaluation" / "images").rglob("*.png")}
    assert not hub.repositories and len(before) == 4
    flags = ["--push_to_hub", "lab/compared", "--private", "--hub_revision", "draft", "--hub_token", "hf_colleague"]
    main(*make_parser().parse_args_and_config([*words, *flags]))
    assert f"Pushed to {hub.url}/datasets/lab/compared/tree/draft, without gallery.html" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(hub.files("lab/compared", "dataset")) == [".gitattributes"] and hub.repositories[0].private
    pushed = load_dataset("lab/compared", revision="draft", token="hf_colleague", split="train")
    assert pushed["model"] == ["base"] * 2 + ["expert"] * 2 and pushed["prompt"][:2] == [
        "a red circle",
        "a blue square",
    ]
    card = hub.files("lab/compared", "dataset", "draft")["README.md"].decode()
    assert 'load_dataset("lab/compared", revision="draft", split="train")' in card
    assert "expert=path/to/painting_expert" in card and str(Path(base).parent) not in card
    commits = len(hub.commits("lab/compared", "dataset", "draft"))
    push_evaluation(tmp_path / "evaluation", "lab/compared", revision="draft", token="hf_colleague")
    assert len(hub.commits("lab/compared", "dataset", "draft")) == commits


def test_what_cannot_be_pushed_is_said_before_sampling(tmp_path, hub, monkeypatch):
    """A name of no repository, no token, and flags of a push without one are refused before a model is loaded."""
    words = ["--models", f"base={tmp_path}", "--output_dir", str(tmp_path / "evaluation")]
    with pytest.raises(ValueError, match="`--push_to_hub` 'a/b/c' is no name on the Hub"):
        main(*make_parser().parse_args_and_config([*words, "--push_to_hub", "a/b/c"]))
    for flags in (["--private"], ["--hub_revision", "x"], ["--hub_token", "x"]):
        with pytest.raises(ValueError, match=f"`{flags[0]}` needs a repository"):
            make_parser().parse_args_and_config([*words, *flags])
    monkeypatch.setattr("trl_diffusion.hub.get_token", lambda: None)
    with pytest.raises(
        ValueError, match="`--push_to_hub` needs a token of the Hub. There is no token: run `hf auth login`"
    ):
        main(*make_parser().parse_args_and_config([*words, "--push_to_hub", "a/b"]))
    assert not (tmp_path / "evaluation").exists()


# ----- shards, and what was there before -----


def test_shards_are_cut_by_size_and_always_alike(world, hub, monkeypatch):
    """Images are cut into files by their bytes, in order, and the same evaluation gives the same files: nothing is sent twice."""
    monkeypatch.setattr(push, "SHARD_BYTES", 8_000)
    monkeypatch.setattr(push, "ROW_GROUP", 2)
    push_evaluation(world / "evaluation", NAME)
    names = [name for name in hub.files(NAME, "dataset") if name.startswith("data/")]
    assert len(names) > 2 and names == [f"data/train-{i:05d}-of-{len(names):05d}.parquet" for i in range(len(names))]
    keys = [
        (row["model"], row["prompt_id"], row["index"]) for row in load_dataset(NAME, split="train", streaming=True)
    ]
    assert keys == [
        (model, prompt["id"], index) for model in ("first", "second") for prompt in PROMPTS for index in (0, 1)
    ]
    sent, commits = hub.uploaded_files, len(hub.commits(NAME, "dataset"))
    push_evaluation(world / "evaluation", NAME)
    assert hub.uploaded_files == sent and len(hub.commits(NAME, "dataset")) == commits


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([3, 3, 3, 3], [(0, 2), (2, 4)]),
        ([7], [(0, 1)]),
        ([7, 7, 1], [(0, 1), (1, 2), (2, 3)]),
        ([1, 1, 7, 5, 1], [(0, 2), (2, 3), (3, 5)]),
    ],
)
def test_ranges_of_at_most_six(sizes, expected):
    assert list(cut(sizes, 6)) == expected


def test_another_evaluation_replaces_it_in_one_commit(world, hub, monkeypatch):
    """With fewer models there are fewer shards and no plot of win rates, and nothing of the earlier one is left; a file of the
    user's is."""
    Dataset.from_list([{"old": 1}]).push_to_hub(NAME)
    monkeypatch.setattr(push, "SHARD_BYTES", 8_000)
    push_evaluation(world / "evaluation", NAME)
    assert "data/train-00000-of-00001.parquet" not in hub.files(NAME, "dataset")
    hub_files = {*hub.files(NAME, "dataset")}
    monkeypatch.setattr(push, "SHARD_BYTES", 10**9)
    evaluate(world, ("second",))
    commits = len(hub.commits(NAME, "dataset"))
    push_evaluation(world / "evaluation", NAME)
    assert len(hub.commits(NAME, "dataset")) == commits + 1
    assert "win_rates.png" in hub_files and "win_rates.png" not in hub.files(NAME, "dataset")
    assert set(load_dataset(NAME, split="train")["model"]) == {"second"}
    assert [name for name in hub.files(NAME, "dataset") if name.startswith("data/")] == [
        "data/train-00000-of-00001.parquet"
    ]
    assert "Win rates" not in card_of(hub) and "1 text-to-image model drew" in card_of(hub)


def test_an_interrupted_push_leaves_the_old_one_and_goes_on(world, hub):
    """If the connection breaks during an upload, the old dataset is there; pushed again, all of the new one is."""
    old = Dataset.from_list([{"old": 1}])
    old.push_to_hub(NAME)
    hub.fail("PUT", "/store/", cut_after=500, times=10**6)
    with pytest.raises(ValueError, match=r"The push to the Hub failed: .* The evaluation is saved in .*evaluation\. "):
        push_evaluation(world / "evaluation", NAME)
    assert list(load_dataset(NAME, split="train")) == list(old)
    assert not list((world / "evaluation").glob(".push-*"))
    hub.faults.clear()
    push_evaluation(world / "evaluation", NAME)
    assert load_dataset(NAME, split="train").num_rows == 12


@pytest.mark.parametrize("status", [401, 403, 409, 429, 500, 503])
@pytest.mark.parametrize("where", ["/commit/main", "objects/batch"])
def test_an_error_is_one_line(status, where, world, hub):
    """It says what the Hub said, where the evaluation is and what to do, and has no token; nothing was committed."""
    hub.fail("POST", where, status=status, times=10**6)
    with pytest.raises(ValueError) as error:
        push_evaluation(world / "evaluation", NAME, token="hf_user")
    text = str(error.value)
    assert text.startswith("The push to the Hub failed: ") and str(status) in text and "\n" not in text
    assert f"The evaluation is saved in {world / 'evaluation'}." in text and "hf_user" not in text
    assert list(hub.files(NAME, "dataset")) == [".gitattributes"]


# ----- folders that are no evaluation -----


def test_what_is_no_complete_evaluation_is_refused(world, hub):
    """A folder without scores, one that was stopped between scores and summary, one with a broken file, and one of which an image
    is gone: an error says so, and nothing is pushed."""
    folder = world / "evaluation"
    with pytest.raises(
        ValueError, match=r"first holds no complete evaluation, because it has no scores.parquet. Pass"
    ):
        push_evaluation(world / "first", NAME)
    scores = (folder / "scores.parquet").read_bytes()
    evaluate(world, ("second",))
    summary = (folder / "summary.json").read_bytes()
    (folder / "scores.parquet").write_bytes(scores)
    with pytest.raises(ValueError, match="are not of the same evaluation. Repeat the command that wrote it"):
        push_evaluation(folder, NAME)
    for broken in (b"{", b"[]", b"{}"):
        (folder / "summary.json").write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read|are not of the same evaluation"):
            push_evaluation(folder, NAME)
    (folder / "summary.json").write_bytes(summary)
    evaluate(world)
    (world / "second" / "dog_0.png").unlink()
    with pytest.raises(ValueError, match="dog_0.png of the evaluation is missing. Repeat the command that wrote it"):
        push_evaluation(folder, NAME)
    with pytest.raises(ValueError, match="`repo_id` 'a b' is no name on the Hub"):
        push_evaluation(folder, "a b")
    assert not hub.repositories


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


def test_nothing_of_the_machine_is_pushed(world, hub):
    """Neither folders, nor the user, the host, a server or the token are in a file or in the metadata of one: not of models and
    judges in folders, of images with metadata elsewhere, of reasons, and not of files that somebody else left there. Prompts and
    groups are as they were."""
    (world / "evaluation" / "diary.txt").write_text("dear diary")
    (world / "evaluation" / "data").mkdir()
    (world / "evaluation" / "data" / "diary.parquet").write_text("dear diary")
    written = (world / "evaluation" / "summary.json").read_text()
    assert SECRET in written and "gpu-node-7" in written  # there is something to leave out
    push_evaluation(world / "evaluation", NAME, token="hf_user")
    told = [SECRET, str(world), str(Path.home()), "gpu-node-7", "hf_user", "pytest-of", "diary", "/srv", ".push-"]
    told += [name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 4]
    for name, content in hub.files(NAME, "dataset").items():
        found = [name, content.decode("latin-1")]
        if name.endswith(".parquet"):
            file = pq.ParquetFile(io.BytesIO(content))
            found += texts({**(file.schema_arrow.metadata or {}), **(file.metadata.metadata or {})})
            found += texts(file.read().to_pylist())
        assert not [
            (word, text[max(0, text.index(word) - 60) :][:150]) for word in told for text in found if word in text
        ], name
    assert "no answer of (an address) to 'a.png'" in hub.files(NAME, "dataset")["summary.json"].decode()
    pushed = load_dataset(NAME, split="train")
    assert pushed["prompt"][::2] == [prompt["prompt"] for prompt in PROMPTS] * 2
    assert pushed["group"][::2] == [prompt["group"] for prompt in PROMPTS] * 2
    summary = json.loads(hub.files(NAME, "dataset")["summary.json"])
    assert summary["metrics"]["pickscore"]["weights"] == {"judge": "sha256:1", "user/judge": "abc"}
    assert {**summary["win_rates"]} == json.loads(written)["win_rates"]


# ----- the card -----


def test_the_card_is_true(world, hub, capsys):
    """Its metadata pass the Hub's rules, its pictures are there, its code prints the means of the summary, its table has their
    figures, an image without a score is counted with its reason, and its command is one that the parser takes."""
    push_evaluation(world / "evaluation", NAME)
    card, files = card_of(hub), hub.files(NAME, "dataset")
    assert check_card(card, "dataset")[0] == []
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", card)
    assert pictures == ["disputed.jpg", "distributions.png", "win_rates.png"] and {*pictures} <= {*files}
    summary = json.loads(files["summary.json"])
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    for model, scores in summary["scores"].items():
        for name, score in scores.items():
            assert found["scores"].groupby("model").mean()[name][model] == pytest.approx(score["mean"])
            assert f"{score['mean']:.1f} [" in card.replace("**", "")
    assert "(5/6)" in card or "(5/6)" in card.replace("\\", "")
    assert "Aesthetic of second: 1 of 6 images" in card or "Aesthetic of first: 1 of 6 images" in card
    assert "no answer of (an address) to 'a.png'" in card
    (command,) = re.findall(r"```bash\n(.*?)```", card, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    (args, *_) = make_parser().parse_args_and_config(words[2:])
    assert args.models == ["first=path/to/first", "second=path/to/second"]
    assert args.prompts == "path/to/my prompts.jsonl" and args.num_prompts == 3 and args.images_per_prompt == 2
    assert args.metrics == ["pickscore", "aesthetic"] and args.num_inference_steps == 2 and args.seed == 0
    with PIL.Image.open(io.BytesIO(files["disputed.jpg"])) as picture:
        assert picture.format == "JPEG" and picture.height > picture.width / 3


def test_a_hostile_prompt_is_text_in_the_card(world, hub):
    """Rendered, the card has no script, no link and no picture of a prompt, a group or a reason, and no heading of theirs."""
    push_evaluation(world / "evaluation", NAME)
    page = markdown.markdown(card_of(hub).split("---\n", 2)[2], extensions=["tables", "fenced_code"])
    assert "<script" not in page and "<b>" not in page and 'href="javascript' not in page
    assert re.findall(r'<img[^>]* src="([^"]*)"', page) == ["disputed.jpg", "distributions.png", "win_rates.png"]
    headings = re.findall(r"<h\d[^>]*>(.*?)</h\d>", page)
    expected = ["compared", "Results", "Scores", "Win rates", "Images without a score", "The most disputed images"]
    expected += ["What was compared", "How it was measured", "Load it", "Repeat it", "Limits", "License"]
    assert headings == expected
    assert "alert(1)" in page  # as text


def hub_summary(**protocol) -> dict[str, Any]:
    """A summary of models of the Hub."""
    flux, lora = "black-forest-labs/FLUX.1-dev", "user/flux lora"
    unset = {"negative_lora": None, "negative_lora_revision": None, "vae": None, "vae_revision": None}
    score = {"mean": 1.0, "standard_error": 0.1, "num_scored": 2, "num_errors": 0, "errors": []}
    fid = {"value": 12.3, "full_name": "fid_2048_n2"}
    return {
        "baseline": "base",
        "models": {"base": 2, "tuned": 2},
        "num_prompts": 2,
        "metrics": {name: {"higher_is_better": name != "fid", "weights": {}} for name in ("pickscore", "fid")},
        "scores": {name: {"pickscore": score, "fid": fid} for name in ("base", "tuned")},
        "groups": {},
        "win_rates": {
            "tuned": {
                "pickscore": {
                    "win_rate": 0.5,
                    "lower": 0.4,
                    "upper": 0.6,
                    "num_pairs": 2,
                    "num_ties": 0,
                    "left_out": 0,
                }
            }
        },
        "confidence": 0.95,
        "settings": {
            "prompts": {"source": "parti", "revision": "944b", "digest": "sha256:1", "number": 2},
            "protocol": {"name": "own", "num_inference_steps": 28, "seed": 0, **protocol},
            "models": {
                "base": {
                    "kind": "pipeline",
                    "path": flux,
                    "revision": "c0",
                    "base": None,
                    "base_revision": None,
                    **unset,
                },
                "tuned": {"kind": "lora", "path": lora, "revision": "c1", "base": flux, "base_revision": "c0", **unset}
                | {"negative_lora": "reversed", "negative_lora_revision": "sha256:2"},
            },
            "versions": {},
        },
    }


def test_the_command_names_what_the_models_are():
    """Hub ids stay, what is of the machine is a place; a distilled model that draws is the sample model."""
    summary = hub_summary(true_cfg_scale=2.0, scheduler=None)
    (args, *_) = make_parser().parse_args_and_config(shlex.split(command_of(summary).replace("\\\n", " "))[2:])
    assert args.models == ["base=black-forest-labs/FLUX.1-dev", "tuned=user/flux lora"]
    assert args.base_model == "black-forest-labs/FLUX.1-dev" and args.sample_model is None
    assert args.negative_loras == ["tuned=path/to/reversed"] and args.true_cfg_scale == 2 and args.scheduler is None
    assert args.prompts == "parti" and args.prompt_revision == "944b" and args.references == "path/to/references"
    assert args.metrics == ["pickscore", "fid"] and args.vae is None
    assert args.negative_loras_on_base == ["tuned"]  # as before there was a choice
    tuned = summary["settings"]["models"]["tuned"]
    tuned |= {"negative_lora_on": "aligned", "path": "user/lora/file.safetensors"}
    (args, *_) = make_parser().parse_args_and_config(shlex.split(command_of(summary).replace("\\\n", " "))[2:])
    assert args.negative_loras_on_base is None and args.models[1] == "tuned=user/lora/file.safetensors"
    tuned["path"] = "user/flux lora"
    summary["settings"]["models"]["tuned"]["trained_on"] = "user/plain"
    (args, *_) = make_parser().parse_args_and_config(shlex.split(command_of(summary).replace("\\\n", " "))[2:])
    assert args.sample_model == "black-forest-labs/FLUX.1-dev" and args.base_model == "user/plain"


def test_licences_of_the_models_are_named(world):
    """Known ones by name, others by their card; of what is not on the Hub there is none."""
    licenses = licenses_of(hub_summary()["settings"])
    assert {name: license and license.title for name, license in licenses.items()} == {
        "black-forest-labs/FLUX.1-dev": "FLUX.1 [dev] Non-Commercial License",
        "user/flux lora": None,
    }
    table, _ = read_evaluation(world / "evaluation")
    info = push.write_images(table, push.image_names(table), world / "evaluation", world / "data")
    card = str(evaluation_card(hub_summary(), info, NAME, None, {}, []))
    assert "- [black-forest-labs/FLUX.1-dev](https://huggingface.co/black-forest-labs/FLUX.1-dev): FLUX.1" in card
    assert "- user/flux lora: see its card" in card and "nateraw/parti-prompts" in card
    assert "FID scores all images of a model together" in card
    assert "size_categories:\n- n<1K\n" in card
    info.splits["train"].num_examples = 2_000_000  # of which no evaluation here has so many
    assert "size_categories:\n- 1M<n<10M\n" in str(evaluation_card(hub_summary(), info, NAME, None, {}, []))
