# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""From an evaluation's summary to what a card says of it: intervals, the arm, the base."""

import json
import logging
import math

import pytest
from huggingface_hub import HfApi

from tests import tiny
from tests.evaluation.loras import save_lora
from tests.evaluation.test_report import DOWN, UP, table_of
from tests.hub.conftest import hub  # noqa: F401
from trl_diffusion.cards.arms import NOT_COMPARED, NOT_COMPARED_PREFIXES, OF_THE_MASK, training_record
from trl_diffusion.cards.facts import DataFacts, ModelFacts, read_evaluation_facts, write_facts
from trl_diffusion.evaluation.card import evaluation_facts, t_quantile
from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.evaluation.report import summarize
from trl_diffusion.trainer.run_record import NO_MATTER


def model_facts(
    trainer="InstanceDPOTrainer", method="IAPO", base="user/base", recipe=None, **hyperparameters
) -> ModelFacts:
    return ModelFacts(
        name="mine", trainer=trainer, method=method, unit="pairs", tags=[], paper={"title": "A paper"}, pipeline_class="StableDiffusionPipeline",
        resolution=32, loading_arguments="", call_arguments="", example_prompt="a cat", script="instance-dpo", is_lora=True,
        is_flow=False, base=base, data=DataFacts("user/pairs", revision="c0ffee", num_rows=8), recipe=recipe or {},
        hyperparameters={"learning_rate": 1e-4} | hyperparameters,
    )  # fmt: skip


def iapo(w_neg=0.0, recipe=None, **hyperparameters) -> dict:
    return training_record(model_facts(recipe=recipe, w_neg=w_neg, beta=2000, **hyperparameters))


def record(name, training=None, kind="lora", **further) -> dict:
    found = {"kind": kind, "path": f"user/{name}", "revision": "abc", "base": "user/base" if kind == "lora" else None}
    return found | ({"training": training} if training else {}) | further


BASE = record("base", kind="pipeline")
PROMPTS = {"source": "parti", "revision": "1234", "digest": "sha256:1", "number": 3}


def summary_of(models: dict[str, dict], scores=None, metrics=None, groups=None) -> dict:
    """A summary of models with these records. Without scores, a score a prompt, alike for all."""
    scores = scores or {name: {"pickscore": [1.0, 2.0, 3.0]} for name in models}
    settings = {"prompts": PROMPTS, "protocol": {"seed": 0}, "models": models, "versions": {"torch": "2.6"}}
    return summarize(table_of(scores, metrics or {"pickscore": UP}, groups), settings)


def with_images(values: dict[str, list[list[float | None]]]) -> dict:
    """A summary of models with several images a prompt."""
    import pyarrow as pa

    from trl_diffusion.evaluation.scores import IMAGES_SCHEMA

    rows = [
        {"model": model, "prompt_id": f"p{p}", "prompt": "a cat", "group": None, "index": i, "image": f"{p}-{i}.png", "pickscore": v}
        for model, prompts in values.items()
        for p, images in enumerate(prompts)
        for i, v in enumerate(images)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA.append(pa.field("pickscore", pa.float64())))
    return summarize(table.replace_schema_metadata({"metrics": json.dumps({"pickscore": UP})}), {})


# ---- Intervals ----


@pytest.mark.parametrize(
    "degrees, expected",
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (9, 2.262),
        (30, 2.042),
        (99, 1.984),
        (100, 1.984),
        (10**4, 1.960),
    ],
)
def test_quantiles_are_those_of_the_tables(degrees, expected):
    """Student's t at 95 %, to the three decimals of printed tables."""
    assert t_quantile(0.95, degrees) == pytest.approx(expected, abs=6e-4)


def test_quantiles_in_closed_form():
    """One degree of freedom is Cauchy's distribution, tan(pi c / 2); two have c sqrt(2 / (1 - c^2))."""
    for confidence in (0.5, 0.8, 0.95, 0.99):
        assert t_quantile(confidence, 1) == pytest.approx(math.tan(math.pi * confidence / 2), rel=1e-9)
        assert t_quantile(confidence, 2) == pytest.approx(confidence * math.sqrt(2 / (1 - confidence**2)), rel=1e-9)


def test_the_interval_of_a_mean():
    """Of 1, 2, 3: the mean is 2, the standard error sqrt((1 + 0 + 1) / 2 / 3), and t with 2 degrees of freedom 4.3027."""
    facts = evaluation_facts(summary_of({"base": BASE, "iapo": record("iapo")}), "iapo")
    score = facts.scores["base"]["pickscore"]
    half = 4.302652729749464 * math.sqrt((1 + 0 + 1) / 2 / 3)
    assert (score.value, score.number, score.missing) == (2, 3, 0)
    assert [score.lower, score.upper] == pytest.approx([2 - half, 2 + half], rel=1e-9)


def test_the_interval_of_several_images_a_prompt():
    """
    Of 1, 3 and 5, 9: the residuals of the two prompts are -5 and 5, so SE = sqrt(2 / 1 * 50) / 4 = 2.5, and there is one degree of
    freedom, t = 12.706, however many images there are.
    """
    score = evaluation_facts(with_images({"a": [[1, 3], [5, 9]]}), "a").scores["a"]["pickscore"]
    assert score.value == 4.5 and [score.lower, score.upper] == pytest.approx(
        [4.5 - 2.5 * 12.7062, 4.5 + 2.5 * 12.7062], rel=1e-5
    )


def test_one_prompt_has_no_interval():
    """Two images of one prompt tell nothing of other prompts."""
    facts = evaluation_facts(with_images({"base": [[1, 3]], "a": [[2, 5]]}), "a")
    for score in (facts.scores["a"]["pickscore"], facts.win_rates["a"]["pickscore"]):
        assert score.value is not None and score.lower is None and score.upper is None
    assert facts.scores["a"]["pickscore"].value == 3.5 and facts.win_rates["a"]["pickscore"].value == 1


def test_missing_scores():
    """They are counted, and prompts without any are no degree of freedom: 1, 2 of three prompts have t = 12.706; no score, no value."""
    scores = {"base": {"pickscore": [1.0, 2.0, None]}, "a": {"pickscore": [None, None, None]}}
    facts = evaluation_facts(summary_of({"base": BASE, "a": record("a")}, scores), "a")
    score, none = facts.scores["base"]["pickscore"], facts.scores["a"]["pickscore"]
    assert (score.value, score.number, score.missing) == (1.5, 2, 1)
    assert score.upper - score.value == pytest.approx(
        12.7062 * 0.5, rel=1e-5
    )  # deviations of a half: sqrt(2 * 0.5) / 2
    assert (none.value, none.lower, none.upper, none.number, none.missing) == (None, None, None, 0, 3)
    assert facts.win_rates["a"]["pickscore"].value is None and facts.win_rates["a"]["pickscore"].missing == 3


def test_prompts_that_lost_images():
    """Of two images for each of two prompts only one each is left: SE over two prompts, and one degree of freedom."""
    score = evaluation_facts(with_images({"a": [[1, None], [3, None]]}), "a").scores["a"]["pickscore"]
    assert (score.number, score.missing) == (2, 2) and score.upper - score.value == pytest.approx(12.7062, rel=1e-5)


def test_win_rates_have_their_bootstrap_interval():
    """They are those of the summary."""
    scores = {"base": {"pickscore": [1.0, 2.0, 3.0]}, "a": {"pickscore": [2.0, 2.0, 1.0]}}
    summary = summary_of({"base": BASE, "a": record("a")}, scores)
    rate, known = evaluation_facts(summary, "a").win_rates["a"]["pickscore"], summary["win_rates"]["a"]["pickscore"]
    assert (rate.value, rate.lower, rate.upper, rate.number) == (0.5, known["lower"], known["upper"], 3)


def test_scores_of_all_images_have_no_interval():
    """FID is one number, with its full name, which says how many images it is of."""
    corpus = {"fid": {"base": {"fid_x_n3": 12.5, "num_images": 3, "higher_is_better": False, "weights": {"w": "1"}}}}
    summary = summarize(table_of({"base": {"pickscore": [1.0, 2.0, 3.0]}}, {"pickscore": UP}), {}, corpus)
    facts = evaluation_facts(summary, "base")
    score = facts.scores["base"]["fid"]
    assert (score.value, score.lower, score.upper, score.number) == (12.5, None, None, 3)
    assert facts.metrics["fid"] == {
        "label": "FID", "higher_is_better": False, "weights": {"w": "1"}, "full_names": ["fid_x_n3"],
    }  # fmt: skip
    assert facts.metrics["pickscore"]["full_names"] == []


# ---- The arm ----


def test_the_arm_of_the_same_recipe():
    """Found by its training, whatever it is called; the base by its name; how masks are combined has no part in it."""
    own = iapo(
        mask_overlap="covering", recipe={"output_dir": "a", "hub_model_id": "user/a", "lora_r": 8, "w_neg": 0.0}
    )
    arm = iapo(1, mask_overlap="mean", recipe={"output_dir": "b", "run_name": "b", "lora_r": 8, "w_neg": 1.0})
    models = {"some-base": BASE, "x": record("x", arm), "iapo": record("iapo", own)}
    facts = evaluation_facts(summary_of(models), "iapo")
    assert (facts.needed_arm, facts.arm, facts.arm_differences, facts.base) == ("w_neg=1", "x", {}, "some-base")
    assert list(facts.models) == list(models)


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"learning_rate": 3e-4}, {"learning_rate": [3e-4, 1e-4]}),
        ({"beta": 500}, {"beta": [500, 2000]}),
        ({"recipe": {"lora_r": 8}}, {"lora_r": [8, None]}),
        ({"recipe": {"lora_r": 8}, "LoRA rank": 8}, {"LoRA rank": [8, None]}),
        ({"devices": 8, "pairs at a time on a device": 1}, {}),
        ({"reverse_preference": True}, {"reverse_preference": [True, None]}),
    ],
)
def test_an_arm_with_other_settings(changed, expected):
    """Each setting that differs is there with both values."""
    arm = training_record(model_facts(**{"w_neg": 1.0, "beta": 2000} | changed))
    models = {"base": BASE, "dpo": record("dpo", arm), "iapo": record("iapo", iapo())}
    facts = evaluation_facts(summary_of(models), "iapo")
    assert (facts.arm, facts.arm_differences) == ("dpo", expected)


def test_an_arm_on_other_data_or_another_base():
    """They are settings as others are."""
    other = model_facts(w_neg=1, beta=2000, base="user/other")
    other.data = DataFacts("user/pairs", revision="other", num_rows=8)
    models = {"dpo": record("dpo", training_record(other)), "iapo": record("iapo", iapo())}
    facts = evaluation_facts(summary_of(models), "iapo")
    assert facts.arm_differences == {"base": ["user/other", "user/base"], "dataset_revision": ["other", "c0ffee"]}


def test_an_arm_that_was_sampled_otherwise():
    """The same training, but drawn by another model: said as a difference."""
    models = {"dpo": record("dpo", iapo(1), base="user/turbo"), "iapo": record("iapo", iapo())}
    facts = evaluation_facts(summary_of(models), "iapo")
    assert facts.arm_differences == {"sampled with base": ["user/turbo", "user/base"]}


def test_the_closest_arm_is_taken():
    """Of two arms, the one with fewer other settings, wherever it stands; by name the other one."""
    models = {
        "far": record("far", iapo(1, learning_rate=1, seed=2)),
        "near": record("near", iapo(1)),
        "iapo": record("iapo", iapo()),
    }
    assert evaluation_facts(summary_of(models), "iapo").arm == "near"
    facts = evaluation_facts(summary_of(models), "iapo", arm="far")
    assert (facts.arm, set(facts.arm_differences)) == ("far", {"learning_rate", "seed"})


def test_no_arm():
    """Another w_neg is no arm, nor is a model of which nothing is known, nor one of another method."""
    sft = training_record(model_facts("AttributeSFTTrainer", "attribute SFT"))
    models = {"a": record("a", iapo(0.5)), "b": record("b"), "c": record("c", sft), "iapo": record("iapo", iapo())}
    facts = evaluation_facts(summary_of(models), "iapo")
    assert (facts.needed_arm, facts.arm, facts.arm_differences, facts.base) == ("w_neg=1", None, None, None)


def test_a_trainer_of_ones_own():
    """A class that extends IAPO's has its settings, and needs the same arm."""
    own = training_record(model_facts("MyTrainer", w_neg=0.0, beta=2000))
    facts = evaluation_facts(summary_of({"dpo": record("dpo", iapo(1)), "mine": record("mine", own)}), "mine")
    assert (facts.needed_arm, facts.arm, facts.arm_differences) == (
        "w_neg=1",
        "dpo",
        {"trainer": ["InstanceDPOTrainer", "MyTrainer"]},
    )


@pytest.mark.parametrize("training", [iapo(1), training_record(model_facts("AttributeSFTTrainer", "attribute SFT"))])
def test_what_needs_no_arm(training):
    """The arms themselves."""
    facts = evaluation_facts(summary_of({"x": record("x", iapo(1)), "a": record("a", training)}), "a")
    assert (facts.needed_arm, facts.arm) == (None, None)
    with pytest.raises(ValueError, match="'a' was trained with .* and needs no arm beside it"):
        evaluation_facts(summary_of({"x": record("x", iapo(1)), "a": record("a", training)}), "a", arm="x")


def test_the_arm_of_cpo():
    """Fine-tuning on prompts alone; settings that only one of the trainers has are not compared. The expert is another matter."""
    cpo = training_record(model_facts("ComplexPOTrainer", "CPO", beta=2000, seed=1))
    sft = training_record(model_facts("AttributeSFTTrainer", "attribute SFT", attribute_dropout=1.0, seed=1))
    expert = training_record(model_facts("AttributeSFTTrainer", "attribute SFT", attribute_dropout=0.3, seed=1))
    models = {"expert": record("expert", expert), "sft": record("sft", sft), "cpo": record("cpo", cpo)}
    facts = evaluation_facts(summary_of(models), "cpo")
    assert (facts.needed_arm, facts.arm, facts.arm_differences) == ("SFT", "sft", {})
    del models["sft"]
    facts = evaluation_facts(summary_of(models), "cpo")
    assert (facts.arm, facts.arm_differences) == ("expert", {"attribute_dropout": [0.3, 1]})


def test_an_arm_by_name():
    """One of which nothing is known is taken at its word; one that is known to be none is refused, and one that is not there."""
    models = {"dpo": record("dpo"), "half": record("half", iapo(0.5)), "iapo": record("iapo", iapo())}
    facts = evaluation_facts(summary_of(models), "iapo", arm="dpo")
    assert (facts.needed_arm, facts.arm, facts.arm_differences) == ("w_neg=1", "dpo", None)
    with pytest.raises(
        ValueError, match=r"'half' is no model trained with `w_neg=1`: it was trained with IAPO \(w_neg=0.5\)"
    ):
        evaluation_facts(summary_of(models), "iapo", arm="half")
    with pytest.raises(ValueError, match="'iapo' cannot be its own arm"):
        evaluation_facts(summary_of(models), "iapo", arm="iapo")
    with pytest.raises(ValueError, match="has no model 'nobody'; it has dpo, half, iapo"):
        evaluation_facts(summary_of(models), "iapo", arm="nobody")
    with pytest.raises(ValueError, match="has no model 'nobody'"):
        evaluation_facts(summary_of(models), "nobody")
    facts = evaluation_facts(summary_of({"a": record("a"), "b": record("b")}), "b", arm="a")
    assert (facts.needed_arm, facts.arm) == (None, "a")


def test_every_setting_that_matters_is_compared():
    """What a resumed run is warned about is compared here too, but for the two settings of the mask; places and names are not."""
    from tests.trainer.test_run_record import SAID

    left_out = {name for name in SAID if name in NOT_COMPARED or name.startswith(NOT_COMPARED_PREFIXES)}
    assert left_out == set() and OF_THE_MASK == {"w_neg", "mask_overlap", "box_margin", "grouped_instances"} <= SAID
    assert {name for name in NOT_COMPARED if " " not in name} - {"devices"} <= NO_MATTER


# ---- What is known of a model ----


def test_a_training_is_found_beside_a_model(tmp_path, caplog):
    """In its folder, or for a checkpoint one up, which is then another training; a file that is none of ours is said and left."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    for folder in ("out", "out/checkpoint-2"):
        save_lora(tiny.sd_pipeline(), tmp_path / folder)
    facts = model_facts(w_neg=0.0, beta=2000)
    write_facts(facts, tmp_path / "out" / "training.json")
    spec, at_step = (
        resolve_model("a", str(tmp_path / where), str(tmp_path / "base")) for where in ("out", "out/checkpoint-2")
    )
    assert spec.record()["training"] == json.loads(json.dumps(training_record(facts)))
    assert "training" not in spec.describe() and str(tmp_path) not in json.dumps(spec.record())
    assert at_step.training["settings"] == spec.training["settings"] | {"checkpoint": "checkpoint-2"}
    assert "training" not in resolve_model("base", str(tmp_path / "base")).record()
    for content in ("[]", "{}", '{"data": 1}', "no", "null", '{"data": {}, "samples": [], "name": "x"}'):
        (tmp_path / "out" / "training.json").write_text(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert resolve_model("a", str(tmp_path / "out"), str(tmp_path / "base")).training is None
        assert "is not one that this version of trl_diffusion writes" in caplog.text


def test_a_training_is_found_on_the_hub(hub, tmp_path, caplog):  # noqa: F811
    """By the file beside the weights; none is no mistake, and an answer that does not come is said."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    save_lora(tiny.sd_pipeline(), tmp_path / "lora")
    api = HfApi()
    for name in ("user/with", "user/without"):
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=tmp_path / "lora")
    write_facts(model_facts(w_neg=0.0), tmp_path / "training.json")
    api.upload_file(repo_id="user/with", path_in_repo="training.json", path_or_fileobj=tmp_path / "training.json")
    with caplog.at_level(logging.WARNING):
        assert resolve_model("a", "user/with", str(tmp_path / "base")).training == training_record(
            model_facts(w_neg=0.0)
        )
        assert resolve_model("a", "user/without", str(tmp_path / "base")).training is None
    assert "training.json" not in caplog.text
    hub.fail("HEAD", r".*/user/without/.*/training.json", status=500, times=100)
    with caplog.at_level(logging.WARNING):
        assert resolve_model("a", "user/without", str(tmp_path / "base")).training is None
    assert "The Hub does not say whether user/without has a training.json" in caplog.text


def test_models_are_described():
    """By what the summary says; by hand in its place."""
    models = {
        "base": BASE,
        "iapo": record("iapo", iapo(), negative_lora="user/reversed", trained_on="user/b", vae="user/vae"),
        "npo": record("npo", negative_lora="user/reversed", negative_lora_on="aligned"),
        "guided": BASE | {"negative_lora": "user/reversed"},
        "dpo": record("dpo") | {"kind": "denoiser"},
    }
    facts = evaluation_facts(summary_of(models), "iapo", descriptions={"base": "the model before"})
    assert facts.models == {
        "base": "the model before",
        "iapo": "user/iapo (abc), LoRA on user/base, trained on user/b, trained with IAPO (w_neg=0.0), guided by user/reversed on "
        "the base alone in the unconditional branch, VAE user/vae",
        "npo": "user/npo (abc), LoRA on user/base, guided by user/reversed on top of it in the unconditional branch",
        "guided": "user/base (abc), pipeline, guided by user/reversed in the unconditional branch",
        "dpo": "user/dpo (abc), denoiser of user/base",
    }
    with pytest.raises(ValueError, match="has no model 'bse'"):
        evaluation_facts(summary_of(models), "iapo", descriptions={"bse": "x"})


def test_prompts_and_groups():
    """The dataset of a benchmark, of a Hub id and of a file; groups change nothing."""
    models = {"base": BASE, "a": record("a")}
    summary = summary_of(models, groups=["x", None, "y"])
    facts = evaluation_facts(summary, "a")
    assert facts.prompts == PROMPTS | {"dataset": "nateraw/parti-prompts", "images": {"base": 3, "a": 3}}
    assert facts.scores == evaluation_facts(summary_of(models), "a").scores
    summary["settings"]["prompts"] = PROMPTS | {"source": "user/prompts"}
    assert evaluation_facts(summary, "a").prompts["dataset"] == "user/prompts"
    summary["settings"]["prompts"] = PROMPTS | {"source": "prompts.txt", "revision": None}
    assert evaluation_facts(summary, "a").prompts["dataset"] is None


def test_facts_are_written_and_read(tmp_path):
    """What a file holds is what was written; it is made of JSON values."""
    models = {"base": BASE, "dpo": record("dpo", iapo(1)), "iapo": record("iapo", iapo())}
    metrics = {"pickscore": UP, "num_negative_attributes": DOWN}
    scores = {name: {"pickscore": [1.0, 2.0, None], "num_negative_attributes": [1.0, 0.0, 2.0]} for name in models}
    facts = evaluation_facts(summary_of(models, scores, metrics), "iapo")
    write_facts(facts, tmp_path / "evaluation.json")
    assert read_evaluation_facts(tmp_path / "evaluation.json") == facts


@pytest.mark.parametrize(
    "content", [{}, [], {"eval_pickscore": 1.0, "eval_pickscore_win_rate": 0.5}, None, {"models": {}}]
)
def test_what_is_no_summary(content):
    """Such as what a callback logs during a training, which has no intervals."""
    with pytest.raises(ValueError, match="This is no summary of an evaluation"):
        evaluation_facts(content, "a")
