# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A family of flow transformers is one short class: the trainers train it as it is."""

import inspect
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling

import trl_diffusion.backbones
from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    negative_preference_guidance,
)
from trl_diffusion.backbones import Backbone, load_backbone
from trl_diffusion.process import RectifiedFlow


SHIFT = 3.0
NUM_T5_TOKENS = 4  # zeros: the pipeline has no T5
PROMPTS = ["a red circle", "a cat and a dog"]


class StableDiffusion3Backbone(Backbone):
    """A [`~diffusers.StableDiffusion3Pipeline`] as training sees it."""

    pipeline_class = StableDiffusion3Pipeline
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    lora_target_modules = ("to_q", "to_k", "to_v", "to_out.0")

    @staticmethod
    def check(pipeline) -> None:
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError("The scheduler is that of no rectified flow.")

    def check_reference(self, pipeline) -> None:
        if pipeline.transformer.config != self.denoiser.config:
            raise ValueError("The reference has another transformer.")

    def make_process(self) -> RectifiedFlow:
        config = self.pipeline.scheduler.config
        return RectifiedFlow(
            config.num_train_timesteps,
            density=lambda generator: compute_density_for_timestep_sampling(
                "logit_normal", batch_size=1, logit_mean=0.0, logit_std=1.0, generator=generator
            )[0],
            shift=lambda sigma: config.shift * sigma / (1 + (config.shift - 1) * sigma),
        )

    @property
    def default_resolution(self) -> int:
        return self.denoiser.config.sample_size * self.vae_scale_factor

    @property
    def size_multiple(self) -> int:
        return self.vae_scale_factor * self.denoiser.config.patch_size

    @property
    def prompt_limits(self) -> dict[str, int]:
        return {name: getattr(self.pipeline, name).model_max_length for name in ("tokenizer", "tokenizer_2")}

    def encode_prompts(self, prompts: list[str | None]) -> dict[str, torch.Tensor]:
        prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            [prompt or "" for prompt in prompts],
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=NUM_T5_TOKENS,
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def predict(self, denoiser, noisy_latents, timesteps, conditions) -> torch.Tensor:
        return denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    @staticmethod
    def guidance_branches(pipeline, call) -> tuple[str, ...]:
        return ("unconditional", "conditional") if pipeline.do_classifier_free_guidance else ("conditional",)


def sd3_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """32x32 images, 8x8 latents, no T5."""
    torch.manual_seed(seed)
    vae = tiny.vae()
    vae.register_to_config(shift_factor=0.1, scaling_factor=1.5)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
        vae=vae,
        text_encoder=tiny.text_encoder(projection=True),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=tiny.text_encoder(projection=True),
        tokenizer_2=tiny.tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def sd3_is_supported(monkeypatch):
    """The class is among the families, as it would be with a file of its own."""
    monkeypatch.setattr(
        trl_diffusion.backbones, "BACKBONES", (*trl_diffusion.backbones.BACKBONES, StableDiffusion3Backbone)
    )


@pytest.fixture
def tree(tmp_path) -> str:
    (tmp_path / "tree.yaml").write_text(tiny.CRITERIA)
    return str(tmp_path / "tree.yaml")


def dpo_trainer(output_dir, peft_config=None, **settings) -> InstanceDPOTrainer:
    args = InstanceDPOConfig(str(output_dir), num_inference_steps=2, **tiny.FAST | {"max_steps": 2} | settings)
    return InstanceDPOTrainer(
        sd3_pipeline(), args=args, train_dataset=tiny.pairs(), eval_dataset=tiny.pairs(2), peft_config=peft_config
    )


def test_the_class_is_short():
    """A family is at most 90 lines."""
    assert len(inspect.getsource(StableDiffusion3Backbone).splitlines()) <= 90


def test_a_prediction_is_that_of_the_pipeline():
    """The backbone calls the transformer as the pipeline does, with the same embeddings, at the pipeline's own timesteps."""
    pipeline, calls = sd3_pipeline(), []
    backbone = load_backbone(pipeline)
    pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    settings = {"num_inference_steps": 3, "max_sequence_length": NUM_T5_TOKENS, "output_type": "latent"}
    pipeline(PROMPTS, guidance_scale=1.0, **settings)
    conditional = backbone.encode_prompts(PROMPTS)
    for kwargs, output in calls[:3]:
        with torch.no_grad():
            prediction = backbone.predict(
                pipeline.transformer, kwargs["hidden_states"], kwargs["timestep"], conditional
            )
        torch.testing.assert_close(prediction, output, atol=1e-6, rtol=1e-6)
        assert 0 < kwargs["timestep"][0] <= backbone.process.num_timesteps
    calls.clear()
    pipeline(PROMPTS, guidance_scale=2.0, **settings)
    both = {name: torch.cat([backbone.encode_prompts([None] * 2)[name], conditional[name]]) for name in conditional}
    torch.testing.assert_close(calls[0][0]["encoder_hidden_states"], both["prompt_embeds"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(calls[0][0]["pooled_projections"], both["pooled_prompt_embeds"], atol=1e-6, rtol=1e-6)


def test_latents_are_what_the_pipeline_decodes():
    """The pipeline decodes z / scale + shift: of the backbone's latents, that is the VAE's own mean."""
    backbone = load_backbone(sd3_pipeline())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, _ = backbone.encode_images(images)
    config = backbone.pipeline.vae.config
    with torch.no_grad():
        expected = backbone.pipeline.vae.encode(images).latent_dist.mean
    torch.testing.assert_close(mean / config.scaling_factor + config.shift_factor, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("noise_source", ["random", "inversion"])
@pytest.mark.parametrize("peft_config", [None, tiny.lora()], ids=["full", "lora"])
def test_instance_dpo_trains_a_flow_model(tmp_path, noise_source, peft_config):
    """The first loss is ln 2, a step moves the policy away from the reference, and the evaluation has a loss."""
    trainer = dpo_trainer(
        tmp_path, peft_config, noise_source=noise_source, inversion_steps=3, inversion_eta=0.1, prompt_dropout=0.3
    )
    before = tiny.weights(trainer.model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    trainer.train()
    losses = tiny.losses(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert len(losses) == 2 and losses[1] != pytest.approx(math.log(2), abs=1e-6)
    assert tiny.max_difference(before, tiny.weights(trainer.model)) > 1e-4
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("noise_source", ["random", "inversion"])
def test_what_is_precomputed_trains_the_same(tmp_path, noise_source):
    """Latents, prompts and noised rows from Arrow files give the losses of a training that encodes in its steps."""
    settings = {"noise_source": noise_source, "inversion_steps": 3, "num_train_epochs": 1}
    live = dpo_trainer(tmp_path / "live", tiny.lora(), **settings)
    cached = dpo_trainer(
        tmp_path / "cached", tiny.lora(), precompute=True, precompute_dir=str(tmp_path / "files"), **settings
    )
    for trainer in (live, cached):
        trainer.train()
    assert tiny.losses(cached) == pytest.approx(tiny.losses(live), abs=1e-4)


def test_a_lora_is_what_the_pipeline_loads(tmp_path):
    """The saved LoRA, loaded by diffusers, draws the images of the trained policy."""
    trainer = dpo_trainer(tmp_path, tiny.lora(), learning_rate=0.05)
    trainer.train()
    trainer.save_model()
    images = trainer.sample(PROMPTS)
    other = load_backbone(sd3_pipeline())
    other.pipeline.load_lora_weights(tmp_path)
    trainer.backbone.pipeline = other.pipeline
    loaded = trainer.backbone.pipeline.transformer
    batch = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10.5, 700.0])
    conditions = other.encode_prompts(PROMPTS)
    with torch.no_grad():
        ours = other.predict(trainer.policy.eval(), *batch, conditions)
        theirs = other.predict(loaded.eval(), *batch, conditions)
        base = other.predict(sd3_pipeline().transformer.eval(), *batch, conditions)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours - base).abs().max() > 1e-3
    assert [image.size for image in images] == [(32, 32)] * 2


def test_both_stages_of_complex_po_train_a_flow_model(tmp_path, tree):
    """An expert is fine-tuned, and its LoRA is what the second stage learns from; that starts at ln 2."""
    settings = tiny.FAST | {"max_steps": 2}
    expert = AttributeSFTTrainer(
        sd3_pipeline(),
        args=AttributeSFTConfig(str(tmp_path / "expert"), criteria=tree, **settings | {"learning_rate": 0.02}),
        train_dataset=tiny.paintings(),
        peft_config=tiny.lora(),
    )
    expert.train()
    expert.save_model()
    assert all(map(math.isfinite, tiny.losses(expert)))
    trainer = ComplexPOTrainer(
        sd3_pipeline(),
        str(tmp_path / "expert"),
        args=ComplexPOConfig(str(tmp_path / "cpo"), criteria=tree, **settings),
        train_dataset=tiny.paintings(),
        peft_config=tiny.lora(),
    )
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert len(tiny.losses(trainer)) == 2 and all(map(math.isfinite, tiny.losses(trainer)))


def test_negative_preference_guidance_of_a_flow_transformer(tmp_path):
    """Every branch has its own adapter: the first half of the doubled batch the negative one, the second the positive one."""
    folders = {}
    for index, name in enumerate(("aligned", "reversed")):
        trainer = dpo_trainer(tmp_path / name, tiny.lora(), learning_rate=0.05, seed=index)
        trainer.train()
        trainer.save_model()
        folders[name] = tmp_path / name
    pipeline, calls = sd3_pipeline(), []
    for name, folder in folders.items():
        pipeline.load_lora_weights(folder, adapter_name=name)
    settings = {"num_inference_steps": 1, "max_sequence_length": NUM_T5_TOKENS, "guidance_scale": 2.0}
    hook = pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    with negative_preference_guidance(pipeline, "aligned", "reversed"):
        pipeline(PROMPTS, **settings)
    hook.remove()
    ((kwargs, output),) = calls
    for rows, name in ((slice(2), "reversed"), (slice(2, 4), "aligned")):
        alone = sd3_pipeline()
        alone.load_lora_weights(folders[name])
        half = {key: value[rows] for key, value in kwargs.items() if torch.is_tensor(value)}
        with torch.no_grad():
            expected = alone.transformer(**half, return_dict=False)[0]
        torch.testing.assert_close(output[rows], expected, atol=1e-5, rtol=1e-5)
