# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a pipeline of Stable Diffusion or Stable Diffusion XL must be so that it is trained rightly, see [`backbones.checks`]."""

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from .checks import (
    check_ignored,
    check_module,
    check_other_weights,
    check_same_inputs,
    check_text_encoder,
    check_vae_scale,
    refuse,
    refuse_reference,
    tokenizer_of,
)


# Schedulers that noise by `x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`, and that a pipeline can sample with
SCHEDULERS = {
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler", "SASolverScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
    "UniPCMultistepScheduler",
}
# How the names of others begin, and why they are refused
OTHER_SCHEDULERS = {
    ("EDM", "KarrasVe", "ScoreSde", "CosineDPM"): "it is for models of another noise process (EDM or score SDE)",
    ("Flow", "Piflow", "Helios", "LTX", "MiniMax"): "it is for rectified flows",
    ("LCM", "TCD", "CMStochastic", "SCM"): "it is for distilled models, which the training objective would undo",
    (
        "DDIMInverse",
        "DPMSolverMultistepInverse",
    ): "it goes from images to noise, so the pipeline cannot sample with it",
}
# What of a scheduler's configuration makes the noise schedule and the target
SCHEDULE_KEYS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    "prediction_type",
)
# What a UNet must have here, and what it needs with anything else
UNET_DEFAULTS = {
    "class_embed_type": (None, "class labels"),
    "num_class_embeds": (None, "class labels"),
    "time_cond_proj_dim": (None, "an embedding of the guidance scale, as models distilled by LCM do"),
    "attention_type": ("default", "boxes of objects (GLIGEN)"),
    "dual_cross_attention": (False, "a second condition"),
}
# Attention processors that compute plain attention by the layers `to_q`, `to_k`, `to_v` and `to_out`
ATTENTION_PROCESSORS = {
    *("AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "XLAFlashAttnProcessor2_0", "XFormersAttnProcessor"),
    *("SlicedAttnProcessor", "AttnAddedKVProcessor", "AttnAddedKVProcessor2_0", "SlicedAttnAddedKVProcessor"),
    "XFormersAttnAddedKVProcessor",
}


def check_pipeline(pipeline: DiffusionPipeline) -> None:
    """Refuses a pipeline that cannot be trained rightly: everything below but the comparison with a reference."""
    if pipeline.config.get("requires_aesthetics_score"):
        refuse(
            "the pipeline has `requires_aesthetics_score=True`",
            "the refiner of Stable Diffusion XL is given an aesthetic score and starts from half-noised images",
            "Train the base model, such as stabilityai/stable-diffusion-xl-base-1.0",
        )
    for name in ("scheduler", "unet", "vae", *_tokenizer_names(pipeline), *_text_encoder_names(pipeline)):
        if getattr(pipeline, name, None) is None:
            refuse(f"`{name}` is None", "training needs it", f"Load the pipeline without `{name}=None`")
    check_scheduler(pipeline.scheduler)
    for name in ("unet", "vae", *_text_encoder_names(pipeline)):
        check_module(name, getattr(pipeline, name))
    check_denoiser(pipeline)
    check_vae(pipeline)
    check_text_encoders(pipeline)


def training_schedule(scheduler: SchedulerMixin) -> tuple[torch.Tensor, str]:
    """
    Reads the noise schedule that a model was trained with, from the scheduler that it is sampled with.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]):
            The pipeline's scheduler.

    Returns:
        `tuple[torch.Tensor, str]`: `alphas_cumprod` of shape `(T,)`, float32 on the CPU, and what the model predicts,
        `"epsilon"` or `"v_prediction"`.

    Raises:
        `ValueError`: See [`check_scheduler`].
    """
    check_scheduler(scheduler)
    return _alphas_cumprod(scheduler), scheduler.config.prediction_type


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuses a scheduler whose model does not predict noise or velocity on the schedule of its configuration."""
    name, config = type(scheduler).__name__, scheduler.config
    correct = "If the model was trained so, choose another one; else correct the configuration of `pipeline.scheduler`"
    if SCHEDULERS.isdisjoint(parent.__name__ for parent in type(scheduler).__mro__):
        reasons = [reason for starts, reason in OTHER_SCHEDULERS.items() if name.startswith(starts)]
        refuse(
            f"`scheduler` is a `{name}`",
            *(reasons or ["its noise schedule is not known to be one of the DDPM kind"]),
            "If the model predicts noise or velocity on a schedule of the DDPM kind, replace the scheduler, for example by "
            "`DDIMScheduler(...)` with the model's betas; else choose a model of that kind",
        )
    prediction_type = config.get("prediction_type")
    velocity = prediction_type == "v_prediction"
    for key, refused, reason in (
        ("prediction_type", prediction_type not in ("epsilon", "v_prediction"), "only noise and velocity are known"),
        ("predict_epsilon", config.get("predict_epsilon") is False, "only noise and velocity are known"),
        ("use_flow_sigmas", config.get("use_flow_sigmas"), "a rectified flow has another noise process"),
        # These two stay in a configuration that was made out of that of a flow or an EDM scheduler
        ("shift", config.get("shift"), "a rectified flow has another noise process"),
        ("sigma_data", config.get("sigma_data"), "an EDM model has another noise process"),
        ("timestep_type", velocity and config.get("timestep_type") == "continuous", "the UNet is not given timesteps"),
        ("variance_type", str(config.get("variance_type")).startswith("learned"), "a variance has no objective here"),
    ):
        if refused:
            refuse(f"`scheduler.config.{key}` is {config.get(key)!r}", reason, correct)
    try:
        alphas_cumprod = _alphas_cumprod(scheduler)
    except NotImplementedError:
        refuse(
            f"`scheduler.config.beta_schedule` is {config.beta_schedule!r}",
            "`DDPMScheduler` does not know this noise schedule",
            correct,
        )
    own = scheduler.alphas_cumprod.to("cpu", torch.float32)
    if own.shape != (config.num_train_timesteps,) or not torch.allclose(own, alphas_cumprod, rtol=0, atol=1e-6):
        settings = {key: config[key] for key in SCHEDULE_KEYS if key in config and key != "trained_betas"}
        refuse(
            f"`scheduler` is a `{name}` that samples with another noise schedule than its configuration has, {settings}",
            "training would follow a schedule other than the one that is sampled with",
            "Correct the configuration, or use a scheduler that knows all of these settings, such as `DDIMScheduler`",
        )
    if not (own[0] < 1 and own[-1] >= 0 and (own.diff() <= 0).all()):  # false for NaN as well
        refuse(
            f"`scheduler.alphas_cumprod` goes from {own[0]:.4g} to {own[-1]:.4g}",
            "it must fall with each timestep, from below 1 to 0 or above",
            correct,
        )
    if alphas_cumprod[-1] == 0 and not velocity:
        refuse(
            "`scheduler.alphas_cumprod` ends in 0 (`rescale_betas_zero_snr`) and `prediction_type` is 'epsilon'",
            "at the last timestep nothing of the image is left, and the image does not follow from the noise",
            "Set `prediction_type='v_prediction'` if the model was trained so; else `rescale_betas_zero_snr=False`",
        )


def check_velocity(name: str, config: str) -> None:
    """Refuses the configuration of a model that predicts noise for a single file that says of itself that it predicts velocity."""
    prediction_type = DDPMScheduler.load_config(config, subfolder="scheduler").get("prediction_type")
    if prediction_type != "v_prediction":
        raise ValueError(
            f"{name} holds a model that predicts velocity (its key `v_pred`), and the scheduler of `config`, {config}, says "
            f"{prediction_type!r}. Pass a pipeline whose scheduler has `prediction_type='v_prediction'`."
        )


def check_denoiser(pipeline: DiffusionPipeline) -> None:
    """Refuses a UNet that needs more than noised latents, a timestep and a prompt, or predicts something else."""
    unet = pipeline.unet
    if type(unet) is not UNet2DConditionModel:
        refuse(
            f"`unet` is a `{type(unet).__name__}`",
            "training and the saved files are those of a `UNet2DConditionModel`",
            "Put the plain `UNet2DConditionModel` into the pipeline",
        )
    config, another = unet.config, "Choose a text-to-image model whose UNet does not"
    processors = {type(processor).__name__ for processor in unet.attn_processors.values()}
    if config.encoder_hid_dim_type == "ip_image_proj" or any("IPAdapter" in name for name in processors):
        refuse("`unet` carries an IP-Adapter", "training has no image prompts", "Call `pipeline.unload_ip_adapter()`")
    if others := processors - ATTENTION_PROCESSORS:
        undo = "unfuse_qkv_projections" if others == {"FusedAttnProcessor2_0"} else "unet.set_default_attn_processor"
        refuse(
            f"`unet` has attention processors of the kind `{', '.join(sorted(others))}`",
            "they compute something else than the layers that are trained and saved",
            f"Call `pipeline.{undo}()`",
        )
    if any(getattr(block, "s1", None) is not None for block in unet.up_blocks):
        refuse("`unet` has FreeU enabled", "the saved model would not have it", "Call `pipeline.disable_freeu()`")
    if config.in_channels != config.out_channels:
        refuse(
            f"`unet.config.in_channels` is {config.in_channels} and `out_channels` is {config.out_channels}",
            "it takes more than the noised latents (inpainting, depth, image editing), or predicts a variance",
            "Choose a text-to-image model, where both are the channels of the latents",
        )
    for key, (default, need) in UNET_DEFAULTS.items():
        if config[key] != default:
            refuse(f"`unet.config.{key}` is {config[key]!r}", f"the UNet needs {need}", another)
    if config.encoder_hid_dim_type not in (None, "text_proj"):
        refuse(f"`unet.config.encoder_hid_dim_type` is {config.encoder_hid_dim_type!r}", "it needs images", another)
    known = ("text_time",) if isinstance(pipeline, StableDiffusionXLPipeline) else (None, "text")
    if config.addition_embed_type not in known:
        refuse(
            f"`unet.config.addition_embed_type` is {config.addition_embed_type!r}",
            f"a `{type(pipeline).__name__}` feeds a UNet with {' or '.join(map(repr, known))}",
            "Load the model with the class of pipeline that it was made for",
        )


def default_sample_size(unet: UNet2DConditionModel) -> int:
    """
    Width and height of the latents that a UNet was trained at, for runs that are given no `resolution`.

    Args:
        unet ([`~diffusers.UNet2DConditionModel`]):
            The pipeline's UNet.

    Returns:
        `int`

    Raises:
        `ValueError`: If the configuration names none, or not a square.
    """
    size = unet.config.sample_size
    sizes = {size} if isinstance(size, int) else set(size or ())
    if len(sizes) != 1:
        raise ValueError(f"`unet.config.sample_size` is {size!r}, which is no square: pass `resolution`, in pixels.")
    return sizes.pop()


def check_vae(pipeline: DiffusionPipeline) -> None:
    """Refuses a VAE whose latents are not those that the pipeline decodes."""
    check_vae_scale(pipeline, "unet", pipeline.unet.config.in_channels)
    config, channels = pipeline.vae.config, pipeline.vae.config.latent_channels
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if isinstance(pipeline, StableDiffusionXLPipeline) and mean is not None and std is not None:
        if len(mean) != channels or len(std) != channels or channels != 4 or min(std) <= 0:
            refuse(
                f"`vae.config.latents_mean` is {mean!r} and `latents_std` is {std!r}",
                "the pipeline takes 4 of each, the latter positive",
                "Correct the configuration",
            )
        mean = std = None
    ignored = {"latents_mean": (mean, 0), "latents_std": (std, 1), "shift_factor": (config.get("shift_factor"), 0)}
    check_ignored(pipeline, ignored)


def check_text_encoders(pipeline: DiffusionPipeline) -> None:
    """Refuses text encoders whose embeddings are not what the UNet takes, and tokenizers that do not fit them."""
    unet, names = pipeline.unet.config, _text_encoder_names(pipeline)
    encoders = [getattr(pipeline, name) for name in names]
    tokenizers = [getattr(pipeline, name) for name in _tokenizer_names(pipeline)]
    for name, wanted in zip(names, ("CLIPTextModel", "CLIPTextModelWithProjection"), strict=False):
        check_text_encoder(pipeline, name, wanted)
    if len({tokenizer.model_max_length for tokenizer in tokenizers}) > 1:
        refuse(
            "`tokenizer` and `tokenizer_2` differ in `model_max_length`",
            "the embeddings of both encoders are joined token by token",
            "Set both to the same number of tokens",
        )
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if _embedding_widths(unet) != {width}:
        refuse(
            f"`unet` takes text embeddings of width {sorted(_embedding_widths(unet))} (`cross_attention_dim`) and "
            f"{' and '.join(f'`{name}`' for name in names)} give {width}",
            "they belong to different models",
            "Load the text encoders that belong to the UNet",
        )
    if len(encoders) == 2:
        width = 6 * unet.addition_time_embed_dim + encoders[1].config.projection_dim
        if width != unet.projection_class_embeddings_input_dim:
            refuse(
                f"`unet.config.projection_class_embeddings_input_dim` is {unet.projection_class_embeddings_input_dim}, "
                f"and the pooled prompt and the 6 numbers of sizes and crop give {width}",
                "it takes other numbers, as the refiner does",
                "Train a base model of Stable Diffusion XL with its own `text_encoder_2`",
            )


def check_reference(pipeline: DiffusionPipeline, reference: DiffusionPipeline) -> None:
    """
    Refuses a reference that cannot be given what the policy is given: noised latents, timesteps and embeddings, all made
    by the policy's pipeline. Its own size, and what it was trained on, do not matter.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The policy's pipeline.
        reference ([`~diffusers.DiffusionPipeline`]):
            The reference's pipeline, which [`check_pipeline`] has accepted.

    Raises:
        `ValueError`: If the reference does not fit.
    """
    check_other_weights(pipeline, reference, "unet")
    (alphas, prediction), (ref_alphas, ref_prediction) = map(
        training_schedule, (pipeline.scheduler, reference.scheduler)
    )
    if prediction != ref_prediction:
        refuse_reference(
            f"its `scheduler.config.prediction_type` is {ref_prediction!r} and the policy's is {prediction!r}"
        )
    if alphas.shape != ref_alphas.shape or not torch.allclose(alphas, ref_alphas, rtol=0, atol=1e-6):
        refuse_reference("the configuration of its `scheduler` gives another noise schedule")
    check_same_inputs(
        *(pipeline, reference, "unet"),
        ("in_channels", "out_channels", "addition_embed_type", "addition_time_embed_dim")
        + ("projection_class_embeddings_input_dim",),
        _text_encoder_names(pipeline),
        ("scaling_factor", "latents_mean", "latents_std"),
    )


def _text_encoder_names(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    return ("text_encoder", "text_encoder_2") if isinstance(pipeline, StableDiffusionXLPipeline) else ("text_encoder",)


def _tokenizer_names(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    return tuple(map(tokenizer_of, _text_encoder_names(pipeline)))


def _alphas_cumprod(scheduler: SchedulerMixin) -> torch.Tensor:
    """
    The schedule as DDPMScheduler computes it, in float32. Its `from_config` would replace those values of the
    configuration that are defaults of the scheduler's own class by defaults of `DDPMScheduler`, which are others.
    """
    values = {key: scheduler.config[key] for key in SCHEDULE_KEYS if key in scheduler.config}
    return DDPMScheduler(**values).alphas_cumprod.to("cpu", torch.float32)


def _embedding_widths(config) -> set[int]:
    """The widths of text embeddings that a UNet's blocks take; one, if it is sound."""
    width = config.encoder_hid_dim if config.encoder_hid_dim_type == "text_proj" else config.cross_attention_dim
    return {width} if isinstance(width, int) else set(width)
