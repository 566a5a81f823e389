# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""An evaluation samples, scores and reports, and repeats no work."""

import json
import logging
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.evaluation.loras import save_lora
from trl_diffusion.evaluation import run
from trl_diffusion.evaluation.generate import png_of
from trl_diffusion.evaluation.kept_images import write_images
from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.evaluation.prompts import load_prompts
from trl_diffusion.evaluation.protocols import load_protocol
from trl_diffusion.metrics.fid import fid_from_features
from trl_diffusion.metrics.scorer import Scorer, open_image
from trl_diffusion.scripts.evaluate_models import (
    OF_ALL_IMAGES,
    SCORERS,
    EvaluateArguments,
    get_models,
    get_scorers,
    make_parser,
)
from trl_diffusion.scripts.judges import DetectorArguments, VLMArguments


PROMPTS = ["a red circle", "a cat and a dog", "a blue square"]
PROTOCOL = load_protocol(None, num_inference_steps=2, guidance_scale=2.0, images_per_prompt=2, height=32, width=32)


def brightness(image) -> float:
    return np.asarray(open_image(image), dtype=np.float64).mean()


class Brightness(Scorer):
    """Mean value of the pixels of an image."""

    name = "brightness"
    scored = 0

    def prepare(self, image):
        return brightness(image)

    def score_batch(self, prepared, prompts):
        Brightness.scored += len(prepared)
        return list(prepared)


class Means:
    """Replaces Inception by three features, the mean of each colour."""

    spec = "means_3"
    weights = {"means": "1"}

    def __init__(self, device=None):
        pass

    def __call__(self, images, batch_size=32, disable_tqdm=True):
        images = sorted(Path(images).glob("*.png")) if isinstance(images, str | Path) else images
        return torch.tensor(np.array([np.asarray(open_image(image)).mean(axis=(0, 1)) for image in images]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny pipelines, prompts, and a folder of reference images."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        tiny.sd_pipeline().save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "references").mkdir()
    for seed in range(5):
        tiny.image(seed).save(folder / "references" / f"{seed}.png")
    return folder


def evaluate(folder, output_dir, names=("first", "second"), limit=None, **settings):
    specs = [resolve_model(name, str(folder / name)) for name in names]
    prompts = load_prompts(folder / "prompts.txt", limit)
    scorers = {"brightness": Brightness}
    return run.evaluate_models(specs, prompts, PROTOCOL, scorers, output_dir, disable_tqdm=True, **settings)


def test_the_figures_are_those_of_the_images(folder, tmp_path, monkeypatch):
    """Means, win rates and FID are those of the written images, and every file in the report exists."""
    monkeypatch.setattr(run, "InceptionFeatures", Means)
    summary = evaluate(folder, tmp_path, corpus_metrics=("fid",), references=folder / "references", batch_size=2)
    files = {name: sorted((tmp_path / "images" / name).glob("*.png")) for name in ("first", "second")}
    assert [path.name for path in files["first"]] == [f"{p:05d}_{i}.png" for p in range(3) for i in range(2)]
    values = {name: np.array([brightness(path) for path in paths]) for name, paths in files.items()}
    for name in values:
        assert summary["scores"][name]["brightness"]["mean"] == pytest.approx(values[name].mean())
        expected = fid_from_features(Means()(files[name]), Means()(folder / "references"))
        assert summary["scores"][name]["fid"]["value"] == pytest.approx(expected)
        assert summary["scores"][name]["fid"]["full_name"] == "fid_means_3_n6"
    wins = (values["second"] > values["first"]) + (values["second"] == values["first"]) / 2
    assert summary["win_rates"]["second"]["brightness"]["win_rate"] == pytest.approx(wins.mean())
    assert summary["baseline"] == "first" and list(summary["models"]) == ["first", "second"]
    assert json.loads((tmp_path / "summary.json").read_text())["scores"] == summary["scores"]
    assert summary["settings"]["prompts"] | {"digest": "", "source": ""} == {
        "source": "",
        "revision": None,
        "digest": "",
        "number": 3,
    }
    report = (tmp_path / "report.md").read_text()
    for file in ("distributions.png", "win_rates.png", "gallery.html"):
        assert (tmp_path / file).stat().st_size > 1000 and f"({file})" in report
    table = pq.read_table(tmp_path / "scores.parquet")
    assert [(tmp_path / image).exists() for image in table["image"].to_pylist()] == [True] * 12


def test_nothing_is_done_twice(folder, tmp_path):
    """The same command samples and scores nothing; a new model or prompt is added without changing other scores."""
    Brightness.scored = 0
    evaluate(folder, tmp_path, names=["first"], limit=2)
    assert Brightness.scored == 4
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").rglob("*.png")}
    evaluate(folder, tmp_path, names=["first"], limit=2)
    assert Brightness.scored == 4
    extended = evaluate(folder, tmp_path)
    assert Brightness.scored == 12
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    afresh = evaluate(folder, tmp_path / "afresh")
    assert extended["scores"] == afresh["scores"] and extended["win_rates"] == afresh["win_rates"]


def test_images_drawn_elsewhere_are_compared_in_place(folder, tmp_path):
    """A folder of images is scored in place, with the scores of the model that it comes from."""
    drawn = evaluate(folder, tmp_path / "drawn", names=["first"])
    images = tmp_path / "drawn" / "images" / "first"
    specs = [resolve_model("elsewhere", str(images))]
    found = run.evaluate_models(
        specs, load_prompts(folder / "prompts.txt"), PROTOCOL, {"brightness": Brightness}, tmp_path / "found"
    )
    mean = found["scores"]["elsewhere"]["brightness"]["mean"]
    assert mean == drawn["scores"]["first"]["brightness"]["mean"]
    assert not (tmp_path / "found" / "images").exists()


def test_names_and_references_are_asked_for(folder, tmp_path):
    """Two models with the same name, and FID without references, are refused before sampling."""
    with pytest.raises(ValueError, match="Two models are called first"):
        evaluate(folder, tmp_path, names=["first", "first"])
    with pytest.raises(ValueError, match="fid needs `references`: pass a folder"):
        evaluate(folder, tmp_path, corpus_metrics=("fid",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["matplotlib", "torchmetrics"])
def test_missing_packages_are_named_before_anything_is_drawn(folder, tmp_path, monkeypatch, package):
    """Without a package of the extra, nothing is sampled, and the error names what to install."""
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(ValueError, match=rf'needs {package}: run `pip install "trl-diffusion\[evaluation\]"`'):
        evaluate(folder, tmp_path, corpus_metrics=("kid",), references=folder / "references")
    assert not list(tmp_path.iterdir())


# ---- The flags ----


def flags(*words: str) -> EvaluateArguments:
    return make_parser().parse_args_and_config(list(words))[0]


def test_models_of_the_flags(folder):
    """Names, bases of LoRAs and negative LoRAs are passed to the models; a negative LoRA without its model is
    refused."""
    (spec,) = get_models(flags("--models", f"mine={folder / 'first'}"))
    assert (spec.name, spec.path, spec.kind) == ("mine", str(folder / "first"), "pipeline")
    with pytest.raises(ValueError, match="`--negative_loras` names other, and `--models` has no such model"):
        get_models(flags("--models", f"mine={folder / 'first'}", "--negative_loras", "other=user/lora"))
    with pytest.raises(
        ValueError, match="`--negative_loras_on_base` names mine, and `--negative_loras` has nothing for"
    ):
        get_models(flags("--models", f"mine={folder / 'first'}", "--negative_loras_on_base", "mine"))


def test_a_sample_model_of_the_flags(folder, tmp_path, caplog):
    """LoRAs are drawn by it, with it alone as the baseline, and the report says so; without that baseline, or a LoRA, it is said."""
    save_lora(tiny.sd_pipeline(), tmp_path / "lora", size=1.0)
    first, second, lora = folder / "first", tmp_path / "turbo", tmp_path / "lora"
    tiny.sd_pipeline(seed=1).save_pretrained(second)
    words = ["--base_model", str(first), "--sample_model", str(second)]
    with pytest.raises(ValueError, match="`--sample_model` draws with LoRAs, and `--models` has none"):
        get_models(flags("--models", f"mine={first}", *words))
    with caplog.at_level(logging.WARNING):
        get_models(flags("--models", f"base={first}", f"mine={lora}", *words))
    assert f"which `--models` does not have by itself: put NAME={second} first" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        specs = get_models(flags("--models", f"turbo={second}", f"mine={lora}", *words))
    assert "by itself" not in caplog.text
    prompts = load_prompts(folder / "prompts.txt", 2)
    summary = run.evaluate_models(
        specs, prompts, PROTOCOL, {"brightness": Brightness}, tmp_path / "out", disable_tqdm=True
    )
    turbo, mine = summary["settings"]["models"].values()
    assert (mine["base"], mine["trained_on"]) == ("turbo", "first") and "trained_on" not in turbo
    assert mine["base_revision"] == turbo["revision"]
    report = (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    assert "- base: turbo" in report and "- trained_on: first" in report
    images = [sorted((tmp_path / "out" / "images" / name).glob("*.png")) for name in ("turbo", "mine")]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(*images, strict=True))


def test_every_metric_of_the_flags_has_its_scorer(monkeypatch):
    """Each metric of single images gets its scorer, on the CPU if requested."""
    names = [*SCORERS, "num_negative_attributes", "caption_match"]
    words = ["--metrics", *names, *OF_ALL_IMAGES, "--references", "folder", "--use_cpu", "--criteria", "painting"]
    args = flags("--models", "x", *words)
    assert args.corpus_metrics == OF_ALL_IMAGES
    scorers = get_scorers(args, VLMArguments(vlm="oracle"), DetectorArguments(detector="oracle"))
    assert list(scorers) == names
    asked = {}
    for name in SCORERS:
        scorer = getattr(import_module(f"trl_diffusion.metrics.{name}"), SCORERS[name])
        assert scorer.name == name
        asked.clear()
        monkeypatch.setattr(scorer, "__init__", lambda self, device=None: asked.update(device=device))
        assert isinstance(scorers[name](), scorer) and asked == {"device": "cpu"}
    for name in ("num_negative_attributes", "caption_match"):
        assert scorers[name]().name == name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"models": ["x"], "batch_size": 0}, "`--batch_size` must be at least 1, got 0"),
        ({"models": ["x"], "scoring_batch_size": 0}, "`--scoring_batch_size` must be at least 1, got 0"),
        ({}, "`--models` is missing"),
        (
            {"models": ["x"], "metrics": ["pickscore", "kid", "fid"]},
            "`--references` is missing: .* kid and fid compare",
        ),
    ],
)
def test_mistakes_in_the_flags(settings, message):
    """Mistakes in the flags are found before anything is launched."""
    with pytest.raises(ValueError, match=message):
        EvaluateArguments(**settings)


def test_images_of_one_colour_are_no_pictures(folder, tmp_path, monkeypatch, caplog):
    """They are named, counted and left out of every score: the means, win rates and FID are those of the other images."""
    monkeypatch.setattr(run, "InceptionFeatures", Means)
    settings = {"corpus_metrics": ("fid",), "references": folder / "references"}
    evaluate(folder, tmp_path)
    black = tmp_path / "images" / "second" / "00001_0.png"
    write_images({black: png_of(Image.new("RGB", (32, 32)))}, 0)
    summary = evaluate(folder, tmp_path, **settings)
    assert "1 of 6 images of second are of one colour: images/second/00001_0.png. They are not scored." in caplog.text
    others = [path for path in sorted(black.parent.glob("*.png")) if path != black]
    score = summary["scores"]["second"]["brightness"]
    assert score["num_scored"] == 5 and score["num_errors"] == 1
    assert score["errors"] == [{"image": "images/second/00001_0.png", "reason": "all of it is the colour (0, 0, 0)"}]
    table = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert {row["image"] for row in table if row["brightness"] is None} == {"images/second/00001_0.png"}
    expected = fid_from_features(Means()(others), Means()(folder / "references"))
    assert summary["scores"]["second"]["fid"]["value"] == pytest.approx(expected)
    assert "00001\\_0.png: all of it is the colour" in (tmp_path / "report.md").read_text()
    write_images({path: png_of(Image.new("L", (32, 32), 128)) for path in others}, 0)
    with pytest.raises(ValueError, match="6 of 6 images of second are of one colour: .* There is nothing to score"):
        evaluate(folder, tmp_path, **settings)


def test_images_that_are_not_finite_are_not_written(folder, tmp_path):
    """A VAE that overflows stops the run with the prompt and the way out, before a black image is written."""
    shutil.copytree(folder / "first", tmp_path / "overflows")
    path = tmp_path / "overflows" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.weight"].fill_(3e38)
    save_file(weights, path, metadata={"format": "pt"})
    shutil.copy(folder / "prompts.txt", tmp_path)
    with pytest.raises(
        ValueError,
        match="images have pixels that are not finite, such as the one of 'a red circle'.*bfloat16 or float32, or use a VAE",
    ):
        evaluate(tmp_path, tmp_path / "out", ("overflows",))
    assert not list((tmp_path / "out").rglob("*.png"))
