# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The trainers train flow transformers as they are: Stable Diffusion 3 with T5 and without, FLUX.1 dev and schnell."""

import math

import numpy as np
import pytest
import torch

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    negative_preference_guidance,
    sample_images,
)


MODELS = ["sd3", "sd3_without_t5", "flux", "schnell"]
PROMPTS = ["a red circle", "a cat and a dog"]


def pipeline_of(model: str):
    pipeline = tiny.PIPELINES[model]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings_of(model: str, **settings) -> dict:
    """The settings of a training of two steps."""
    return tiny.FAST | {"max_steps": 2} | tiny.settings(tiny.PIPELINES[model]()) | settings


def dpo_trainer(model: str, output_dir, peft_config=None, **settings) -> InstanceDPOTrainer:
    args = InstanceDPOConfig(str(output_dir), num_inference_steps=2, **settings_of(model, **settings))
    data = {"train_dataset": tiny.pairs(), "eval_dataset": tiny.pairs(2)}
    return InstanceDPOTrainer(pipeline_of(model), args=args, peft_config=peft_config, **data)


@pytest.mark.parametrize(
    ("model", "noise_source", "kind"),
    [
        ("sd3", "inversion", "lora"),
        ("sd3_without_t5", "random", "full"),
        ("sd3_without_t5", "inversion", "lora"),
        ("flux", "inversion", "full"),
        ("schnell", "random", "lora"),
        ("schnell", "inversion", "full"),
    ],
)
def test_instance_dpo_trains_a_flow_model(tmp_path, model, noise_source, kind):
    """The first loss is ln 2, a step moves the policy away from the reference, and the evaluation has a loss."""
    settings = {"noise_source": noise_source, "inversion_steps": 3, "inversion_eta": 0.1, "prompt_dropout": 0.3}
    settings |= {"timestep_density": "logit_normal"}
    trainer = dpo_trainer(model, tmp_path, tiny.lora() if kind == "lora" else None, **settings)
    before = tiny.weights(trainer.model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    trainer.train()
    losses = tiny.losses(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7)
    assert len(losses) == 2 and losses[1] != pytest.approx(math.log(2), abs=1e-6)
    assert tiny.max_difference(before, tiny.weights(trainer.model)) > 1e-4
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("model", ["sd3_without_t5", "schnell"])
def test_what_is_precomputed_trains_the_same(tmp_path, model):
    """Latents, prompts and noised rows from Arrow files give the losses of a training that encodes in its steps."""
    settings = {"noise_source": "inversion", "inversion_steps": 3}
    live = dpo_trainer(model, tmp_path / "live", **settings)
    settings |= {"precompute": True, "precompute_dir": str(tmp_path / "files")}
    cached = dpo_trainer(model, tmp_path / "cached", **settings)
    for trainer in (live, cached):
        trainer.train()
    assert tiny.losses(cached) == pytest.approx(tiny.losses(live), abs=1e-4)
    assert tiny.losses(live)[1] != pytest.approx(math.log(2), abs=2e-4)


@pytest.mark.parametrize("model", MODELS)
def test_a_lora_is_what_the_pipeline_loads(tmp_path, model):
    """The saved LoRA, loaded by diffusers, draws the images that the trainer samples by its policy."""
    trainer = dpo_trainer(model, tmp_path, tiny.lora(), learning_rate=0.2)
    trainer.train()
    trainer.save_model()
    ours = trainer.sample(PROMPTS)
    settings = {"num_inference_steps": 2, "guidance_scale": trainer.args.guidance_scale, "height": 32, "width": 32}
    pipeline, drawn = pipeline_of(model), []
    for load in (lambda: None, lambda: pipeline.load_lora_weights(tmp_path)):
        load()
        pipeline.transformer.eval()
        drawn.append(sample_images(pipeline, PROMPTS, trainer.args.seed, max_sequence_length=16, **settings))
    base, theirs, ours = (np.stack([np.asarray(image, int) for image in images]) for images in (*drawn, ours))
    assert ours.shape == (2, 32, 32, 3) and abs(ours - theirs).max() <= 1
    assert abs(ours - base).max() > 4


@pytest.mark.parametrize("model", ["sd3_without_t5", "schnell"])
def test_both_stages_of_complex_po_train_a_flow_model(tmp_path, model):
    """An expert is fine-tuned, and its LoRA is what the second stage learns from; that starts at ln 2."""
    (tmp_path / "tree.yaml").write_text(tiny.CRITERIA)
    settings = settings_of(model, criteria=str(tmp_path / "tree.yaml"))
    expert = AttributeSFTTrainer(
        pipeline_of(model),
        args=AttributeSFTConfig(str(tmp_path / "expert"), **settings | {"learning_rate": 0.02}),
        train_dataset=tiny.paintings(),
        peft_config=tiny.lora(),
    )
    expert.train()
    expert.save_model()
    trainer = ComplexPOTrainer(
        pipeline_of(model),
        str(tmp_path / "expert"),
        args=ComplexPOConfig(str(tmp_path / "cpo"), **settings),
        train_dataset=tiny.paintings(),
        peft_config=tiny.lora(),
    )
    trainer.train()
    first, second = tiny.losses(trainer)
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert math.isfinite(second) and second != pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("model", tiny.FLOWS)
def test_negative_preference_guidance_of_a_flow_transformer(tmp_path, model):
    """
    Every branch has its own adapter: the halves of the doubled batch of Stable Diffusion 3, the two calls of FLUX.1 with
    `true_cfg_scale`.
    """
    folders = {}
    for index, name in enumerate(("aligned", "reversed")):
        trainer = dpo_trainer(model, tmp_path / name, tiny.lora(), learning_rate=0.05, seed=index)
        trainer.train()
        trainer.save_model()
        folders[name] = tmp_path / name
    pipeline, calls = pipeline_of(model), []
    for name, folder in folders.items():
        pipeline.load_lora_weights(folder, adapter_name=name)
    guidance = {"guidance_scale": 2.0} if model == "sd3" else {"true_cfg_scale": 2.0, "negative_prompt": ["", ""]}
    hook = pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    with negative_preference_guidance(pipeline, "aligned", "reversed"):
        pipeline(PROMPTS, num_inference_steps=1, height=32, width=32, max_sequence_length=16, **guidance)
    hook.remove()
    halves = [(0, slice(2), "reversed"), (0, slice(2, 4), "aligned")]
    branches = halves if model == "sd3" else [(0, slice(None), "aligned"), (1, slice(None), "reversed")]
    assert len(calls) == (1 if model == "sd3" else 2)
    for call, rows, name in branches:
        kwargs, output = calls[call]
        alone = pipeline_of(model)
        with torch.no_grad():
            half = {key: value[rows] for key, value in kwargs.items() if torch.is_tensor(value)}
            base = alone.transformer(**half, return_dict=False)[0]
            alone.load_lora_weights(folders[name])
            expected = alone.transformer(**half, return_dict=False)[0]
        torch.testing.assert_close(output[rows], expected, atol=1e-5, rtol=1e-5)
        assert (expected - base).abs().max() > 1e-3
