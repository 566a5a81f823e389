# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
import torch
from PIL import Image

from trl_diffusion import ComplexPOConfig, ComplexPOTrainer, negative_preference_guidance
from trl_diffusion.quickstart import cpo, iapo
from trl_diffusion.quickstart.experiment import FAST, annotate, run_arm
from trl_diffusion.quickstart.models import MODELS
from trl_diffusion.quickstart.paintings import painting_dataset, sample_painting
from trl_diffusion.quickstart.sampling import generate, load_pipeline, shipped
from trl_diffusion.quickstart.world import evaluation_prompts
from trl_diffusion.scripts.quickstart import QuickstartArguments, main


@pytest.fixture(autouse=True)
def threads():
    """The quickstart sets the number of threads of its own processes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


UNET = MODELS["unet"]
ARMS = iapo.EXPERIMENT.arms
SMALL = {"num_pairs": 64, "num_paintings": 64, "max_steps": 2, "num_samples": 16}
CPO_ARMS = ["base", "sft", "cpo", "cpo_stabilised", "cpo_paired"]


def run_small(experiment, name: str, folder, seed: int = 0, model: str = "unet") -> list[bytes]:
    """The first images of an arm that is trained on annotated rows for two steps."""
    annotations, _ = annotate(experiment, 64, seed, str(folder))
    _, images, *_ = run_arm(experiment, model, name, annotations, 64, 2, 16, seed, str(folder))
    return [image.tobytes() for image in images]


def test_it_writes_results_pictures_and_a_report(tmp_path):
    """Every model has its shares of all the images; the picture holds a column a model; the report names the figures."""
    main(QuickstartArguments(str(tmp_path), **SMALL))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results)[:4] == ["base", *ARMS] == ["base", "dpo", "iapo", "iapo_covering"]
    for name in ("base", *ARMS):
        assert set(results[name]) == {"clean_a", "clean_b", "match_a", "match_b", "n"}
        assert results[name]["n"] == 16
        assert all(0 <= results[name][key] <= 1 for key in results[name] if key != "n")
    assert list(results["cpo"]) == CPO_ARMS
    for scores in results["cpo"].values():
        assert list(scores) == ["negatives", "positives", "match", "n"] and scores["n"] == 16
        assert scores["negatives"] + scores["positives"] == 4 and 0 <= scores["match"] <= 1
    assert (
        results["seed"] == 0 and results["seconds"] > 0 and {"trl", "diffusers", "torch"} <= set(results["versions"])
    )
    scenes, paintings = (results["annotations"][name] for name in ("scenes", "paintings"))
    assert scenes["ok"] == paintings["ok"] == 64
    assert scenes["instances"] == 128 and scenes["conflicts"] == round(0.46 * 64)
    assert paintings["positive_attributes"] + paintings["negative_attributes"] == 4 * 64
    assert Image.open(tmp_path / "samples.png").width == 8 + 4 * (160 + 8)
    assert Image.open(tmp_path / "paintings.png").width == 8 + 5 * (160 + 8)
    report = (tmp_path / "report.md").read_text()
    paired = results["cpo"]["cpo_paired"]
    assert f"| CPO-S, paired | {paired['negatives']:.2f} | {paired['match']:.3f} |" in report
    assert f"| IAPO | {results['iapo']['clean_a']:.3f} | {results['iapo']['clean_b']:.3f} |" in report


@pytest.mark.parametrize("half, arms", [(iapo, ("iapo", "dpo")), (cpo, ("cpo_paired", "cpo_stabilised"))])
def test_it_repeats_itself_and_every_arm_trains(tmp_path, half, arms):
    """The same seed gives the same images, bit for bit; another arm or another seed gives others."""
    images = {}
    for key, name, seed in (("once", arms[0], 0), ("twice", arms[0], 0), ("other", arms[1], 0), ("seed", arms[0], 1)):
        images[key] = run_small(half.EXPERIMENT, name, tmp_path, seed)
    assert images["once"] == images["twice"]
    assert images["once"] != images["other"] and images["once"] != images["seed"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("half, arm", [(iapo, "dpo"), (cpo, "sft")])
def test_training_leaves_the_shipped_pipeline_alone(tmp_path, half, arm, kind):
    """What comes with the package is read and never written, whichever kind of model is trained."""

    def shipped_weights() -> dict[str, torch.Tensor]:
        model = MODELS[kind]
        return getattr(load_pipeline(getattr(model, half.EXPERIMENT.name)), model.denoiser).state_dict()

    before = shipped_weights()
    run_small(half.EXPERIMENT, arm, tmp_path, model=kind)
    assert all(torch.equal(value, before[name]) for name, value in shipped_weights().items())


@pytest.mark.parametrize("half, arm", [(iapo, "iapo_covering"), (cpo, "cpo_paired")])
def test_the_flow_model_is_trained(tmp_path, half, arm):
    """With `--model flow` the same arms train the other base, by its own expert: its images change, and are not the UNet's."""
    trained, base = (run_small(half.EXPERIMENT, name, tmp_path, model="flow") for name in (arm, "base"))
    assert trained != base
    assert base != run_small(half.EXPERIMENT, "base", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 5, 6])
def test_instances_and_attributes_help(tmp_path, seed):
    """
    On every seed: with IAPO B is clean more often than with Diffusion-DPO and A as often, with the covering masks B is clean
    even more often, and the images still show what the prompt names. CPO-S removes negative qualities, and more of them with
    paired targets, and the images still show what the prompt names.
    """
    main(QuickstartArguments(str(tmp_path), seed=seed))
    results = json.loads((tmp_path / "results.json").read_text())
    base, dpo, iapo, covering = (results[name] for name in ("base", *ARMS))
    assert iapo["clean_b"] - dpo["clean_b"] >= 0.04
    assert iapo["clean_a"] >= dpo["clean_a"] - 0.02
    assert iapo["match_a"] >= base["match_a"] - 0.03
    assert covering["clean_b"] >= iapo["clean_b"] + 0.04
    assert base["match_b"] >= 0.75
    negatives, match = (
        {name: scores[key] for name, scores in results["cpo"].items()} for key in ("negatives", "match")
    )
    assert negatives["cpo_paired"] <= negatives["base"] - 0.8
    assert negatives["cpo_stabilised"] <= negatives["base"] - 0.3
    assert min(match["cpo_paired"], match["cpo_stabilised"]) >= match["base"] - 0.05


@pytest.mark.slow
def test_a_reversed_adapter_in_the_unconditional_branch_helps(tmp_path):
    """Guidance away from a model trained with the preference reversed gives fewer negatives, aligned or not."""
    paintings = painting_dataset(2048, seed=21)
    pipeline, prompts = load_pipeline(UNET.paintings), evaluation_prompts(512, 21, sample_painting)
    for name in ("aligned", "reversed"):
        trainer = ComplexPOTrainer(
            load_pipeline(UNET.paintings),
            expert=shipped(UNET.expert),
            args=ComplexPOConfig(
                str(tmp_path / name),
                seed=21,
                max_steps=110,
                criteria=cpo.CRITERIA,
                beta=UNET.painting_beta,
                reverse_preference=name == "reversed",
                **FAST,
                **UNET.painting_training,
            ),
            train_dataset=paintings,
            peft_config=cpo.lora(pipeline),
        )
        trainer.train()
        trainer.save_model()

    scores = {"base": cpo.score(generate(pipeline, prompts, seed=21), prompts)}
    for name in ("aligned", "reversed"):
        pipeline.load_lora_weights(str(tmp_path / name), adapter_name=name)
        pipeline.set_adapters(name)
        scores[name] = cpo.score(generate(pipeline, prompts, seed=21), prompts)
    for positive in (None, "aligned"):
        with negative_preference_guidance(pipeline, positive, "reversed"):
            scores[f"{positive or 'base'} + NPO"] = cpo.score(generate(pipeline, prompts, seed=21), prompts)
    print("", *(f"{name}: {score}" for name, score in scores.items()), sep="\n")
    negatives = {name: score["negatives"] for name, score in scores.items()}
    assert negatives["reversed"] > negatives["base"] + 0.3
    assert negatives["base + NPO"] < negatives["base"] - 0.1
    assert negatives["aligned + NPO"] < negatives["aligned"] - 0.1
    assert min(score["match"] for score in scores.values()) > 0.95
