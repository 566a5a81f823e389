# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Stable Diffusion 3 and FLUX.1 are trained as their pipelines sample: the same calls, the same timesteps, the same ODE."""

import diffusers
import pytest
import torch

from tests import tiny
from tests.test_process import chi_squared
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import load_backbone
from trl_diffusion.inversion import invert_latents
from trl_diffusion.trainer.diffusion_config import configure_backbone


PROMPTS = ["a cat", "a red circle and a blue square and a dog and a cat"]
SHORT = {"max_sequence_length": 16}
BY_SIZE = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
PIPELINES = {
    "sd3": tiny.sd3_pipeline,
    "sd3 without T5": lambda **settings: tiny.sd3_pipeline(has_t5=False, **settings),
    "sd3, shift by size": lambda: tiny.sd3_pipeline(**BY_SIZE),
    "dev": tiny.flux_pipeline,
    "schnell": lambda **settings: tiny.flux_pipeline(guidance_embeds=False, **settings),
}
FAMILIES = ["sd3", "dev"]


def backbone_of(name: str, **settings):
    pipeline = PIPELINES[name](**settings)
    pipeline.set_progress_bar_config(disable=True)
    backbone = load_backbone(pipeline)
    backbone.configure(16, 3.5 if name == "dev" else None)
    return backbone


def latents_of_call(backbone, packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What a call of the transformer is given, as latents `(B, C, h, w)`."""
    if packed.ndim == 4:
        return packed
    return backbone.pipeline._unpack_latents(packed, height, width, backbone.vae_scale_factor)


def keys(num: int) -> list[tuple]:
    return [(0, 0, f"row-{index}") for index in range(num)]


# ---- The same calls ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_prediction_is_the_pipelines_own(name, size, dtype):
    """Same latents, times and prompts of several lengths: the transformer gives what it gives while the pipeline samples."""
    backbone, calls = backbone_of(name), []
    pipeline = backbone.pipeline.to(dtype)
    pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    guidance = {"guidance_scale": 3.5 if name == "dev" else 1.0}
    pipeline(PROMPTS, height=size[0], width=size[1], num_inference_steps=3, output_type="latent", **SHORT, **guidance)
    timesteps = pipeline.scheduler.timesteps
    assert len(calls) == len(timesteps) == 3
    conditions = backbone.encode_prompts(PROMPTS)
    for (kwargs, output), timestep in zip(calls[:3], timesteps, strict=True):
        latents = latents_of_call(backbone, kwargs["hidden_states"], *size)
        assert latents.shape == (2, 4, size[0] // 4, size[1] // 4) and latents.dtype == dtype
        with torch.no_grad():
            prediction = backbone.predict(pipeline.transformer, latents, timestep.expand(2), conditions)
            other = backbone.predict(pipeline.transformer, latents, timestep.expand(2) / 2, conditions)
        expected = latents_of_call(backbone, output, *size)
        torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
        assert (other - expected).abs().max() > 1e-3, "the time makes no difference"


@pytest.mark.parametrize("name", ["sd3", "sd3 without T5"])
def test_the_unconditional_branch_is_the_pipelines(name):
    """A dropped prompt is what classifier-free guidance puts in front of the prompt."""
    backbone, calls = backbone_of(name), []
    backbone.pipeline.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs), with_kwargs=True
    )
    backbone.pipeline(PROMPTS, num_inference_steps=1, guidance_scale=2.0, output_type="latent", **SHORT)
    conditions = backbone.encode_prompts([None, None, *PROMPTS])
    torch.testing.assert_close(calls[0]["encoder_hidden_states"], conditions["prompt_embeds"])
    torch.testing.assert_close(calls[0]["pooled_projections"], conditions["pooled_prompt_embeds"])


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_are_what_the_pipeline_decodes(name):
    """The pipeline decodes z / scale + shift: of the backbone's latents, that is the VAE's own mean."""
    backbone = backbone_of(name)
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = backbone.pipeline.vae.config
    with torch.no_grad():
        mean, std = backbone.encode_images(images)
        expected = backbone.pipeline.vae.encode(images).latent_dist
    torch.testing.assert_close(mean / config.scaling_factor + config.shift_factor, expected.mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(std / config.scaling_factor, expected.std, atol=1e-6, rtol=1e-6)


def test_only_dev_is_told_a_guidance_scale():
    """dev is told 1 if nothing is said, and what is said changes its prediction; schnell and Stable Diffusion 3 have no choice."""
    backbone = load_backbone(tiny.flux_pipeline())
    assert backbone.embedded_guidance == 1.0
    conditions, latents = backbone.encode_prompts(PROMPTS), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        one = backbone.predict(backbone.denoiser, latents, torch.tensor([300.0, 700.0]), conditions)
        backbone.configure(None, 3.5)
        more = backbone.predict(backbone.denoiser, latents, torch.tensor([300.0, 700.0]), conditions)
    assert (one - more).abs().max() > 1e-3
    for pipeline in (tiny.flux_pipeline(guidance_embeds=False), tiny.sd3_pipeline(), tiny.sd_pipeline()):
        with pytest.raises(ValueError, match="`embedded_guidance` is 3.5, but this .* leaves no choice"):
            load_backbone(pipeline).configure(None, 3.5)


def test_t5_reads_what_clip_cannot(caplog):
    """
    A prompt longer than CLIP's limit fits where T5 has tokens for it; the end of it changes the embeddings. Nothing is said of
    CLIP, and what T5 does not read is said.
    """
    diffusers.utils.logging.enable_propagation()
    long = " ".join(["a", *["and a"] * 6, "cat"])
    assert len(tiny.tokenizer()(long).input_ids) > tiny.tokenizer().model_max_length
    for name in ("sd3", "dev"):
        backbone = backbone_of(name)
        assert backbone.fits(long) and not backbone.fits(f"{long} {long}")
        first, second = (
            backbone.encode_prompts([text])["prompt_embeds"] for text in (long, long.replace("cat", "dog"))
        )
        assert (first - second).abs().max() > 1e-3
        assert "truncated" not in caplog.text
        backbone.encode_prompts([f"{long} {long}"])
        assert "`max_sequence_length` is set to" in caplog.text and "CLIP" not in caplog.text
        caplog.clear()
    backbone = backbone_of("sd3 without T5")
    assert not backbone.fits(long), "without T5, CLIP must read all of it"
    backbone.encode_prompts([long])
    assert "CLIP can only handle" in caplog.text


# ---- The same timesteps ----


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sd3", {"shift": 3.0}),
        ("sd3", BY_SIZE),
        ("schnell", {"shift": 1.0}),
        ("dev", {}),
        ("dev", {"base_shift": 1.0, "max_shift": 3.0}),
        ("dev", {"time_shift_type": "linear", "base_shift": 2.0, "max_shift": 3.0}),
        ("dev", {"shift_terminal": 0.2}),
    ],
)
@pytest.mark.parametrize("size", [(8, 8), (16, 12)])
def test_timesteps_are_distributed_as_the_pipelines_schedule(name, settings, size):
    """
    Between two timesteps of the pipeline's schedule that are a twentieth of its steps apart, there is a twentieth of the sampled
    timesteps, by Pearson's chi-squared: the shift, its growth with the size, and the terminal stretch are the pipeline's.
    """
    backbone = backbone_of(name, **settings)
    pipeline, scale = backbone.pipeline, backbone.vae_scale_factor

    def interrupt(pipeline, step, timestep, tensors):
        pipeline._interrupt = True
        return tensors

    pipeline(
        "a cat",
        height=size[0] * scale,
        width=size[1] * scale,
        num_inference_steps=1000,
        output_type="latent",
        callback_on_step_end=interrupt,
        **SHORT,
    )
    schedule = pipeline.scheduler.timesteps.flip(0)
    assert len(schedule) == 1000
    sampled = backbone.process.sample_timesteps(keys(6000), size)
    assert sampled.min() > 1000 * settings.get("shift_terminal", 0) and sampled.max() <= 1000
    shares = torch.searchsorted(schedule, sampled) / len(schedule)
    assert chi_squared(sampled, shares) < 5
    if settings != {"shift": 1.0}:
        assert chi_squared(sampled, sampled / 1000) > 5, "the timesteps are not shifted"


def test_larger_images_are_shifted_further():
    """FLUX.1 dev and Stable Diffusion 3.5 with a shift by size: more patches, more noise; a static shift has one distribution."""
    for name, grows in (("dev", True), ("sd3, shift by size", True), ("sd3", False)):
        small, large = (
            backbone_of(name).process.sample_timesteps(keys(200), size).mean() for size in ((8, 8), (16, 16))
        )
        assert (large > small + 10) if grows else (large == small)


@pytest.mark.parametrize(
    ("settings", "mean", "median"),
    [
        ({"timestep_density": "uniform"}, 500, 500),
        ({"timestep_density": "logit_normal"}, 500, 500),
        ({"timestep_density": "logit_normal", "logit_mean": 1.0}, 697, 731),
        ({"timestep_density": "mode", "mode_scale": 1.0}, 500, 500),
    ],
)
def test_densities_are_those_of_a_configuration(tmp_path, settings, mean, median):
    """
    Mean and median of 4,000 timesteps; the spread tells the densities apart. A mean of the logit above 0 favours the noise.
    (Logit-normal (1, 1): median sigmoid(1) = .731, mean .697 by quadrature.)
    """
    backbone = load_backbone(tiny.flux_pipeline(guidance_embeds=False))
    configure_backbone(backbone, InstanceDPOConfig(str(tmp_path), **settings))
    sampled = backbone.process.sample_timesteps(keys(4000), (8, 8))
    assert sampled.mean().item() == pytest.approx(mean, abs=15)
    assert sampled.median().item() == pytest.approx(median, abs=20)
    # uniform 1000 / sqrt(12); logit-normal 0.208 and 0.183 by quadrature; mode as SD3's f of a uniform number
    u = torch.linspace(0, 1, 100_001)
    mode = 1 - u - (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)
    deviation = {"uniform": 288.7, "mode": 1000 * mode.std().item()}.get(settings["timestep_density"])
    deviation = deviation or (181 if "logit_mean" in settings else 208)
    assert sampled.std().item() == pytest.approx(deviation, rel=0.05)


def test_densities_are_for_flows(tmp_path):
    """A UNet's timesteps are uniform, and a density that is asked for is refused, not ignored."""
    args = InstanceDPOConfig(str(tmp_path), timestep_density="logit_normal", **tiny.FAST)
    with pytest.raises(ValueError, match="`timestep_density` is 'logit_normal', but a `StableDiffusionPipeline`"):
        InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timestep_density": "beta"}, "timestep_density"),
        ({"logit_std": 0.0}, "`logit_std` is a standard deviation"),
        ({"mode_scale": 2.0}, "`mode_scale` must lie between -1 and 1.75"),
        ({"max_sequence_length": 0}, "`max_sequence_length` is 0"),
        ({"max_sequence_length": 1025}, "`max_sequence_length` is 1025"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        InstanceDPOConfig(str(tmp_path), **settings)


# ---- The same ODE ----


@pytest.mark.parametrize("name", FAMILIES)
def test_inversion_then_sampling_returns(name):
    """
    The pipeline's scheduler takes inverted latents back to the image, up to the error of a first-order solver: it halves as the
    steps double.
    """
    backbone = backbone_of(name)
    conditions, generator = backbone.encode_prompts(PROMPTS), torch.Generator().manual_seed(0)
    latents, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([800.0, 800.0])

    def predict(x: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return backbone.predict(
            backbone.denoiser, x, t.float(), {key: value[rows] for key, value in conditions.items()}
        )

    errors = []
    for num_steps in (20, 40, 80, 160):
        with torch.no_grad():
            moved = invert_latents(predict, latents, timesteps, backbone.process, num_steps)
            levels = torch.tensor(backbone.process.inversion_timesteps(800.0, num_steps)).flip(0)
            scheduler = tiny.flow_scheduler(shift=1.0)
            scheduler.set_timesteps(sigmas=(levels / 1000).tolist())
            for timestep in scheduler.timesteps:
                model_pred = predict(moved, timestep.expand(2), torch.arange(2))
                moved = scheduler.step(model_pred, timestep, moved, return_dict=False)[0]
        errors.append((moved - latents).norm().item())
    ratios = [before / after for before, after in zip(errors, errors[1:])]
    assert ratios == pytest.approx([2.0] * 3, rel=0.15)
    assert errors[-1] < 0.05 * latents.norm().item()


# ---- Loading ----


@pytest.mark.parametrize("make", [lambda: tiny.sd3_pipeline(has_t5=False), tiny.sd3_pipeline, tiny.flux_pipeline])
@pytest.mark.parametrize("settings", [{}, {"without_denoiser": True}])
def test_pipelines_load_by_name(tmp_path, make, settings):
    """A folder gives what was saved, also Stable Diffusion 3 without T5, and also where the transformer comes last."""
    pipeline = make()
    pipeline.save_pretrained(tmp_path)
    backbone, expected = load_backbone(str(tmp_path), **settings), load_backbone(pipeline)
    backbone.load_denoiser()
    assert backbone.text_encoder_names == expected.text_encoder_names
    assert backbone.settings == expected.settings
    conditions, latents = expected.encode_prompts(PROMPTS), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(backbone.encode_prompts(PROMPTS), conditions)
    timesteps = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        own, other = (each.predict(each.denoiser, latents, timesteps, conditions) for each in (backbone, expected))
    torch.testing.assert_close(own, other)
