# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What every pipeline must be so that it is trained rightly; each kind of family has a file for the rest.

The law behind every refusal: training must be what the pipeline samples with. Where a configuration changes the noise
schedule, the target, the inputs of the denoiser or the latents in a way that training does not follow, or where what is saved
would not be what was trained, the model is refused by name when it is loaded: each check raises a `ValueError` with the
component and the setting, the reason and the way out.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .offloading import is_offloaded_by_layer
from .quantization import describe_quantization, quantized_layers
from .vae import posterior_moments
from .weights import check_finite


HALF_PRECISION = 2**-8  # a little more than what rounding to bfloat16 or float16 changes


def class_of_diffusers(pipeline: DiffusionPipeline) -> type[DiffusionPipeline]:
    """The class of a pipeline, or the one of diffusers that its class was made from."""
    return next(parent for parent in type(pipeline).__mro__ if parent.__module__.partition(".")[0] == "diffusers")


def check_module(name: str, module: torch.nn.Module) -> None:
    """Refuses a component of the pipeline that cannot be moved, cast, trained and saved as it is."""
    if hasattr(module, "_orig_mod"):
        refuse(
            f"`{name}` is compiled by `torch.compile`",
            "adapters and saved weights would have other names",
            f"Pass the pipeline before compiling, or set `pipeline.{name} = pipeline.{name}._orig_mod`",
        )
    if getattr(module, "peft_config", None) or any(hasattr(child, "base_layer") for child in module.modules()):
        refuse(
            f"`{name}` carries LoRA adapters",
            "the saved model would not hold them",
            "Call `pipeline.unload_lora_weights()`, and name a LoRA as `initial_lora` to train it on; call `pipeline.fuse_lora()` "
            "before to train another one on top of it",
        )
    hooks = {type(child._hf_hook).__name__ for child in module.modules() if hasattr(child, "_hf_hook")}
    is_empty = any(parameter.is_meta for parameter in module.parameters()) and not hasattr(module, "awaits_weights")
    if hooks or is_empty:
        refuse(
            f"`{name}` is offloaded or spread over devices ({', '.join(sorted(hooks)) or 'weights on the meta device'})",
            "training moves the models itself",
            "Load the pipeline without `device_map`, and do not call `enable_model_cpu_offload()` or "
            "`enable_sequential_cpu_offload()` (`pipeline.reset_device_map()` or `pipeline.remove_all_hooks()` undo these)",
        )
    registries = [child._diffusers_hook for child in module.modules() if hasattr(child, "_diffusers_hook")]
    hooks = {hook for registry in registries for hook in registry.hooks}
    if hooks and not is_offloaded_by_layer(module):
        refuse(
            f"`{name}` has hooks of diffusers ({', '.join(sorted(hooks))})",
            "they offload, cast, cache or skip what training must compute",
            "Load the pipeline again and do not enable group offloading, layerwise casting or caching; `offload_encoders=True` has "
            "encoders pass through the GPU layer by layer",
        )
    quantized = {id(layer.weight) for layer in quantized_layers(module).values()}
    if quantized and name == "vae":
        refuse(
            f"`vae` is quantized ({describe_quantization(module)})",
            "its latents are what is trained on, and it is small",
            "Load it without `quantization_config`, and name the denoiser and text encoders in `components_to_quantize`",
        )
    for parameter in module.parameters():
        if id(parameter) in quantized:
            continue
        if type(parameter) is not torch.nn.Parameter or not parameter.is_floating_point() or parameter.itemsize < 2:
            refuse(
                f"`{name}` is quantized or sharded (it has a `{type(parameter).__name__}` of {parameter.dtype})",
                "such weights can be neither cast nor saved into a plain pipeline",
                "Load it without `quantization_config`, in float32, bfloat16 or float16, or under a LoRA in 4 or 8 bits by bitsandbytes",
            )
    check_finite(name, module)


def tokenizer_of(text_encoder_name: str) -> str:
    """Name of the tokenizer that belongs to a text encoder."""
    return text_encoder_name.replace("text_encoder", "tokenizer")


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer itself where a pipeline has one for texts and images."""
    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def check_vae_scale(
    pipeline: DiffusionPipeline,
    denoiser_name: str,
    denoiser_channels: int,
    wanted: type[torch.nn.Module] = AutoencoderKL,
    blocks: str = "block_out_channels",
) -> None:
    """
    Refuses a VAE of another class than the family's, without the denoiser's channels, or without a scale.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        denoiser_name (`str`):
            Name of the denoiser.
        denoiser_channels (`int`):
            Number of channels of the latents that the denoiser takes.
        wanted (`type`, *optional*, defaults to [`~diffusers.AutoencoderKL`]):
            Class of the VAE.
        blocks (`str`, *optional*, defaults to `"block_out_channels"`):
            Its setting that has an entry for each size of its features.

    Raises:
        `ValueError`: As all checks.
    """
    vae = pipeline.vae
    if not isinstance(vae, wanted):
        refuse(
            f"`vae` is a `{type(vae).__name__}`",
            f"training encodes images by an `{wanted.__name__}`",
            f"Train with the model's `{wanted.__name__}`, and put the other one back for sampling",
        )
    config, channels = vae.config, vae.config.latent_channels
    out_channels = config.get("out_channels", config.in_channels)  # an `AutoencoderDC` has one number for both
    if channels != denoiser_channels or config.in_channels != 3 or out_channels != 3:
        refuse(
            f"`vae` has `in_channels={config.in_channels}`, `out_channels={out_channels}` and "
            f"`latent_channels={channels}`, and `{denoiser_name}` takes latents of {denoiser_channels} channels",
            f"images have 3 channels, and `{denoiser_name}` takes the latents of the VAE alone",
            f"Load the VAE that belongs to `{denoiser_name}`",
        )
    if pipeline.vae_scale_factor != 2 ** (len(config[blocks]) - 1):
        refuse(
            f"`vae` has `{blocks}={config[blocks]}` and `pipeline.vae_scale_factor` is {pipeline.vae_scale_factor}",
            "the VAE was put into a pipeline that was made with another one",
            f"Make the pipeline anew, `{type(pipeline).__name__}(**pipeline.components)`",
        )
    scale = config.scaling_factor
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        refuse(
            f"`vae.config.scaling_factor` is {scale!r}",
            "the pipeline divides latents by it",
            "Set it to the model's, such as 0.18215 (Stable Diffusion), 0.13025 (Stable Diffusion XL), 1.5305 (Stable "
            "Diffusion 3), 0.3611 (FLUX.1) or 0.41407 (Sana)",
        )


def check_ignored(pipeline: DiffusionPipeline, values: dict[str, tuple[object, float]]) -> None:
    """Refuses settings of the VAE that the pipeline ignores: the value of each, and the one that means nothing."""
    for key, (value, neutral) in values.items():
        values = [] if value is None else [value] if isinstance(value, int | float) else list(value)
        if any(value != neutral for value in values):
            refuse(
                f"`vae.config.{key}` is {value!r}",
                f"a `{type(pipeline).__name__}` ignores it when it decodes, so that it is unclear what latents the model knows",
                f"If the model was trained without it, call `pipeline.vae.register_to_config({key}=None)`",
            )


def check_text_encoder(pipeline: DiffusionPipeline, name: str, wanted: str) -> None:
    """
    Refuses a text encoder of another kind, or with another tokenizer than its own.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline.
        name (`str`):
            Name of the encoder.
        wanted (`str`):
            Name of its class.

    Raises:
        `ValueError`: As all checks.
    """
    encoder, token = getattr(pipeline, name), tokenizer_of(name)
    tokenizer = plain_tokenizer(getattr(pipeline, token))
    if all(parent.__name__ != wanted for parent in type(encoder).__mro__):
        refuse(
            f"`{name}` is a `{type(encoder).__name__}`",
            f"the prompts of a `{type(pipeline).__name__}` are encoded by a `{wanted}`",
            f"Load the model's `{wanted}`",
        )
    rows = encoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        refuse(
            f"`{token}` has {len(tokenizer)} tokens and `{name}` has embeddings for {rows}",
            "tokens were added to the tokenizer only",
            f"Load them with `pipeline.load_textual_inversion(...)`, or load the model's own `{token}`",
        )
    # Only CLIP's prompts are padded to what the tokenizer says
    positions = encoder.config.max_position_embeddings if "CLIP" in wanted else tokenizer.model_max_length
    if tokenizer.model_max_length > positions:
        refuse(
            f"`{token}.model_max_length` is {tokenizer.model_max_length} and `{name}` takes {positions} tokens",
            "prompts are padded to the former",
            f"Set `pipeline.{token}.model_max_length = {positions}`",
        )


def refuse_reference(what: str) -> None:
    """Raises the error that says why a reference does not fit."""
    raise ValueError(
        f"`ref_model` does not fit the policy: {what}. It is given the policy's noised latents and text embeddings, so "
        "it must be of the same base model. Pass the model that the policy was made from, or leave `ref_model` out: the "
        "reference then is the model before training."
    )


def check_other_weights(pipeline: DiffusionPipeline, reference: DiffusionPipeline, denoiser_name: str) -> None:
    """Refuses a reference of another family, or one that shares the weights that are trained."""
    if class_of_diffusers(pipeline) is not class_of_diffusers(reference):
        refuse_reference(f"it is a `{type(reference).__name__}` and the policy is a `{type(pipeline).__name__}`")
    own, other = (describe_quantization(getattr(each, denoiser_name)) for each in (pipeline, reference))
    if own != other:
        refuse_reference(
            f"its `{denoiser_name}` is held in {other or 'full precision'} and the policy's in {own or 'full precision'}, so that they "
            "differ before anything is trained"
        )
    trained = {id(parameter) for parameter in getattr(pipeline, denoiser_name).parameters()}
    if any(id(parameter) in trained for parameter in getattr(reference, denoiser_name).parameters()):
        refuse_reference(f"its `{denoiser_name}` has the weights that are trained, and would move with them")


def check_same_inputs(
    pipeline: DiffusionPipeline,
    reference: DiffusionPipeline,
    denoiser_name: str,
    denoiser_keys: tuple[str, ...],
    encoder_names: tuple[str, ...],
    vae_keys: tuple[str, ...],
    moments: Callable[[torch.nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = posterior_moments,
) -> None:
    """
    Refuses a reference that cannot be given what the policy is given: latents and embeddings, made by the policy's pipeline.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The policy's pipeline.
        reference ([`~diffusers.DiffusionPipeline`]):
            The reference's pipeline.
        denoiser_name (`str`):
            Name of the denoiser.
        denoiser_keys (`tuple[str, ...]`):
            Settings of the denoiser that its inputs depend on.
        encoder_names (`tuple[str, ...]`):
            Names of the text encoders.
        vae_keys (`tuple[str, ...]`):
            Settings of the VAE that the scale of latents depends on.
        moments (`Callable`, *optional*, defaults to [`backbones.vae.posterior_moments`]):
            Encodes images by a VAE of the family.

    Raises:
        `ValueError`: If the reference does not fit.
    """
    for key in denoiser_keys:
        own, other = (getattr(each, denoiser_name).config.get(key) for each in (pipeline, reference))
        if own != other:
            refuse_reference(f"its `{denoiser_name}.config.{key}` is {other!r} and the policy's is {own!r}")
    for name in encoder_names:
        token = tokenizer_of(name)
        own, other = (
            (plain.get_vocab(), plain.model_max_length, tokenizer.chat_template)
            for tokenizer in (getattr(pipeline, token), getattr(reference, token))
            for plain in [plain_tokenizer(tokenizer)]
        )
        if own != other:
            refuse_reference(f"its `{token}` is another one")
    for name in encoder_names:
        if not same_weights(getattr(pipeline, name), getattr(reference, name)):
            refuse_reference(f"its `{name}` has other weights")
    for key in vae_keys:
        own, other = pipeline.vae.config.get(key), reference.vae.config.get(key)
        if own != other:
            refuse_reference(f"its `vae.config.{key}` is {other!r} and the policy's is {own!r}")
    if not same_latents(pipeline.vae, reference.vae, moments):
        refuse_reference("its `vae` encodes images to other latents")


def refuse(what: str, reason: str, way_out: str) -> None:
    """Raises the error that says what is wrong and where, why, and what to do."""
    raise ValueError(f"This model cannot be trained: {what}, but {reason}. {way_out}.")


@torch.no_grad()
def same_weights(module: torch.nn.Module, other: torch.nn.Module, parts: tuple[str, ...] = ("",)) -> bool:
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
def same_latents(
    vae: torch.nn.Module,
    other: torch.nn.Module,
    moments: Callable[[torch.nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> bool:
    """Whether two VAEs encode alike; there are encoders with other weights, made for float16, that do."""
    if same_weights(vae, other, ("encoder", "quant_conv")):
        return True
    colours = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    image = torch.nn.functional.interpolate(colours, size=(64, 64), mode="bilinear")
    (mean, _), (other_mean, _) = (moments(_plain_copy(each), image) for each in (vae, other))
    return mean.shape == other_mean.shape and bool((mean - other_mean).norm() <= 0.02 * mean.norm())


def _plain_copy(vae: torch.nn.Module) -> torch.nn.Module:
    """A copy in float32 on the CPU, without hooks."""
    plain = type(vae).from_config(vae.config).eval()
    plain.load_state_dict(vae.state_dict())
    return plain
