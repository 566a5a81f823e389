# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The runs behind the pages on healthy losses and on hyperparameters: how they are made, and that the pages say what they say."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from examples.health import runs
from examples.health.pictures import SHOWN_STEPS, error_ratios, grid_picture, grid_table, health_picture, health_table
from examples.health.runs import (
    BETAS,
    DEFAULTS,
    GRID,
    GRID_STEPS,
    LEARNING_RATES,
    RUNS,
    Run,
    Sizes,
    cell,
    collect,
    make_pairs,
    pair_trainer,
    run_once,
    strip_file,
    train,
)
from trl_diffusion.quickstart.experiment import FAST
from trl_diffusion.quickstart.sampling import load_pipeline


DOCS = Path(__file__).parents[2] / "docs" / "source"
LN_2 = math.log(2)


@pytest.fixture(scope="module")
def published() -> dict[str, dict]:
    return json.loads((DOCS / "benchmarks" / "health.json").read_text())["runs"]


@pytest.fixture
def tiny(tmp_path):
    return Sizes(str(tmp_path), num_rows=4, num_held_out=2, num_samples=3, batch_size=2, max_steps=2, eval_steps=2)


# ---- How runs are made ----


@pytest.mark.parametrize("name", ["healthy", "unstabilized"])
def test_a_run_starts_at_ln_2(tiny, name):
    """Before the first step policy and reference are one: the loss is ln 2, the margin 0, on training and on held-out rows."""
    record = train(name, RUNS[name], tiny)
    assert [entry["step"] for entry in record["eval"]] == [score["step"] for score in record["scores"]] == [0, 2]
    for first in (record["train"][0], record["eval"][0]):
        assert first["loss"] == pytest.approx(LN_2, abs=1e-5)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    for step in (0, 2):
        assert Image.open(strip_file(tiny.output_dir, name, step)).size == (3 * 32, 32)


def test_swapped_labels_negate_the_margins(tmp_path):
    """Of one and the same policy, pairs with their images exchanged have the negated margins and the other accuracies."""
    pairs, exchanged = (make_pairs(4, 0, Run("", swapped=swapped)) for swapped in (False, True))
    settings = FAST | DEFAULTS["scenes"] | {"output_dir": str(tmp_path), "max_steps": 1}
    trainer = pair_trainer(load_pipeline("base_pipeline"), pairs, pairs, settings, TrainerCallback())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    right, swapped = trainer.evaluate(), trainer.evaluate(exchanged)
    assert abs(right["eval_rewards/margins"]) > 0.1
    assert swapped["eval_rewards/margins"] == pytest.approx(-right["eval_rewards/margins"], rel=1e-2)
    assert swapped["eval_rewards/accuracies"] == pytest.approx(1 - right["eval_rewards/accuracies"])


def test_a_run_is_kept_until_its_settings_change(tiny, monkeypatch):
    """What is on the disk is not repeated; with other sizes it is done again."""
    calls = []

    def trained(name, run, sizes):
        calls.append(name)
        return {"eval": [{"step": 0, "loss": 1 / 3}]}

    monkeypatch.setattr(runs, "train", trained)
    for name in RUNS | GRID:
        run_once(name, tiny)
    run_once("healthy", tiny)
    assert calls == list(RUNS | GRID)
    run_once("healthy", Sizes(tiny.output_dir))
    assert calls[-1] == "healthy" and len(calls) == len(RUNS | GRID) + 1
    assert collect(tiny)["runs"]["healthy"]["eval"] == [{"step": 0, "loss": 0.333333}]


# ---- What the pages say ----


def test_the_pages_hold_the_tables_of_the_published_runs(published):
    """The tables of the documentation are those that the recorded runs give."""
    assert health_table(published) in (DOCS / "loss_health.md").read_text()
    assert grid_table(published) in (DOCS / "hyperparameters.md").read_text()


def test_pictures_show_the_runs(published, tmp_path):
    """The points of a curve are the held-out values of its run, grey ones those of the healthy run; a map has every cell."""
    for name in ("healthy", "too_fast"):
        for step in SHOWN_STEPS:
            file = strip_file(str(tmp_path), name, step)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (96, 32)).save(file)
    margins = health_picture(published, "too_fast", str(tmp_path)).axes[1]
    drawn = [list(line.get_ydata()) for line in margins.lines if line.get_marker() == "o"]
    assert drawn == [
        [entry["rewards/margins"] for entry in published[name]["eval"]] for name in ("healthy", "too_fast")
    ]
    maps = [panel for panel in grid_picture(published).axes if panel.images]
    assert len(maps) == 2
    for panel, what in zip(maps, ("clean", "match"), strict=True):
        cells = [
            next(score[what] for score in published[cell(rate, beta)]["scores"] if score["step"] == GRID_STEPS)
            for rate in LEARNING_RATES
            for beta in BETAS
        ]
        assert panel.images[0].get_array().flatten().tolist() == pytest.approx(cells)


def test_the_runs_went_as_the_page_says(published):
    """The shapes that the page on healthy losses describes are those of the published runs, each compared with the healthy one."""
    last = {name: record["eval"][-1] for name, record in published.items()}
    images = {name: record["scores"][-1] for name, record in published.items()}
    ratio = {name: error_ratios(published[name], "chosen")[-1] for name in RUNS}
    base = published["healthy"]["scores"][0]
    for name, record in published.items():
        start = record["eval"][0]
        assert start["loss"] == pytest.approx(LN_2, abs=1e-5) and abs(start["rewards/margins"]) < 1e-4
        assert start["rewards/accuracies"] == 0 or name in ("stabilized", "unstabilized")
    assert images["healthy"]["clean"] > base["clean"] + 0.2 and images["healthy"]["match"] == 1
    assert last["swapped"]["rewards/margins"] > last["healthy"]["rewards/margins"]
    assert last["swapped"]["rewards/accuracies"] == 1 and images["swapped"]["clean"] < base["clean"] - 0.4
    assert last["unstabilized"]["drift"] > 50 and last["stabilized"]["drift"] < 0.5
    assert last["unstabilized"]["rewards/accuracies"] > last["stabilized"]["rewards/accuracies"]
    assert images["unstabilized"]["match"] < 0.2 and images["stabilized"]["match"] == 1
    assert ratio["stabilized"] < 1 < min(ratio["healthy"], ratio["unstabilized"])
    assert images["too_slow"] == {**base, "step": 96} and last["too_slow"]["rewards/margins"] < 0.1
    assert last["too_slow"]["rewards/accuracies"] > 0.8
    for name in ("too_fast", "too_long"):
        assert last[name]["rewards/accuracies"] > 0.95 and last[name]["loss"] < 0.05
        margins = [entry["rewards/margins"] for entry in published[name]["eval"]]
        assert margins == sorted(margins)
    assert max(score["match"] for score in published["too_fast"]["scores"][1:]) < 0.7
    assert ratio["too_fast"] > 5 * ratio["healthy"] and last["too_fast"]["loss"] < last["healthy"]["loss"]
    early, best = published["too_long"]["eval"][1], published["too_long"]["scores"][1]
    assert early["step"] == best["step"] == 32
    assert best["clean"] > images["too_long"]["clean"] + 0.2 and best["match"] > images["too_long"]["match"] + 0.2
    assert early["rewards/margins"] < published["healthy"]["eval"][1]["rewards/margins"]
    assert round(error_ratios(published["too_long"], "chosen")[1]) == 17
    assert (
        images["fast"]["clean"] > 0.99 and images["fast"]["match"] > 0.99
    )  # the same learning rate with another beta
    for rate in LEARNING_RATES:
        errors = [error_ratios(published[cell(rate, beta)], "chosen")[2] for beta in BETAS]
        assert errors == sorted(errors, reverse=True)  # a larger beta holds the policy nearer to the reference
