# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a pipeline of Stable Diffusion or Stable Diffusion XL must be so that it is trained rightly.

The law behind every refusal: training must be what the pipeline samples with. Where a configuration changes the noise
schedule, the target, the inputs of the UNet or the latents in a way that training does not follow, or where what is saved
would not be what was trained, the model is refused by name when it is loaded: each check raises a `ValueError` with the
component and the setting, the reason and the way out.
"""

import copy

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
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
HALF_PRECISION = 2**-8  # a little more than what rounding to bfloat16 or float16 changes


def check_pipeline(pipeline: DiffusionPipeline) -> None:
    """Refuses a pipeline that cannot be trained rightly: everything below but the comparison with a reference."""
    if pipeline.config.get("requires_aesthetics_score"):
        _refuse(
            "the pipeline has `requires_aesthetics_score=True`",
            "the refiner of Stable Diffusion XL is given an aesthetic score and starts from half-noised images",
            "Train the base model, such as stabilityai/stable-diffusion-xl-base-1.0",
        )
    for name in ("scheduler", "unet", "vae", *_tokenizer_names(pipeline), *_text_encoder_names(pipeline)):
        if getattr(pipeline, name, None) is None:
            _refuse(f"`{name}` is None", "training needs it", f"Load the pipeline without `{name}=None`")
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
        _refuse(
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
            _refuse(f"`scheduler.config.{key}` is {config.get(key)!r}", reason, correct)
    try:
        alphas_cumprod = _alphas_cumprod(scheduler)
    except NotImplementedError:
        _refuse(
            f"`scheduler.config.beta_schedule` is {config.beta_schedule!r}",
            "`DDPMScheduler` does not know this noise schedule",
            correct,
        )
    own = scheduler.alphas_cumprod.to("cpu", torch.float32)
    if own.shape != (config.num_train_timesteps,) or not torch.allclose(own, alphas_cumprod, rtol=0, atol=1e-6):
        settings = {key: config[key] for key in SCHEDULE_KEYS if key in config and key != "trained_betas"}
        _refuse(
            f"`scheduler` is a `{name}` that samples with another noise schedule than its configuration has, {settings}",
            "training would follow a schedule other than the one that is sampled with",
            "Correct the configuration, or use a scheduler that knows all of these settings, such as `DDIMScheduler`",
        )
    if not (own[0] < 1 and own[-1] >= 0 and (own.diff() <= 0).all()):  # false for NaN as well
        _refuse(
            f"`scheduler.alphas_cumprod` goes from {own[0]:.4g} to {own[-1]:.4g}",
            "it must fall with each timestep, from below 1 to 0 or above",
            correct,
        )
    if alphas_cumprod[-1] == 0 and not velocity:
        _refuse(
            "`scheduler.alphas_cumprod` ends in 0 (`rescale_betas_zero_snr`) and `prediction_type` is 'epsilon'",
            "at the last timestep nothing of the image is left, and the image does not follow from the noise",
            "Set `prediction_type='v_prediction'` if the model was trained so; else `rescale_betas_zero_snr=False`",
        )


def check_module(name: str, module: torch.nn.Module) -> None:
    """Refuses a component of the pipeline that cannot be moved, cast, trained and saved as it is."""
    if hasattr(module, "_orig_mod"):
        _refuse(
            f"`{name}` is compiled by `torch.compile`",
            "adapters and saved weights would have other names",
            f"Pass the pipeline before compiling, or set `pipeline.{name} = pipeline.{name}._orig_mod`",
        )
    if getattr(module, "peft_config", None) or any(hasattr(child, "base_layer") for child in module.modules()):
        _refuse(
            f"`{name}` carries LoRA adapters",
            "the saved model would not hold them",
            "Call `pipeline.fuse_lora()` and `pipeline.unload_lora_weights()` to train on top of them, or only the latter "
            "to train without them",
        )
    hooks = {type(child._hf_hook).__name__ for child in module.modules() if hasattr(child, "_hf_hook")}
    is_empty = any(parameter.is_meta for parameter in module.parameters()) and not hasattr(module, "awaits_weights")
    if hooks or is_empty:
        _refuse(
            f"`{name}` is offloaded or spread over devices ({', '.join(sorted(hooks)) or 'weights on the meta device'})",
            "training moves the models itself",
            "Load the pipeline without `device_map`, and do not call `enable_model_cpu_offload()` or "
            "`enable_sequential_cpu_offload()` (`pipeline.reset_device_map()` or `pipeline.remove_all_hooks()` undo these)",
        )
    registries = [child._diffusers_hook for child in module.modules() if hasattr(child, "_diffusers_hook")]
    if hooks := {hook for registry in registries for hook in registry.hooks}:
        _refuse(
            f"`{name}` has hooks of diffusers ({', '.join(sorted(hooks))})",
            "they offload, cast, cache or skip what training must compute",
            "Load the pipeline again and do not enable group offloading, layerwise casting or caching",
        )
    for parameter in module.parameters():
        if type(parameter) is not torch.nn.Parameter or not parameter.is_floating_point() or parameter.itemsize < 2:
            _refuse(
                f"`{name}` is quantized or sharded (it has a `{type(parameter).__name__}` of {parameter.dtype})",
                "such weights can be neither cast nor saved into a plain pipeline",
                "Load it without `quantization_config`, in float32, bfloat16 or float16",
            )


def check_denoiser(pipeline: DiffusionPipeline) -> None:
    """Refuses a UNet that needs more than noised latents, a timestep and a prompt, or predicts something else."""
    unet = pipeline.unet
    if type(unet) is not UNet2DConditionModel:
        _refuse(
            f"`unet` is a `{type(unet).__name__}`",
            "training and the saved files are those of a `UNet2DConditionModel`",
            "Put the plain `UNet2DConditionModel` into the pipeline",
        )
    config, another = unet.config, "Choose a text-to-image model whose UNet does not"
    processors = {type(processor).__name__ for processor in unet.attn_processors.values()}
    if config.encoder_hid_dim_type == "ip_image_proj" or any("IPAdapter" in name for name in processors):
        _refuse("`unet` carries an IP-Adapter", "training has no image prompts", "Call `pipeline.unload_ip_adapter()`")
    if others := processors - ATTENTION_PROCESSORS:
        undo = "unfuse_qkv_projections" if others == {"FusedAttnProcessor2_0"} else "unet.set_default_attn_processor"
        _refuse(
            f"`unet` has attention processors of the kind `{', '.join(sorted(others))}`",
            "they compute something else than the layers that are trained and saved",
            f"Call `pipeline.{undo}()`",
        )
    if any(getattr(block, "s1", None) is not None for block in unet.up_blocks):
        _refuse("`unet` has FreeU enabled", "the saved model would not have it", "Call `pipeline.disable_freeu()`")
    if config.in_channels != config.out_channels:
        _refuse(
            f"`unet.config.in_channels` is {config.in_channels} and `out_channels` is {config.out_channels}",
            "it takes more than the noised latents (inpainting, depth, image editing), or predicts a variance",
            "Choose a text-to-image model, where both are the channels of the latents",
        )
    for key, (default, need) in UNET_DEFAULTS.items():
        if config[key] != default:
            _refuse(f"`unet.config.{key}` is {config[key]!r}", f"the UNet needs {need}", another)
    if config.encoder_hid_dim_type not in (None, "text_proj"):
        _refuse(f"`unet.config.encoder_hid_dim_type` is {config.encoder_hid_dim_type!r}", "it needs images", another)
    known = ("text_time",) if isinstance(pipeline, StableDiffusionXLPipeline) else (None, "text")
    if config.addition_embed_type not in known:
        _refuse(
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
    vae, unet, pipeline_name = pipeline.vae, pipeline.unet, type(pipeline).__name__
    if not isinstance(vae, AutoencoderKL):
        _refuse(
            f"`vae` is a `{type(vae).__name__}`",
            "training samples latents from the posterior of an `AutoencoderKL`",
            "Train with the model's `AutoencoderKL`, and put the other one back for sampling",
        )
    config, channels = vae.config, vae.config.latent_channels
    if channels != unet.config.in_channels or config.in_channels != 3 or config.out_channels != 3:
        _refuse(
            f"`vae` has `in_channels={config.in_channels}`, `out_channels={config.out_channels}` and "
            f"`latent_channels={channels}`, and `unet.config.in_channels` is {unet.config.in_channels}",
            "images have 3 channels, and the UNet takes the latents of the VAE alone",
            "Load the VAE that belongs to the UNet",
        )
    if pipeline.vae_scale_factor != 2 ** (len(config.block_out_channels) - 1):
        _refuse(
            f"`vae` has `block_out_channels={config.block_out_channels}` and `pipeline.vae_scale_factor` is {pipeline.vae_scale_factor}",
            "the VAE was put into a pipeline that was made with another one",
            f"Make the pipeline anew, `{pipeline_name}(**pipeline.components)`",
        )
    scale = config.scaling_factor
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        _refuse(
            f"`vae.config.scaling_factor` is {scale!r}",
            "the pipeline divides latents by it",
            "Set it to the model's, such as 0.18215 (Stable Diffusion) or 0.13025 (Stable Diffusion XL)",
        )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if isinstance(pipeline, StableDiffusionXLPipeline) and mean is not None and std is not None:
        if len(mean) != channels or len(std) != channels or channels != 4 or min(std) <= 0:
            _refuse(
                f"`vae.config.latents_mean` is {mean!r} and `latents_std` is {std!r}",
                "the pipeline takes 4 of each, the latter positive",
                "Correct the configuration",
            )
        mean = std = None
    ignored = {"latents_mean": (mean, 0), "latents_std": (std, 1), "shift_factor": (config.get("shift_factor"), 0)}
    for key, (value, neutral) in ignored.items():
        values = [] if value is None else [value] if isinstance(value, int | float) else list(value)
        if any(value != neutral for value in values):
            _refuse(
                f"`vae.config.{key}` is {value!r}",
                f"a `{pipeline_name}` ignores it when it decodes, so that it is unclear what latents the UNet knows",
                f"If the UNet was trained without it, call `pipeline.vae.register_to_config({key}=None)`",
            )


def check_text_encoders(pipeline: DiffusionPipeline) -> None:
    """Refuses text encoders whose embeddings are not what the UNet takes, and tokenizers that do not fit them."""
    unet, names = pipeline.unet.config, _text_encoder_names(pipeline)
    encoders = [getattr(pipeline, name) for name in names]
    tokenizers = [getattr(pipeline, name) for name in _tokenizer_names(pipeline)]
    for index, (name, encoder, tokenizer) in enumerate(zip(names, encoders, tokenizers, strict=True)):
        wanted = ("CLIPTextModel", "CLIPTextModelWithProjection")[index]
        if all(parent.__name__ != wanted for parent in type(encoder).__mro__):
            _refuse(
                f"`{name}` is a `{type(encoder).__name__}`",
                f"the prompts of a `{type(pipeline).__name__}` are encoded by a `{wanted}`",
                f"Load the model's `{wanted}`",
            )
        rows, positions = encoder.get_input_embeddings().num_embeddings, encoder.config.max_position_embeddings
        token = "tokenizer" + name.removeprefix("text_encoder")
        if len(tokenizer) > rows:
            _refuse(
                f"`{token}` has {len(tokenizer)} tokens and `{name}` has embeddings for {rows}",
                "tokens were added to the tokenizer only",
                f"Load them with `pipeline.load_textual_inversion(...)`, or load the model's own `{token}`",
            )
        if tokenizer.model_max_length > positions:
            _refuse(
                f"`{token}.model_max_length` is {tokenizer.model_max_length} and `{name}` takes {positions} tokens",
                "prompts are padded to the former",
                f"Set `pipeline.{token}.model_max_length = {positions}`",
            )
    if len({tokenizer.model_max_length for tokenizer in tokenizers}) > 1:
        _refuse(
            "`tokenizer` and `tokenizer_2` differ in `model_max_length`",
            "the embeddings of both encoders are joined token by token",
            "Set both to the same number of tokens",
        )
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if _embedding_widths(unet) != {width}:
        _refuse(
            f"`unet` takes text embeddings of width {sorted(_embedding_widths(unet))} (`cross_attention_dim`) and "
            f"{' and '.join(f'`{name}`' for name in names)} give {width}",
            "they belong to different models",
            "Load the text encoders that belong to the UNet",
        )
    if len(encoders) == 2:
        width = 6 * unet.addition_time_embed_dim + encoders[1].config.projection_dim
        if width != unet.projection_class_embeddings_input_dim:
            _refuse(
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

    def refuse(what: str) -> None:
        raise ValueError(
            f"`ref_model` does not fit the policy: {what}. It is given the policy's noised latents and text embeddings, so "
            "it must be of the same base model. Pass the model that the policy was made from, or leave `ref_model` out: the "
            "reference then is the model before training."
        )

    if type(pipeline) is not type(reference):
        refuse(f"it is a `{type(reference).__name__}` and the policy is a `{type(pipeline).__name__}`")
    trained = {id(parameter) for parameter in pipeline.unet.parameters()}
    if any(id(parameter) in trained for parameter in reference.unet.parameters()):
        refuse("its `unet` has the weights that are trained, and would move with them")

    (alphas, prediction), (ref_alphas, ref_prediction) = map(
        training_schedule, (pipeline.scheduler, reference.scheduler)
    )
    if prediction != ref_prediction:
        refuse(f"its `scheduler.config.prediction_type` is {ref_prediction!r} and the policy's is {prediction!r}")
    if alphas.shape != ref_alphas.shape or not torch.allclose(alphas, ref_alphas, rtol=0, atol=1e-6):
        refuse("the configuration of its `scheduler` gives another noise schedule")

    inputs = ("in_channels", "out_channels", "addition_embed_type", "addition_time_embed_dim")
    for key in (*inputs, "projection_class_embeddings_input_dim"):
        own, other = getattr(pipeline.unet.config, key), getattr(reference.unet.config, key)
        if own != other:
            refuse(f"its `unet.config.{key}` is {other!r} and the policy's is {own!r}")
    for name in _tokenizer_names(pipeline):
        own, other = getattr(pipeline, name), getattr(reference, name)
        if own.get_vocab() != other.get_vocab() or own.model_max_length != other.model_max_length:
            refuse(f"its `{name}` is another one")
    for name in _text_encoder_names(pipeline):
        if not _same_weights(getattr(pipeline, name), getattr(reference, name)):
            refuse(f"its `{name}` has other weights")

    for key in ("scaling_factor", "latents_mean", "latents_std"):
        own, other = pipeline.vae.config.get(key), reference.vae.config.get(key)
        if own != other:
            refuse(f"its `vae.config.{key}` is {other!r} and the policy's is {own!r}")
    if not _same_latents(pipeline.vae, reference.vae):
        refuse("its `vae` encodes images to other latents")


def _refuse(what: str, reason: str, way_out: str) -> None:
    """Raises the error that says what is wrong and where, why, and what to do."""
    raise ValueError(f"This model cannot be trained: {what}, but {reason}. {way_out}.")


def _text_encoder_names(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    return ("text_encoder", "text_encoder_2") if isinstance(pipeline, StableDiffusionXLPipeline) else ("text_encoder",)


def _tokenizer_names(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    return ("tokenizer", "tokenizer_2") if isinstance(pipeline, StableDiffusionXLPipeline) else ("tokenizer",)


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


@torch.no_grad()
def _same_weights(module: torch.nn.Module, other: torch.nn.Module, parts: tuple[str, ...] = ("",)) -> bool:
    """Whether two modules have the same weights in these parts, but for the rounding of half precision."""
    weights, others = (
        {name: weight for name, weight in each.named_parameters() if name.startswith(parts)}
        for each in (module, other)
    )
    if {name: weight.shape for name, weight in weights.items()} != {name: w.shape for name, w in others.items()}:
        return False
    for name, weight in weights.items():
        weight, other_weight = weight.float(), others[name].to(weight.device, torch.float32)
        if not (weight - other_weight).norm() <= HALF_PRECISION * weight.norm():  # so that NaN differs
            return False
    return True


@torch.no_grad()
def _same_latents(vae: AutoencoderKL, other: AutoencoderKL) -> bool:
    """Whether two VAEs encode alike; there are encoders with other weights, made for float16, that do."""
    if _same_weights(vae, other, ("encoder", "quant_conv")):
        return True
    colours = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    image = torch.nn.functional.interpolate(colours, size=(64, 64), mode="bilinear")
    mean, other_mean = (
        copy.deepcopy(each).to("cpu", torch.float32).encode(image).latent_dist.mean for each in (vae, other)
    )
    return mean.shape == other_mean.shape and bool((mean - other_mean).norm() <= 0.02 * mean.norm())
