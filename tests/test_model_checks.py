# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Models that cannot be trained rightly are refused by name; those that can are accepted, with the schedule that they sample with."""

import copy

import accelerate
import diffusers
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_processor import FusedAttnProcessor2_0, IPAdapterAttnProcessor2_0
from peft import LoraConfig
from transformers import T5Config, T5EncoderModel

from tests import tiny
from trl_diffusion.backbones.stable_diffusion_checks import (
    ATTENTION_PROCESSORS,
    SCHEDULERS,
    check_pipeline,
    check_reference,
    check_scheduler,
    default_sample_size,
    training_schedule,
)


SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LORA = LoraConfig(r=2, target_modules=["to_q"])
ALL_SCHEDULERS = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
# Constructor arguments that have no default
ARGUMENTS = {
    "AmusedScheduler": {"mask_token_id": 0},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}


def scheduler_of(name: str, **config):
    try:
        return getattr(diffusers, name)(**config)
    except ImportError:
        pytest.skip(f"{name} needs a package that is not installed")


def stored(config) -> dict:
    """A configuration as it is read from a file, where defaults are written out."""
    return {key: value for key, value in config.items() if key != "_use_default_values"}


def with_unet(pipeline, **config):
    """The pipeline with a UNet of a changed configuration."""
    pipeline.unet = UNet2DConditionModel.from_config({**stored(pipeline.unet.config), **config})
    return pipeline


def with_vae(pipeline, **config):
    """The pipeline with a VAE of a changed configuration."""
    pipeline.vae = AutoencoderKL.from_config({**stored(pipeline.vae.config), **config})
    return pipeline


# ---- Schedulers ----


@pytest.mark.parametrize(
    "config", [{}, SD, {**SD, "prediction_type": "v_prediction"}], ids=["default", "sd", "velocity"]
)
@pytest.mark.parametrize("name", ALL_SCHEDULERS)
def test_every_scheduler_has_the_schedule_that_is_trained_or_is_refused(name, config):
    """A scheduler of diffusers is accepted with exactly the noise schedule that it samples with, or refused by its name."""
    try:
        scheduler = getattr(diffusers, name)(**ARGUMENTS.get(name, {}), **config)
    except ImportError:
        pytest.skip(f"{name} needs a package that is not installed")
    except (TypeError, ValueError):
        assert name not in SCHEDULERS  # these know no betas at all
        return
    if name in SCHEDULERS:
        alphas_cumprod, prediction_type = training_schedule(scheduler)
        assert alphas_cumprod.dtype == torch.float32
        torch.testing.assert_close(alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-6)
        assert prediction_type == config.get("prediction_type", "epsilon")
    else:
        with pytest.raises(ValueError, match=f"`scheduler` is a `{name}`"):
            check_scheduler(scheduler)


def test_a_pipeline_of_each_accepted_scheduler_samples():
    """What is accepted is a scheduler that the pipeline samples with."""
    pipeline = tiny.sd_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    for name in sorted(SCHEDULERS):
        try:
            pipeline.scheduler = getattr(diffusers, name).from_config(tiny.scheduler().config)
        except ImportError:
            continue
        images = pipeline("a cat", num_inference_steps=4, output_type="pt", height=32, width=32).images
        assert torch.isfinite(images).all(), name


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_the_schedule_of_stable_diffusion_is_todays(name):
    """Whatever scheduler samples, the schedule is bit for bit that of `DDPMScheduler` with its configuration."""
    scheduler = scheduler_of(name, **SD)
    assert torch.equal(training_schedule(scheduler)[0], DDPMScheduler.from_config(scheduler.config).alphas_cumprod)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": True, "thresholding": True}),
        ("DDPMScheduler", {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"}),
        ("DDPMScheduler", {"beta_schedule": "laplace"}),
        ("DDPMScheduler", {"beta_schedule": "sigmoid"}),
        ("DDPMScheduler", {"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.4]}),
        ("DDIMScheduler", {"num_train_timesteps": 100}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),  # has no effect without velocity
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}),
    ],
)
def test_settings_that_training_follows_or_that_only_sampling_knows_are_accepted(name, config):
    """Other betas, and the settings of sampling, leave the schedule equal to the scheduler's own."""
    scheduler = scheduler_of(name, **{**SD, **config})
    torch.testing.assert_close(training_schedule(scheduler)[0], scheduler.alphas_cumprod, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
        *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    ],
)
def test_zero_terminal_snr(name):
    """With `rescale_betas_zero_snr` a velocity model's schedule ends in exactly 0 and keeps its beginning; a noise model is refused."""
    config = {**SD, "rescale_betas_zero_snr": True}
    scheduler = scheduler_of(name, **config, prediction_type="v_prediction")
    alphas_cumprod, prediction_type = training_schedule(scheduler)
    torch.testing.assert_close(alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-6)
    assert prediction_type == "v_prediction" and alphas_cumprod[-1] == 0
    plain = training_schedule(scheduler_of(name, **SD))[0]
    # arXiv:2305.08891, algorithm 1: sqrt(abar) is shifted to end in 0 and scaled to begin as before
    roots = plain.double().sqrt()
    expected = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    torch.testing.assert_close(alphas_cumprod.double(), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="ends in 0 .*rescale_betas_zero_snr.*'epsilon'.*v_prediction"):
        check_scheduler(scheduler_of(name, **config))


def test_a_default_of_another_class_is_not_replaced_by_that_of_ddpm():
    """A scheduler with betas of its own default keeps them; `DDPMScheduler.from_config` would take 0.0001 to 0.02."""
    scheduler = scheduler_of("HeunDiscreteScheduler")
    assert not torch.allclose(DDPMScheduler.from_config(scheduler.config).alphas_cumprod, scheduler.alphas_cumprod)
    assert training_schedule(scheduler)[0][0] == 1 - torch.tensor(0.00085)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("DDIMScheduler", {"prediction_type": "sample"}, "prediction_type` is 'sample'"),
        ("PNDMScheduler", {"prediction_type": "x0"}, "prediction_type` is 'x0'"),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction"},
            "prediction_type` is 'flow_prediction'",
        ),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas` is True"),
        ("DPMSolverSinglestepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas` is True"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas` is True"),
        ("DEISMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas` is True"),
        ("SASolverScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas` is True"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "timestep_type` is 'continuous'",
        ),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type` is 'learned_range'"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "variance_type` is 'learned'"),
        ("HeunDiscreteScheduler", {"beta_schedule": "exp"}, "beta_schedule` is 'exp'"),
        ("DDIMScheduler", {"trained_betas": [0.1, 0.2, 0.3]}, "another noise schedule"),
        ("DDIMScheduler", {"num_train_timesteps": 2, "trained_betas": [0.0, 0.2]}, "it must fall"),
        ("DDIMScheduler", {"num_train_timesteps": 2, "trained_betas": [0.1, 1.0]}, "ends in 0"),
        ("DDIMScheduler", {"num_train_timesteps": 2, "trained_betas": [0.1, float("nan")]}, "another noise schedule"),
    ],
)
def test_settings_that_change_training_are_refused(name, config, message):
    """Another target, another process or a schedule that cannot be followed is refused with the setting and its value."""
    with pytest.raises(ValueError, match=f"This model cannot be trained: `scheduler.*{message}"):
        check_scheduler(scheduler_of(name, **{**SD, **config}))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (diffusers.EDMEulerScheduler(), "EulerDiscreteScheduler", "sigma_data` is 0.5"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "DDIMScheduler", "shift` is 1.0"),
        (
            DDIMScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
            "PNDMScheduler",
            "another noise",
        ),
    ],
)
def test_a_converted_scheduler_does_not_hide_what_the_model_was_trained_with(source, target, message):
    """What stays in a configuration that was made out of another scheduler's is seen: the model did not change with it."""
    with pytest.raises(ValueError, match=message):
        check_scheduler(getattr(diffusers, target).from_config(stored(source.config)))


def test_the_old_name_of_the_prediction_type_is_seen():
    """`predict_epsilon=False` of old configurations, which diffusers ignores, is refused."""
    with pytest.raises(ValueError, match="predict_epsilon` is False"):
        check_scheduler(DDIMScheduler.from_config({**SD, "predict_epsilon": False}))


def test_a_scheduler_of_ones_own():
    """A subclass is accepted as long as it samples with the schedule of its configuration."""

    class Mine(EulerDiscreteScheduler):
        pass

    check_scheduler(Mine(**SD))
    scheduler = Mine(**SD)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    with pytest.raises(ValueError, match="`Mine` that samples with another noise schedule"):
        check_scheduler(scheduler)


# ---- What is right to train ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.UNETS)
def test_the_families_are_accepted(family, dtype):
    """Stable Diffusion with noise or velocity and Stable Diffusion XL are accepted in every precision, compared with themselves as well."""
    pipeline = tiny.PIPELINES[family]().to(dtype)
    check_pipeline(pipeline)
    check_reference(pipeline, tiny.PIPELINES[family]().to(torch.float32))


def sampling_settings(pipeline):
    pipeline.vae.enable_slicing()
    pipeline.vae.enable_tiling()
    pipeline.enable_attention_slicing()
    pipeline.vae.register_to_config(force_upcast=False)


def attention_processors(pipeline):
    pipeline.unet.set_default_attn_processor()


def mid_block(pipeline):
    with_unet(pipeline, mid_block_type=None, sample_size=None, conv_in_kernel=5, center_input_sample=True)


def neutral_statistics(pipeline):
    with_vae(pipeline, shift_factor=0.0, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def text_projection(pipeline):
    with_unet(pipeline, encoder_hid_dim_type="text_proj", encoder_hid_dim=16, cross_attention_dim=8)


def pooled_text(pipeline):
    with_unet(pipeline, addition_embed_type="text", addition_embed_type_num_heads=4)


def fused_lora(pipeline):
    pipeline.unet.add_adapter(LORA)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def undone(pipeline):
    """Everything that a message names as the way out."""
    pipeline.fuse_qkv_projections()
    pipeline.unfuse_qkv_projections()
    pipeline.enable_freeu(0.9, 0.2, 1.2, 1.4)
    pipeline.disable_freeu()
    accelerate.cpu_offload(pipeline.unet, execution_device="cpu")
    pipeline.remove_all_hooks()


def textual_inversion(pipeline):
    pipeline.tokenizer.add_tokens("<mine>")
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))


@pytest.mark.parametrize(
    "change",
    [
        *(sampling_settings, attention_processors, mid_block, neutral_statistics, text_projection, pooled_text),
        *(fused_lora, undone, textual_inversion),
    ],
)
def test_what_does_not_change_training_is_accepted(change):
    """Settings that training follows by calling the pipeline's own parts, and that still sample, are accepted."""
    pipeline = tiny.sd_pipeline()
    change(pipeline)
    check_pipeline(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a cat", num_inference_steps=1, output_type="pt", height=32, width=32).images
    assert torch.isfinite(images).all()


def test_statistics_of_each_channel_are_accepted_where_the_pipeline_decodes_with_them():
    """`StableDiffusionXLPipeline` decodes with `latents_mean` and `latents_std`, so that training can follow."""
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    check_pipeline(with_vae(tiny.sdxl_pipeline(), **statistics))
    for key in statistics:
        with pytest.raises(ValueError, match=f"vae.config.{key}` is .* ignores it"):
            check_pipeline(with_vae(tiny.sdxl_pipeline(), **{key: statistics[key]}))
    with pytest.raises(ValueError, match="takes 4 of each"):
        check_pipeline(with_vae(tiny.sdxl_pipeline(), latents_mean=[0.0], latents_std=[1.0]))


@pytest.mark.parametrize(
    ("sample_size", "expected"), [(8, 8), ((8, 8), 8), ([64, 64], 64), (None, None), ((8, 16), None), ([], None)]
)
def test_default_sample_size(sample_size, expected):
    """A square is a size; without one, the run must be given its resolution."""
    unet = tiny.sd_pipeline().unet
    unet.register_to_config(sample_size=sample_size)
    if expected is not None:
        assert default_sample_size(unet) == expected
    else:
        with pytest.raises(ValueError, match="pass `resolution`"):
            default_sample_size(unet)


# ---- What is not ----


class OtherUNet(UNet2DConditionModel):
    pass


def ip_adapter(pipeline):
    processor = IPAdapterAttnProcessor2_0(hidden_size=8, cross_attention_dim=16)
    name = next(name for name in pipeline.unet.attn_processors if "attn2" in name)
    pipeline.unet.set_attn_processor({**pipeline.unet.attn_processors, name: processor})


def attach_lora(pipeline):
    pipeline.unet.add_adapter(LORA)


def text_encoder_lora(pipeline):
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))


def lora_without_configuration(pipeline):
    attach_lora(pipeline)
    del pipeline.unet.peft_config


def quantize(pipeline):
    pipeline.unet.conv_in.weight = torch.nn.Parameter(pipeline.unet.conv_in.weight.to(torch.int8), requires_grad=False)


def float8(pipeline):
    pipeline.unet.conv_in.weight.data = pipeline.unet.conv_in.weight.data.to(torch.float8_e4m3fn)


def bitsandbytes(pipeline):
    from bitsandbytes.nn import Params4bit

    linear = pipeline.text_encoder.get_submodule("encoder.layers.0.mlp.fc1")
    linear.weight = Params4bit(linear.weight.data, requires_grad=False)


def group_offloading(pipeline):
    apply_group_offloading(
        pipeline.unet, torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def layerwise_casting(pipeline):
    apply_layerwise_casting(pipeline.unet, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def hidden_tokens(pipeline):
    pipeline.tokenizer.add_tokens("<mine>")


def set_part(**parts):
    """Puts components into a pipeline, each made when the test runs."""

    def change(pipeline):
        for name, make in parts.items():
            setattr(pipeline, name, make(pipeline) if make else None)

    change.__name__ = "-".join(parts)
    return change


def unet(**config):
    return lambda pipeline: with_unet(pipeline, **config)


def vae(**config):
    return lambda pipeline: with_vae(pipeline, **config)


def t5(pipeline):
    return T5EncoderModel(T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


REFUSED_SD = [
    # The UNet
    (unet(in_channels=9), "in_channels` is 9 and `out_channels` is 4"),
    (unet(in_channels=5), "in_channels` is 5"),
    (unet(in_channels=8), "in_channels` is 8"),
    (unet(out_channels=8), "`out_channels` is 8"),
    (unet(in_channels=3, out_channels=3), "`latent_channels=4`, and `unet` takes latents of 3 channels"),
    (unet(num_class_embeds=10), "num_class_embeds` is 10"),
    (unet(class_embed_type="timestep"), "class_embed_type` is 'timestep'"),
    (
        unet(class_embed_type="projection", projection_class_embeddings_input_dim=4),
        "class_embed_type` is 'projection'",
    ),
    (unet(time_cond_proj_dim=4), "time_cond_proj_dim` is 4"),
    (unet(attention_type="gated"), "attention_type` is 'gated'"),
    (unet(encoder_hid_dim_type="text_image_proj", encoder_hid_dim=16), "encoder_hid_dim_type` is 'text_image_proj'"),
    (unet(encoder_hid_dim_type="image_proj", encoder_hid_dim=16), "encoder_hid_dim_type` is 'image_proj'"),
    (unet(addition_embed_type="image", encoder_hid_dim=16), "addition_embed_type` is 'image'"),
    (unet(addition_embed_type="image_hint", encoder_hid_dim=16), "addition_embed_type` is 'image_hint'"),
    (unet(addition_embed_type="text_image"), "addition_embed_type` is 'text_image'"),
    (
        unet(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64),
        "addition_embed_type` is 'text_time', but a `StableDiffusionPipeline`",
    ),
    (unet(cross_attention_dim=32), "takes text embeddings of width \\[32\\]"),
    (set_part(unet=lambda pipeline: OtherUNet.from_config(pipeline.unet.config)), "`unet` is a `OtherUNet`"),
    (set_part(unet=lambda pipeline: torch.nn.DataParallel(pipeline.unet)), "`unet` is a `DataParallel`"),
    (set_part(unet=lambda pipeline: torch.compile(pipeline.unet)), "`unet` is compiled"),
    # What is attached to it
    (ip_adapter, "IP-Adapter.*unload_ip_adapter"),
    (lambda pipeline: pipeline.unet.register_to_config(encoder_hid_dim_type="ip_image_proj"), "IP-Adapter"),
    (lambda pipeline: pipeline.enable_freeu(0.9, 0.2, 1.2, 1.4), "FreeU.*disable_freeu"),
    (lambda pipeline: pipeline.fuse_qkv_projections(), "FusedAttnProcessor2_0.*unfuse_qkv_projections"),
    (attach_lora, "`unet` carries LoRA adapters"),
    (lora_without_configuration, "`unet` carries LoRA adapters"),
    (text_encoder_lora, "`text_encoder` carries LoRA adapters"),
    (quantize, "`unet` is quantized.*int8"),
    (float8, "`unet` is quantized.*float8"),
    (bitsandbytes, "`text_encoder` is quantized.*Params4bit"),
    (lambda pipeline: pipeline.unet.to("meta"), "`unet` is offloaded.*meta"),
    (lambda pipeline: pipeline.vae.to("meta"), "`vae` is offloaded.*meta"),
    (
        lambda pipeline: accelerate.cpu_offload_with_hook(pipeline.text_encoder, "cpu"),
        "`text_encoder` is offloaded.*CpuOffload",
    ),
    (lambda pipeline: accelerate.cpu_offload(pipeline.unet, "cpu"), "`unet` is offloaded.*AlignDevicesHook"),
    (group_offloading, "hooks of diffusers \\(group_offloading"),
    (layerwise_casting, "hooks of diffusers \\(layerwise_casting"),
    # The VAE
    (set_part(vae=lambda pipeline: AutoencoderTiny()), "`vae` is a `AutoencoderTiny`"),
    (
        set_part(vae=lambda pipeline: AsymmetricAutoencoderKL(norm_num_groups=8)),
        "`vae` is a `AsymmetricAutoencoderKL`",
    ),
    (set_part(vae=lambda pipeline: VQModel()), "`vae` is a `VQModel`"),
    (vae(latent_channels=16), "`latent_channels=16`"),
    (vae(in_channels=4), "`in_channels=4`"),
    (vae(out_channels=4), "`out_channels=4`"),
    (
        vae(block_out_channels=(8,), down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"]),
        "`vae` has `block_out_channels=.*vae_scale_factor` is 4",
    ),
    (vae(scaling_factor=None), "scaling_factor` is None"),
    (vae(scaling_factor=0.0), "scaling_factor` is 0.0"),
    (vae(shift_factor=0.1), "shift_factor` is 0.1"),
    (vae(latents_mean=[0.1] * 4), "latents_mean` is .*0.1"),
    (vae(latents_std=[0.5] * 4), "latents_std` is .*0.5"),
    (vae(latents_mean=[0.1] * 4, latents_std=[0.5] * 4), "StableDiffusionPipeline` ignores it"),
    # The text encoder and the tokenizer
    *[
        (set_part(**{name: None}), f"`{name}` is None")
        for name in ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
    ],
    (set_part(text_encoder=t5), "`text_encoder` is a `T5EncoderModel`"),
    (
        set_part(text_encoder=lambda pipeline: tiny.text_encoder(projection=True)),
        "`text_encoder` is a `CLIPTextModelWithProjection`",
    ),
    (hidden_tokens, "tokens were added to the tokenizer only"),
    (lambda pipeline: setattr(pipeline.tokenizer, "model_max_length", int(1e30)), "model_max_length = 12"),
    # The scheduler
    (set_part(scheduler=lambda pipeline: diffusers.EDMDPMSolverMultistepScheduler()), "EDM or score SDE"),
]
REFUSED_SDXL = [
    (
        unet(addition_embed_type=None, addition_time_embed_dim=None, projection_class_embeddings_input_dim=None),
        "addition_embed_type` is None, but a `StableDiffusionXLPipeline`",
    ),
    (unet(projection_class_embeddings_input_dim=5 * 8 + 16), "input_dim` is 56, and .* give 64"),
    (lambda pipeline: pipeline.register_to_config(requires_aesthetics_score=True), "requires_aesthetics_score=True"),
    (set_part(text_encoder=None, tokenizer=None), "`tokenizer` is None"),
    (set_part(text_encoder_2=lambda pipeline: tiny.text_encoder()), "`text_encoder_2` is a `CLIPTextModel`"),
    (lambda pipeline: setattr(pipeline.tokenizer_2, "model_max_length", 10), "differ in `model_max_length`"),
    (vae(shift_factor=0.1), "shift_factor` is 0.1"),
    (set_part(scheduler=lambda pipeline: diffusers.EDMDPMSolverMultistepScheduler()), "EDM or score SDE"),
    (set_part(scheduler=lambda pipeline: diffusers.FlowMatchEulerDiscreteScheduler()), "rectified flows"),
    (set_part(scheduler=lambda pipeline: diffusers.LCMScheduler()), "distilled"),
]


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [(tiny.sd_pipeline, *case) for case in REFUSED_SD] + [(tiny.sdxl_pipeline, *case) for case in REFUSED_SDXL],
)
def test_what_changes_training_is_refused(make, change, message):
    """One changed component is enough: the message names it, with the value, the reason and the way out."""
    pipeline = make()
    change(pipeline)
    with pytest.raises(ValueError, match=f"This model cannot be trained: .*{message}"):
        check_pipeline(pipeline)


def test_attention_processors_are_those_of_diffusers():
    """The known processors exist, and one that bypasses the trained layers is not among them."""
    from diffusers.models import attention_processor

    assert all(hasattr(attention_processor, name) for name in ATTENTION_PROCESSORS)
    assert FusedAttnProcessor2_0.__name__ not in ATTENTION_PROCESSORS


# ---- The reference ----


def shared_weights(reference, policy):
    reference.unet = policy.unet


def other_weights(name):
    def change(reference, policy):
        torch.manual_seed(7)
        module = getattr(reference, name)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)

    change.__name__ = f"other_{name}"
    return change


def on_reference(change):
    return lambda reference, policy: change(reference)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (tiny.sd_pipeline, shared_weights, "would move with them"),
        (tiny.sd_pipeline, other_weights("text_encoder"), "`text_encoder` has other weights"),
        (tiny.sd_pipeline, other_weights("vae"), "`vae` encodes images to other latents"),
        (tiny.sdxl_pipeline, other_weights("text_encoder_2"), "`text_encoder_2` has other weights"),
        (
            tiny.sd_pipeline,
            on_reference(vae(scaling_factor=0.13025)),
            "scaling_factor` is 0.13025 and the policy's is 0.18215",
        ),
        (
            tiny.sdxl_pipeline,
            on_reference(vae(latents_mean=[0.1] * 4, latents_std=[0.5] * 4)),
            "vae.config.latents_mean",
        ),
        (
            tiny.sd_pipeline,
            on_reference(set_part(scheduler=lambda _: tiny.scheduler(prediction_type="v_prediction"))),
            "prediction_type` is 'v_prediction' and the policy's is 'epsilon'",
        ),
        (
            tiny.sd_pipeline,
            on_reference(set_part(scheduler=lambda _: DDIMScheduler())),
            "`scheduler` gives another noise schedule",
        ),
        (
            tiny.sd_pipeline,
            on_reference(unet(in_channels=8, out_channels=8)),
            "in_channels` is 8 and the policy's is 4",
        ),
        (tiny.sd_pipeline, on_reference(hidden_tokens), "`tokenizer` is another one"),
    ],
)
def test_references_that_do_not_fit_are_refused(make, change, message):
    """A reference that is given latents, timesteps or embeddings of another kind than its own is refused by component."""
    policy, reference = make(), make()
    change(reference, policy)
    with pytest.raises(ValueError, match=f"`ref_model` does not fit the policy: .*{message}"):
        check_reference(policy, reference)


def test_a_reference_of_another_family_is_refused():
    """The family is the first thing that must agree."""
    with pytest.raises(
        ValueError, match="it is a `StableDiffusionXLPipeline` and the policy is a `StableDiffusionPipeline`"
    ):
        check_reference(tiny.sd_pipeline(), tiny.sdxl_pipeline())


def test_references_that_fit_are_accepted():
    """Another UNet, sample size, decoder, sampling scheduler or precision leaves what the reference is given as it is."""
    policy = tiny.sdxl_pipeline()
    reference = with_unet(tiny.sdxl_pipeline(), sample_size=16, layers_per_block=2)
    reference.scheduler = EulerDiscreteScheduler.from_config(reference.scheduler.config)
    other_weights("decoder")(reference.vae, None)
    check_reference(policy, reference.to(torch.bfloat16))
    check_reference(policy.to(torch.float16), reference)


def test_encoders_with_other_weights_that_encode_alike_are_accepted():
    """A VAE rescaled inside, as those made for float16 are, encodes alike; 5 % more in its mean is another VAE."""
    policy, reference = tiny.sd_pipeline(), tiny.sd_pipeline()
    block = reference.vae.encoder.down_blocks[0].resnets[0]
    with torch.no_grad():
        block.conv1.weight *= 8  # a norm follows
        block.conv1.bias *= 8
    assert not torch.equal(block.conv1.weight, policy.vae.encoder.down_blocks[0].resnets[0].conv1.weight)
    check_reference(policy, reference)
    with torch.no_grad():
        reference.vae.quant_conv.weight *= 1.05
        reference.vae.quant_conv.bias *= 1.05
    with pytest.raises(ValueError, match="encodes images to other latents"):
        check_reference(policy, reference)


def test_shared_components_apart_from_the_unet_are_accepted():
    """A reference may have the policy's own encoders, as pipelines made of shared components do, and is left as it was."""
    policy = tiny.sd_pipeline()
    unet = copy.deepcopy(policy.unet)
    reference = StableDiffusionPipeline(**{**policy.components, "unet": unet}, requires_safety_checker=False)
    before = tiny.weights(policy.vae)
    check_reference(policy, reference)
    assert tiny.max_difference(before, tiny.weights(policy.vae)) == 0
