# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The laws that every family of flow transformers keeps: it is trained as its pipeline samples, and what is saved is what diffusers loads."""

import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from tests import tiny
from tests.families import FAMILIES, Call, Family
from tests.test_process import chi_squared
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
from trl_diffusion.backbones import Backbone, load_backbone
from trl_diffusion.trainer.diffusion_config import configure_backbone


PROMPTS = ["a cat", "a red circle and a blue square and a dog"]
LORA = {"r": 4, "alpha": 8}  # so that a file without its alpha shows


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


def quiet_pipeline(family: Family, **settings) -> DiffusionPipeline:
    pipeline = family.make(**settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def backbone_of(family: Family, tmp_path, **settings) -> Backbone:
    """The backbone of a training's configuration."""
    backbone = load_backbone(quiet_pipeline(family, **settings))
    configure_backbone(backbone, InstanceDPOConfig(str(tmp_path), **tiny.FAST | family.settings))
    return backbone


def calls_of(family: Family, backbone: Backbone, size: tuple[int, int], **arguments) -> list[Call]:
    """The transformer's calls in one call of the pipeline."""
    calls, transformer = [], backbone.pipeline.transformer
    signature = inspect.signature(transformer.forward)

    def note(module, args, kwargs, output):
        calls.append(family.read_call(backbone, signature.bind(*args, **kwargs).arguments, output, size))

    hook = transformer.register_forward_hook(note, with_kwargs=True)
    try:
        height, width = size
        backbone.pipeline(prompt=[*PROMPTS], height=height, width=width, output_type="latent", **arguments)
    finally:
        hook.remove()
    return calls


def conditions_of(backbone: Backbone, prompts: list[str | None], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    sizes = torch.tensor([size] * len(prompts))
    return backbone.encode_prompts(prompts) | backbone.image_conditions(sizes, torch.zeros_like(sizes), size)


def training(family: Family, output_dir, rows: int = 8, peft_config=None, **settings) -> InstanceDPOTrainer:
    args = InstanceDPOConfig(str(output_dir), num_inference_steps=2, **tiny.FAST | family.settings | settings)
    return InstanceDPOTrainer(
        quiet_pipeline(family), args=args, train_dataset=tiny.pairs(rows), peft_config=peft_config
    )


def latents_for(backbone: Backbone, num: int, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    sides = (side // backbone.vae_scale_factor for side in size)
    return torch.randn(num, backbone.latent_channels, *sides, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def predictions(backbone: Backbone, denoiser: torch.nn.Module) -> torch.Tensor:
    """What a denoiser predicts for two prompts at two timesteps."""
    conditions = conditions_of(backbone, PROMPTS, (32, 32))
    return backbone.predict(denoiser.eval(), latents_for(backbone, 2), torch.tensor([100.0, 700.0]), conditions)


# ---- Trained as it samples ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_a_prediction_is_the_pipelines_own(family, size, dtype, tmp_path):
    """
    Same latents, times and prompts of several lengths: the transformer gives what it gives while the pipeline samples. Masked padding
    that is left out changes the order of sums, and with it the last digit in bfloat16.
    """
    backbone = backbone_of(family, tmp_path)
    pipeline = backbone.pipeline.to(dtype)
    calls = calls_of(family, backbone, size, num_inference_steps=3, **family.call)
    timesteps = pipeline.scheduler.timesteps
    assert len(calls) == len(timesteps) == 3
    conditions = conditions_of(backbone, PROMPTS, size)
    for (latents, expected), timestep in zip(calls, timesteps, strict=True):
        sides = tuple(side // backbone.vae_scale_factor for side in size)
        assert latents.shape == (2, backbone.latent_channels, *sides)
        with torch.no_grad():
            prediction, other = (
                backbone.predict(pipeline.transformer, latents, timestep.expand(2) / divisor, conditions)
                for divisor in (1, 2)
            )
        tolerance = 1e-5 if dtype == torch.float32 else family.half_tolerance
        torch.testing.assert_close(prediction.float(), expected.float(), atol=tolerance, rtol=1e-5)
        assert (other - expected).abs().max() > 1e-3, "the time makes no difference"


def test_the_unconditional_branch_is_the_pipelines(family, tmp_path):
    """A dropped prompt is what classifier-free guidance compares the prompt to."""
    if family.guided is None:
        pytest.skip("the pipeline has no guidance")
    backbone = backbone_of(family, tmp_path)
    calls = calls_of(family, backbone, (32, 32), num_inference_steps=1, **family.guided)
    timestep = backbone.pipeline.scheduler.timesteps[0]
    assert len(calls) == len(family.branches)
    prompts = {"conditional": PROMPTS, "unconditional": [None, None]}
    for call, branches in zip(calls, family.branches, strict=True):
        for branch, latents, expected in zip(
            branches, call.latents.chunk(len(branches)), call.prediction.chunk(len(branches)), strict=True
        ):
            with torch.no_grad():
                own, other = (
                    backbone.predict(
                        backbone.denoiser, latents, timestep.expand(2), conditions_of(backbone, each, (32, 32))
                    )
                    for each in (prompts[branch], ["a dog", "a dog and a dog"])
                )
            torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
            assert (other - expected).abs().max() > 1e-4, "the prompt makes no difference"


def test_prompts_of_a_batch_do_not_touch_each_other(family, tmp_path):
    """A prompt beside a longer one predicts what it predicts alone: what is padded has no effect, and is stored as zeros."""
    backbone = backbone_of(family, tmp_path)
    latents, timesteps = latents_for(backbone, 2), torch.tensor([300.0, 800.0])
    together = conditions_of(backbone, PROMPTS, (32, 32))
    with torch.no_grad():
        both = backbone.predict(backbone.denoiser, latents, timesteps, together)
        for row, prompt in enumerate(PROMPTS):
            alone = conditions_of(backbone, [prompt], (32, 32))
            one = backbone.predict(backbone.denoiser, latents[row : row + 1], timesteps[row : row + 1], alone)
            torch.testing.assert_close(both[row : row + 1], one, atol=1e-5, rtol=1e-5)
    for name in backbone.padded_conditions:
        lengths = together["prompt_lengths"]
        assert lengths[0] < lengths[1] == together[name].shape[1]
        assert not together[name][0, lengths[0] :].any()


def test_latents_are_what_the_pipeline_decodes(family, tmp_path):
    """Of an image whose posterior is what the pipeline decodes, the latents are those that it sampled, statistics and all."""
    backbone = backbone_of(family, tmp_path)
    pipeline, size, decoded = backbone.pipeline, (32, 64), []
    own_decode, own_encode = pipeline.vae.decode, pipeline.vae.encode
    pipeline.vae.decode = lambda latents, **kwargs: decoded.append(latents) or own_decode(latents, **kwargs)
    calls = []
    signature = inspect.signature(pipeline.transformer.forward)

    def standstill(module, args, kwargs, output):
        calls.append(family.read_call(backbone, signature.bind(*args, **kwargs).arguments, output, size))
        return ([torch.zeros_like(one) for one in output[0]] if isinstance(output[0], list) else output[0] * 0,)

    pipeline.transformer.register_forward_hook(standstill, with_kwargs=True)
    pipeline(prompt=[*PROMPTS], height=size[0], width=size[1], num_inference_steps=1, output_type="np", **family.call)
    (moments,) = decoded

    def encode(images, **kwargs):
        if "latent_dist" not in own_encode(images):
            return EncoderOutput(latent=moments)
        deviation = torch.full_like(moments, -60.0)
        return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([moments, deviation], dim=1)))

    pipeline.vae.encode = encode
    with torch.no_grad():
        mean, std = backbone.encode_images(torch.zeros(2, 3, *size))
    torch.testing.assert_close(mean, calls[0].latents.float(), atol=1e-5, rtol=1e-5)
    assert std.abs().max() < 1e-6 and mean.std() > 0.5


def test_latents_have_the_scale_of_the_posterior(family, tmp_path):
    """The deviation has the scale of the mean: what is sampled from the VAE's posterior is what training sees."""
    backbone = backbone_of(family, tmp_path)
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = backbone.encode_images(images)
    assert mean.shape == std.shape == (2, *latents_for(backbone, 1, (32, 64)).shape[1:])
    assert mean.dtype == std.dtype == torch.float32 and mean.isfinite().all() and (std >= 0).all()


@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
def test_timesteps_are_distributed_as_the_pipelines_schedule(family, size, tmp_path):
    """
    Between two timesteps of the pipeline's schedule that are a twentieth of its steps apart, there is a twentieth of the sampled
    timesteps, by Pearson's chi-squared: the shift, its growth with the size, and the terminal stretch are the pipeline's.
    """
    for settings in family.schedules:
        backbone = backbone_of(family, tmp_path, **settings)

        def interrupt(pipeline, step, timestep, tensors):
            pipeline._interrupt = True
            return tensors

        with family.full_schedule():
            backbone.pipeline(
                prompt="a cat",
                height=size[0],
                width=size[1],
                num_inference_steps=1000,
                output_type="latent",
                callback_on_step_end=interrupt,
                **{name: value[:1] if isinstance(value, list) else value for name, value in family.call.items()},
            )
        schedule = backbone.pipeline.scheduler.timesteps.flip(0).float()
        assert len(schedule) == 1000
        sides = tuple(latents_for(backbone, 1, size).shape[2:])
        sampled = backbone.process.sample_timesteps([(0, 0, f"row-{index}") for index in range(6000)], sides)
        shares = torch.searchsorted(schedule, sampled) / len(schedule)
        assert chi_squared(sampled, shares) < 5
        assert chi_squared(sampled, sampled / 1000) > 5, "the timesteps are not shifted"


@pytest.mark.parametrize("settings", [{}, {"without_denoiser": True}])
def test_a_pipeline_loads_by_its_name(family, settings, tmp_path):
    """A folder gives what was saved, also where the transformer comes last."""
    expected = backbone_of(family, tmp_path / "output")
    expected.pipeline.save_pretrained(tmp_path / "pipeline")
    backbone = load_backbone(str(tmp_path / "pipeline"), **settings)
    configure_backbone(backbone, InstanceDPOConfig(str(tmp_path), **tiny.FAST | family.settings))
    backbone.load_denoiser()
    assert backbone.settings == expected.settings
    assert torch.equal(predictions(backbone, backbone.denoiser), predictions(expected, expected.denoiser))


# ---- Trainings ----


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_batch_is_learned_by_heart(family, kind, tmp_path):
    """Trained on one noised batch again and again, the loss falls from ln 2 to nearly nothing."""
    trainer = training(family, tmp_path, 2, tiny.lora(16, 16) if kind == "lora" else None, beta=20.0)
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    noised = next(trainer.noised_batches(trainer.model, inputs))
    trained = [weight for weight in trainer.policy.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2 if kind == "lora" else 1e-3), []
    for _ in range(30):
        loss = trainer.objective(trainer.model, noised)[0].mean()
        trainer.state.global_step += 1
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.1


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_saved_is_what_diffusers_loads(family, kind, tmp_path):
    """Loaded by plain diffusers, a LoRA or a pipeline predicts exactly what the policy predicts."""
    trainer = training(family, tmp_path, 8, tiny.lora(**LORA) if kind == "lora" else None, learning_rate=0.02)
    before = predictions(trainer.backbone, trainer.policy)
    trainer.train()
    trainer.save_model()
    ours = predictions(trainer.backbone, trainer.policy)
    if kind == "lora":
        pipeline = quiet_pipeline(family)
        pipeline.load_lora_weights(tmp_path)
        assert any(family.lora_target in name and "lora_A" in name for name, _ in trainer.policy.named_parameters())
    else:
        pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    theirs = predictions(trainer.backbone, pipeline.transformer)
    assert (ours - theirs).abs().max() == 0
    assert (ours - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_training_is_the_uninterrupted_one(family, kind, tmp_path):
    """Four steps in one go and in two halves end at the same weights, with precomputed rows as well as without."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    if kind == "lora":
        settings |= {"precompute": True, "precompute_dir": str(tmp_path / "files")}
    lora = tiny.lora(**LORA) if kind == "lora" else None
    whole = training(family, tmp_path / "whole", 8, lora, **settings)
    whole.train()
    resumed = training(family, tmp_path / "resumed", 8, lora, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert tiny.max_difference(tiny.weights(whole.policy), tiny.weights(resumed.policy)) == 0


@pytest.mark.parametrize("noise_source", ["random", "inversion"])
def test_what_is_precomputed_trains_the_same(family, noise_source, tmp_path):
    """Latents, prompts and inverted rows from Arrow files give the losses of a training that encodes in its steps."""
    settings = {"noise_source": noise_source, "inversion_steps": 3, "prompt_dropout": 0.3, "learning_rate": 1e-2}
    live = training(family, tmp_path / "live", peft_config=tiny.lora(**LORA), **settings)
    settings |= {"precompute": True, "precompute_dir": str(tmp_path / "files")}
    cached = training(family, tmp_path / "cached", peft_config=tiny.lora(**LORA), **settings)
    for trainer in (live, cached):
        trainer.train()
    assert tiny.losses(cached) == pytest.approx(tiny.losses(live), abs=2e-3)
    assert abs(tiny.losses(live)[1] - math.log(2)) > 1e-2


def test_both_stages_of_complex_po(family, tmp_path):
    """An expert is fine-tuned, and its LoRA is what the second stage learns from; that starts at ln 2."""
    (tmp_path / "tree.yaml").write_text(tiny.CRITERIA)
    settings = tiny.FAST | family.settings | {"max_steps": 2, "criteria": str(tmp_path / "tree.yaml")}
    expert = AttributeSFTTrainer(
        quiet_pipeline(family),
        args=AttributeSFTConfig(str(tmp_path / "expert"), **settings | {"learning_rate": 0.02}),
        train_dataset=tiny.paintings(),
        peft_config=tiny.lora(),
    )
    expert.train()
    expert.save_model()
    trainer = ComplexPOTrainer(
        quiet_pipeline(family),
        str(tmp_path / "expert"),
        args=ComplexPOConfig(str(tmp_path / "cpo"), **settings),
        train_dataset=tiny.paintings(),
        peft_config=tiny.lora(),
    )
    trainer.train()
    first, second = tiny.losses(trainer)
    assert first == pytest.approx(math.log(2), abs=1e-4)
    assert math.isfinite(second) and second != pytest.approx(first, abs=1e-6)


# ---- Samples ----


def test_samples_are_those_of_plain_diffusers(family, tmp_path):
    """The trainer samples what diffusers samples with the saved LoRA, in bfloat16 mixed precision as well as in float32."""
    trainer = training(family, tmp_path, peft_config=tiny.lora(**LORA), learning_rate=0.05)
    trainer.train()
    trainer.save_model()
    ours = trainer.sample(PROMPTS)
    pipeline, drawn = quiet_pipeline(family), []
    settings = {key: family.call[key] for key in trainer.backbone.sampling_settings}
    for load in (lambda: None, lambda: pipeline.load_lora_weights(tmp_path)):
        load()
        pipeline.transformer.eval()
        images = sample_images(
            pipeline, PROMPTS, trainer.args.seed, num_inference_steps=2, height=32, width=32, **settings
        )
        drawn.append(images)
    base, theirs, ours = (np.stack([np.asarray(image, int) for image in images]) for images in (*drawn, ours))
    assert ours.shape == (2, 32, 32, 3) and abs(ours - theirs).max() <= 1
    assert abs(ours - base).max() > 4


def test_a_mixed_precision_training_samples(family, tmp_path):
    """With what is frozen in bfloat16 and the VAE in float32, as a training loads them by name, samples are images."""
    family.make().save_pretrained(tmp_path / "pipeline")
    settings = tiny.FAST | family.settings | {"bf16": True, "max_steps": 1, "num_inference_steps": 2}
    trainer = InstanceDPOTrainer(
        str(tmp_path / "pipeline"),
        args=InstanceDPOConfig(str(tmp_path / "output"), use_cpu=True, **settings),
        train_dataset=tiny.pairs(2),
        peft_config=tiny.lora(),
    )
    assert trainer.policy.get_base_model().dtype == torch.bfloat16
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-2)
    (image,) = trainer.sample(["a cat"])
    assert image.size == (32, 32)


def test_negative_preference_guidance(family, tmp_path):
    """Every branch of guidance has its own adapter."""
    if family.guided is None:
        pytest.skip("the pipeline has no guidance")
    for index, name in enumerate(("aligned", "reversed")):
        trainer = training(
            family, tmp_path / name, peft_config=tiny.lora(), learning_rate=0.05, seed=index, max_steps=2
        )
        trainer.train()
        trainer.save_model()
    backbone = backbone_of(family, tmp_path)
    for name in ("aligned", "reversed"):
        backbone.pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
    with negative_preference_guidance(backbone.pipeline, "aligned", "reversed"):
        calls = guided_calls(family, backbone)
    timestep = backbone.pipeline.scheduler.timesteps[0]
    assert len(calls) == len(family.branches)
    for call, branches in zip(calls, family.branches, strict=True):
        for place, branch in enumerate(branches):
            alone = backbone_of(family, tmp_path)
            alone.pipeline.load_lora_weights(tmp_path / {"conditional": "aligned"}.get(branch, "reversed"))
            prompts = PROMPTS if branch == "conditional" else [None, None]
            with torch.no_grad():
                expected = alone.predict(
                    alone.denoiser,
                    call.latents.chunk(len(branches))[place],
                    timestep.expand(2),
                    conditions_of(alone, prompts, (32, 32)),
                )
            torch.testing.assert_close(call.prediction.chunk(len(branches))[place], expected, atol=1e-5, rtol=1e-5)


def guided_calls(family: Family, backbone: Backbone) -> list[Call]:
    """The calls of the first step, by the function that the pipeline calls, whatever adapters it uses inside."""
    transformer, calls = backbone.pipeline.transformer, []
    guided, signature = transformer.forward, inspect.signature(type(transformer).forward)

    def note(*args, **kwargs):
        output = guided(*args, **kwargs)
        arguments = signature.bind(transformer, *args, **kwargs).arguments
        calls.append(family.read_call(backbone, arguments, output, (32, 32)))
        return output

    transformer.forward = note
    try:
        backbone.pipeline(
            prompt=[*PROMPTS], height=32, width=32, num_inference_steps=1, output_type="latent", **family.guided
        )
    finally:
        transformer.forward = guided
    return calls
