# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The study's core holds on one seed, and each of four planted mistakes breaks it; its tables are what its runs say."""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import trl_diffusion.trainer.instance_dpo_trainer as instance_dpo
from examples.study import tuning
from examples.study.__main__ import StudyArguments, main
from examples.study.arms import ARMS, RUN, Sizes, folder_of, last_metrics, run_scene
from examples.study.objectives import WORLDS
from examples.study.runs import check_settings, collect, run_seed
from examples.study.tables import FIGURES, learning_rate, picture, table, tuning_table
from trl_diffusion.losses import pair_errors
from trl_diffusion.masks import instance_masks
from trl_diffusion.quickstart import iapo
from trl_diffusion.quickstart.models import MODELS
from trl_diffusion.quickstart.sampling import load_pipeline
from trl_diffusion.quickstart.world import preference_dataset


DOCS = Path(__file__).parents[2] / "docs" / "source"
SEED = 21


# ---- The core, and what breaks it ----


def check(runs: dict[str, dict]) -> None:
    """What must come out: each method does what it is for, and breaks nothing."""
    base, dpo, covering = runs["base"], runs["dpo"], runs["covering_0.0"]
    assert dpo["clean_a"] > base["clean_a"] + 0.1  # the label decides about A
    assert covering["clean_b"] > dpo["clean_b"] + 0.08  # of B it is wrong in 46 % of the pairs
    assert min(run[f"match_{shape}"] for run in (dpo, covering) for shape in "ab") > 0.97
    assert dpo["loss"] < math.log(2) - 0.02 and dpo["rewards/margins"] > 0.05  # the policy left the reference


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    return Sizes(str(tmp_path_factory.mktemp("study")), num_rows=1024, max_steps=80, num_samples=256)


@pytest.fixture(scope="module")
def healthy(sizes):
    return {name: run_scene(name, SEED, sizes) for name in ("base", "dpo", "covering_0.0")}


def swapped_errors(model_pred, ref_pred, target, terms):
    return pair_errors(model_pred, ref_pred, target, terms._replace(is_swapped=~terms.is_swapped))


def inverted_masks(boxes, judged, conflicts, height, width, w_neg, mask_overlap):
    return instance_masks(boxes, judged, judged & ~conflicts, height, width, w_neg, mask_overlap)


def unresized_masks(boxes, judged, conflicts, height, width, w_neg, mask_overlap):
    """On the pixels' grid, of which the latents' shape cuts out the corner."""
    masks = instance_masks(boxes, judged, conflicts, 4 * height, 4 * width, w_neg, mask_overlap)
    return masks[:, :height, :width]


@pytest.mark.slow
def test_the_core_holds(healthy):
    """Diffusion-DPO makes A clean more often, IAPO also B, both show what the prompt names, and the loss falls below ln 2."""
    check(healthy)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm, name, mistake",
    [
        ("dpo", "pair_errors", swapped_errors),
        ("covering_0.0", "instance_masks", inverted_masks),
        ("covering_0.0", "instance_masks", unresized_masks),
    ],
)
def test_a_planted_mistake_breaks_the_core(healthy, sizes, monkeypatch, one_thread, arm, name, mistake):
    """Chosen and rejected swapped, preferences of instances inverted, masks not resized: the images show it."""
    monkeypatch.setattr(instance_dpo, name, mistake)
    with pytest.raises(AssertionError):
        check(healthy | {arm: run_scene(arm, SEED, sizes)})


@pytest.mark.slow
@pytest.mark.parametrize("thawed", [False, True])
def test_a_reference_that_moves_breaks_the_core(healthy, sizes, monkeypatch, one_thread, thawed):
    """A reference that is the policy itself leaves the loss at ln 2 and the margins at 0, whatever the images show."""

    @contextmanager
    def moving(self, model):
        with torch.no_grad():
            yield model

    if thawed:
        monkeypatch.setattr(instance_dpo.InstanceDPOTrainer, "reference", moving)
    pairs = preference_dataset(sizes.num_rows, seed=SEED)
    settings = {"output_dir": sizes.output_dir, "seed": SEED, "max_steps": sizes.max_steps, "w_neg": 1.0}
    trained = last_metrics(iapo.train(load_pipeline(MODELS["unet"].scenes), pairs, settings))
    if thawed:
        assert trained["rewards/margins"] == 0 and trained["loss"] == pytest.approx(math.log(2))
        with pytest.raises(AssertionError):
            check(healthy | {"dpo": healthy["dpo"] | trained})
    else:
        check(healthy | {"dpo": healthy["dpo"] | trained})


# ---- The tables ----


def study_of(values: dict[str, list[float]], world: str) -> dict:
    """A study in which every figure of an arm is its values."""
    figures = FIGURES[world][0]
    runs = [
        {"arm": name, "seed": seed, **dict.fromkeys(figures, values.get(name, [0.5, 0.7])[seed])}
        for name in ARMS["unet"][world]
        for seed in range(2)
    ]
    return {"settings": {}, "runs": {world: runs}}


@pytest.mark.parametrize("world", RUN)
def test_a_table_holds_mean_deviation_and_paired_difference(world):
    """Means and standard deviations over the seeds; differences are taken seed by seed, with their standard error."""
    figures, reference, _ = FIGURES[world]
    lines = table(study_of({reference: [0.25, 0.75], "base": [0.5, 1.5]}, world), world).splitlines()
    base, compared = (
        next(line for line in lines if line.startswith(f"| {ARMS['unet'][world][n].title} |"))
        for n in ("base", reference)
    )
    cells = [cell.strip() for cell in base.strip("|").split("|")]
    # mean 1, deviation sqrt(0.5); differences 0.25 and 0.75: mean 0.5, deviation sqrt(0.125), error a sqrt(2)-th of it
    assert cells == ["base", *["1.000 ± 0.707"] * len(figures), "+0.500 ± 0.250"]
    assert compared.endswith("|  |")
    assert len(lines) == 2 + len(ARMS["unet"][world])
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("world", RUN)
def test_the_picture_shows_every_run(world):
    """A panel for each score, with a point for every arm and seed at its value."""
    study = study_of({"base": [0.1, 0.2]}, world)
    panels = picture(study, world).axes
    assert len(panels) == len(FIGURES[world][0])
    for panel in panels:
        points = [line for line in panel.lines if line.get_linestyle() == "None"]
        assert len(points) == len(ARMS["unet"][world])
        assert sorted(points[0].get_xdata()) == [0.1, 0.2]


def test_runs_are_kept(tmp_path, one_thread, monkeypatch):
    """A run that is on the disk is not repeated, and what is collected are the runs."""
    sizes = Sizes(str(tmp_path), num_rows=8, max_steps=1, num_samples=1)
    calls = []

    def run(name, seed, sizes):
        calls.append(name)
        return {"clean_a": len(calls)}

    for world in list(RUN):
        monkeypatch.setitem(RUN, world, run)
        run_seed(world, 1, sizes)
    assert calls == [name for arms in ARMS["unet"].values() for name in arms]
    Path(folder_of("scenes", "dpo", 1, str(tmp_path)) + ".json").unlink()
    run_seed("scenes", 1, sizes)
    assert calls[-1] == "dpo" and len(calls) == 1 + sum(map(len, ARMS["unet"].values()))
    runs = collect([1], sizes)["runs"]["scenes"]
    assert [run["arm"] for run in runs] == list(ARMS["unet"]["scenes"])
    assert {run["clean_a"] for run in runs if run["arm"] == "dpo"} == {len(calls)}


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    """A folder keeps its settings, and other settings are refused with both of them named."""
    check_settings(Sizes(str(tmp_path), 2048, 110, 512))
    check_settings(Sizes(str(tmp_path), 2048, 110, 512))
    with pytest.raises(ValueError, match="'max_steps': 110.*'max_steps': 5.* choose another `--output_dir`"):
        check_settings(Sizes(str(tmp_path), 2048, 5, 512))


@pytest.mark.parametrize("model", ARMS)
def test_adapters_are_trained_before_images_are_drawn_with_them(model):
    """The arms of a study run in their order, and those of NPO need the adapters of others."""
    trained = set()
    for name, arm in ARMS[model]["paintings"].items():
        needed = {*arm.negative} | ({arm.positive} if arm.positive else set())
        assert needed <= trained, name
        trained |= {name} if arm.settings is not None else set()


@pytest.mark.parametrize("file", ["study.json", "study_flow.json"])
@pytest.mark.parametrize("world", RUN)
def test_the_page_holds_the_tables_of_the_published_runs(world, file):
    """The tables of the documentation are those that the recorded runs give."""
    study = json.loads((DOCS / "benchmarks" / file).read_text())
    assert table(study, world) in (DOCS / "study.md").read_text()


@pytest.mark.parametrize("world", WORLDS)
def test_the_page_holds_the_tables_of_the_published_objectives(world):
    """The same for the objectives; every arm ran with every seed, at the learning rate that the published grid chooses."""
    study = json.loads((DOCS / "benchmarks" / "study_objectives.json").read_text())
    assert table(study, world) in (DOCS / "study.md").read_text()
    tuned, place = study["tuning"][world], WORLDS[world]
    base = next(run for run in tuned if run["arm"] == "base")
    for name, arm in place.arms.items():
        assert sorted(run["seed"] for run in study["runs"][world] if run["arm"] == name) == study["settings"]["seeds"]
        if arm.is_tuned:
            tried = {run["learning_rate"]: run for run in tuned if run["arm"] == name}
            chosen, best = learning_rate(study, world, name), tuning.best_of(place, tried, base)
            assert place.goodness(tried[chosen]) == place.goodness(tried[best])  # two may be as good


# ---- Objectives at their own learning rates ----


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """Runs that train nothing: the scores follow from the arm and the power of its learning rate."""

    def start(score):
        def run(world, name, seed, rate, sizes):
            place = WORLDS[world]
            power = None if rate is None else round(math.log(rate / place.learning_rate, tuning.STEP))
            record = {"arm": name, "seed": seed} | score(name, power)
            tried.append((name, power))
            return record if rate is None else record | {"learning_rate": rate}

        monkeypatch.setattr(tuning, "run", run)
        return tried

    tried = []
    return start


SMALL = Sizes("unused", num_rows=8, max_steps=1, num_samples=8)


def scene(clean, match=1.0):
    return {"clean_a": clean, "clean_b": clean, "match_a": 1.0, "match_b": match}


def powers_of(tried, name):
    return [power for arm, power in tried if arm == name]


def test_the_best_rate_inside_the_grid_is_chosen(scored):
    """Three rates are tried where the middle one is the best."""
    tried = scored(lambda name, power: scene(0.5 if power is None else 0.9 - 0.1 * abs(power)))
    assert tuning.tune("scenes", "dpo", SMALL) == WORLDS["scenes"].learning_rate
    assert powers_of(tried, "dpo") == [-1, 0, 1]


@pytest.mark.parametrize("peak, powers", [(2, [-1, 0, 1, 2, 3]), (-2, [-1, 0, 1, -2, -3]), (9, [-1, 0, 1, 2, 3, 4])])
def test_the_grid_grows_until_the_best_is_inside(scored, peak, powers):
    """It grows on the side of the best, by a factor of three each time, and it ends."""
    tried = scored(lambda name, power: scene(0.5 if power is None else 0.9 - 0.05 * abs(power - peak)))
    chosen = tuning.tune("scenes", "dpo", SMALL)
    assert powers_of(tried, "dpo") == powers
    assert chosen == pytest.approx(WORLDS["scenes"].learning_rate * 3.0 ** min(peak, tuning.MAX_POWER))


def test_a_rate_that_loses_the_prompt_is_not_chosen(scored):
    """However clean its images are: the match may be 0.01 below the base's, not 0.02; if all lose it, the best match decides."""
    match = {-1: 1.0, 0: 0.99, 1: 0.98}
    scored(lambda name, power: scene(0.5) if power is None else scene(0.7 + 0.1 * power, match.get(power, 0.5)))
    assert tuning.tune("scenes", "dpo", SMALL) == WORLDS["scenes"].learning_rate
    scored(lambda name, power: scene(0.5) if power is None else scene(0.7 + 0.1 * power, 0.8 - 0.1 * abs(power)))
    assert tuning.tune("scenes", "dpo", SMALL) == WORLDS["scenes"].learning_rate


def test_safeguards_run_where_plain_dpo_breaks(scored):
    """At the smallest rate of the grid at which fewer than nine in ten match; an arm that follows another takes its rate."""
    scored(lambda name, power: scene(0.5) if power is None else scene(0.6, 1.0 if power < 3 else 0.6))
    broken = pytest.approx(27 * WORLDS["scenes"].learning_rate)
    for name in ("none", "sdpo_0.6", "sdpo_0.9", "anchor", "smoothing"):
        assert tuning.rate_of("scenes", f"breaking_{name}", SMALL) == broken
    assert tuning.rate_of("scenes", "base", SMALL) is None


def test_each_loss_has_an_arm_with_instances_beside_one_without():
    """The two differ in their masks and in nothing else."""
    arms = WORLDS["scenes"].arms
    for loss in ("ipo", "hinge", "mapo", "dspo", "dmpo"):
        plain, masked = arms[loss].settings, arms[f"{loss}_covering"].settings
        assert plain["loss_type"] == masked["loss_type"] == loss
        assert masked == plain | {"w_neg": 0.0, "mask_overlap": "covering"} and plain["w_neg"] == 1.0


def test_the_tables_of_objectives_name_the_learning_rates(scored):
    """A column in the table of the seeds; in that of the tuning, the chosen in bold, what loses the prompt in parentheses."""

    def score(name, power):
        figures = dict.fromkeys(FIGURES["scenes"][0], 1.0)
        return figures | scene(
            0.5 if power is None else 0.75 + 0.125 * power, 1.0 if power is None or power < 1 else 0.9
        )

    scored(score)
    place = WORLDS["scenes"]
    tuned = [tuning.run("scenes", "base", 10, None, SMALL)]
    tuned += [tuning.run_power("scenes", "dpo", power, SMALL) for power in (-1, 0, 1)]
    runs = [
        tuning.run("scenes", name, seed, place.learning_rate if arm.train else None, SMALL)
        for name, arm in place.arms.items()
        for seed in (1, 2)
    ]
    study = {"settings": {"arms": "objectives"}, "tuning": {"scenes": tuned}, "runs": {"scenes": runs}}
    assert "| Diffusion-DPO | 0.625 | **0.750** | (0.875) |" in tuning_table(study, "scenes").splitlines()
    lines = table(study, "scenes").splitlines()
    assert lines[0].startswith("| arm | learning rate | A clean |")
    assert lines[2].startswith("| base |  | 0.500 ± 0.000 |")
    assert lines[3].startswith("| Diffusion-DPO | 3.0e-05 | 0.750 ± 0.000 |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


@pytest.mark.parametrize(
    "settings, message",
    [({"model": "flow"}, "on the UNet only, not with `--model flow`"), ({"seeds": [9, 10]}, "Seed 10 chooses")],
)
def test_what_objectives_cannot_be_is_said(tmp_path, settings, message):
    """Another model, and the seed that chooses the learning rates among those that compare."""
    with pytest.raises(ValueError, match=message):
        main(StudyArguments(output_dir=str(tmp_path), arms="objectives", **settings))


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_every_objective_runs(world, tmp_path, one_thread, monkeypatch):
    """Each arm trains and generates images, adapters in either branch included, and a run on the disk is not repeated."""
    sizes = Sizes(str(tmp_path), num_rows=64, max_steps=2, num_samples=8)
    rate = WORLDS[world].learning_rate
    monkeypatch.setattr(tuning, "tune", lambda *_: rate)
    monkeypatch.setattr(tuning, "breaking_rate", lambda *_: rate)
    tuning.run_seed(world, 1, sizes)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "objectives" / world).glob("*.json")}
    assert len(kept) == len(WORLDS[world].arms)
    assert all(0 <= WORLDS[world].match(json.loads(file.read_text())) <= 1 for file in kept)
    tuning.run_seed(world, 1, sizes)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
