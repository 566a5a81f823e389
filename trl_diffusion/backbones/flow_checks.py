# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a pipeline with a flow transformer must be so that it is trained rightly, see [`backbones.checks`]."""

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
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


CLIP, CLIP_WITH_PROJECTION, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
TEXT_ENCODERS = {
    StableDiffusion3Pipeline: {
        "text_encoder": CLIP_WITH_PROJECTION,
        "text_encoder_2": CLIP_WITH_PROJECTION,
        "text_encoder_3": T5,
    },
    FluxPipeline: {"text_encoder": CLIP, "text_encoder_2": T5},
}
TRANSFORMERS = {StableDiffusion3Pipeline: SD3Transformer2DModel, FluxPipeline: FluxTransformer2DModel}
# Attention processors that compute plain attention by the layers that are trained and saved
ATTENTION_PROCESSORS = {"JointAttnProcessor2_0", "XFormersJointAttnProcessor", "FluxAttnProcessor"}
# What of a transformer's configuration its inputs depend on
INPUTS = (
    "in_channels",
    "out_channels",
    "patch_size",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
)


def check_flow_pipeline(pipeline: DiffusionPipeline) -> None:
    """Refuses a pipeline of Stable Diffusion 3 or FLUX.1 that cannot be trained rightly."""
    encoders = text_encoders(pipeline)
    for name in ("scheduler", "transformer", "vae", *map(tokenizer_of, encoders), *encoders):
        if getattr(pipeline, name, None) is None:
            refuse(f"`{name}` is None", "training needs it", f"Load the pipeline without `{name}=None`")
    check_scheduler(pipeline.scheduler, is_flux=isinstance(pipeline, FluxPipeline))
    for name in ("transformer", "vae", *encoders):
        check_module(name, getattr(pipeline, name))
    check_transformer(pipeline)
    check_vae(pipeline)
    for name, wanted in encoders.items():
        check_text_encoder(pipeline, name, wanted)
    check_embeddings(pipeline)


def text_encoders(pipeline: DiffusionPipeline) -> dict[str, str]:
    """The classes of a pipeline's text encoders by name; Stable Diffusion 3 may be without T5 and its tokenizer."""
    encoders = next(names for kind, names in TEXT_ENCODERS.items() if isinstance(pipeline, kind))
    without_t5 = "text_encoder_3" in encoders and pipeline.text_encoder_3 is pipeline.tokenizer_3 is None
    return {name: wanted for name, wanted in encoders.items() if not (without_t5 and name == "text_encoder_3")}


def check_scheduler(scheduler: SchedulerMixin, is_flux: bool) -> None:
    """Refuses a scheduler that does not tell how the timesteps of a rectified flow are shifted."""
    name, config = type(scheduler).__name__, scheduler.config
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        refuse(
            f"`scheduler` is a `{name}`",
            "the timesteps of a rectified flow are shifted as its `FlowMatchEulerDiscreteScheduler` shifts them",
            "Load the model's own scheduler for training, and put the other one back for sampling",
        )
    correct = "Load the scheduler that belongs to the model"
    if config.invert_sigmas:
        refuse(
            f"`scheduler.config.invert_sigmas` is {config.invert_sigmas}", "these models start from the noise", correct
        )
    shifts = ("base_shift", "max_shift") if config.use_dynamic_shifting else ("shift",)
    for key in shifts:
        value = scheduler.shift if key == "shift" else config[key]
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            refuse(f"`scheduler.config.{key}` is {value!r}", "timesteps are shifted by it", correct)
    if is_flux and config.num_train_timesteps != 1000:
        refuse(
            f"`scheduler.config.num_train_timesteps` is {config.num_train_timesteps}",
            "a `FluxPipeline` divides timesteps by 1000, whatever the scheduler says",
            correct,
        )


def check_transformer(pipeline: DiffusionPipeline) -> None:
    """Refuses a transformer that needs more than noised latents, a timestep and a prompt."""
    transformer = pipeline.transformer
    wanted = next(wanted for kind, wanted in TRANSFORMERS.items() if isinstance(pipeline, kind))
    if type(transformer) is not wanted:
        refuse(
            f"`transformer` is a `{type(transformer).__name__}`",
            f"a `{type(pipeline).__name__}` has a `{wanted.__name__}`",
            f"Put the plain `{wanted.__name__}` into the pipeline",
        )
    processors = {type(processor).__name__ for processor in transformer.attn_processors.values()}
    if any("IPAdapter" in name for name in processors):
        refuse("`transformer` carries an IP-Adapter", "training has no image prompts", "Load the pipeline without it")
    is_fused = any(getattr(module, "fused_projections", False) for module in transformer.modules())
    if is_fused or (others := processors - ATTENTION_PROCESSORS):
        what = "fused projections" if is_fused else f"attention processors of the kind `{', '.join(sorted(others))}`"
        refuse(
            f"`transformer` has {what}",
            "they compute something else than the layers that are trained and saved",
            "Call `pipeline.transformer.unfuse_qkv_projections()`, or load the pipeline anew",
        )
    config = transformer.config
    if (config.out_channels or config.in_channels) != config.in_channels:
        refuse(
            f"`transformer.config.in_channels` is {config.in_channels} and `out_channels` is {config.out_channels}",
            "it takes more than the noised latents (inpainting, depth, image editing)",
            "Choose a text-to-image model, where both are the same",
        )


def check_vae(pipeline: DiffusionPipeline) -> None:
    """Refuses a VAE whose latents are not those that the pipeline decodes."""
    channels = pipeline.transformer.config.in_channels
    if isinstance(pipeline, FluxPipeline):
        channels //= 4  # 2x2 positions are packed into the channels
    check_vae_scale(pipeline, "transformer", channels)
    config = pipeline.vae.config
    shift = config.get("shift_factor")
    if not isinstance(shift, int | float) or not abs(shift) < float("inf"):
        refuse(
            f"`vae.config.shift_factor` is {shift!r}",
            f"a `{type(pipeline).__name__}` adds it to the latents when it decodes",
            "Call `pipeline.vae.register_to_config(shift_factor=0.0)` if the model was trained without a shift",
        )
    check_ignored(
        pipeline, {"latents_mean": (config.get("latents_mean"), 0), "latents_std": (config.get("latents_std"), 1)}
    )


def check_embeddings(pipeline: DiffusionPipeline) -> None:
    """Refuses text encoders whose embeddings are not of the width that the transformer takes."""
    config, clip = pipeline.transformer.config, pipeline.text_encoder.config
    if isinstance(pipeline, FluxPipeline):
        pooled, longest, t5 = clip.hidden_size, 0, pipeline.text_encoder_2
    else:
        clips = clip, pipeline.text_encoder_2.config
        pooled, longest = (sum(getattr(each, key) for each in clips) for key in ("projection_dim", "hidden_size"))
        t5 = pipeline.text_encoder_3
    widths = [("pooled_projection_dim", pooled)] + ([("joint_attention_dim", t5.config.d_model)] if t5 else [])
    for key, width in widths:
        if config[key] != width:
            refuse(
                f"`transformer.config.{key}` is {config[key]}, and the text encoders give {width}",
                "they belong to different models",
                "Load the text encoders that belong to the transformer",
            )
    if longest > config.joint_attention_dim:
        refuse(
            f"`transformer.config.joint_attention_dim` is {config.joint_attention_dim}, and the two CLIP encoders give {longest}",
            "they belong to different models",
            "Load the text encoders that belong to the transformer",
        )
    if pipeline.tokenizer_max_length != pipeline.tokenizer.model_max_length or (
        longest and pipeline.tokenizer_2.model_max_length != pipeline.tokenizer.model_max_length
    ):
        refuse(
            f"`tokenizer.model_max_length` is {pipeline.tokenizer.model_max_length}, and the pipeline pads to "
            f"{pipeline.tokenizer_max_length}",
            "prompts of both CLIP encoders are padded to one number of tokens, which is read when the pipeline is made",
            f"Set both tokenizers to the same, and make the pipeline anew, `{type(pipeline).__name__}(**pipeline.components)`",
        )


def check_flow_reference(pipeline: DiffusionPipeline, reference: DiffusionPipeline) -> None:
    """Refuses a reference that cannot be given what the policy is given, see [`backbones.checks.check_same_inputs`]."""
    check_other_weights(pipeline, reference, "transformer")
    own, other = (each.scheduler.config.num_train_timesteps for each in (pipeline, reference))
    if own != other:
        refuse_reference(f"its `scheduler.config.num_train_timesteps` is {other} and the policy's is {own}")
    if text_encoders(pipeline) != text_encoders(reference):
        refuse_reference("only one of them has T5")
    names = tuple(text_encoders(pipeline))
    check_same_inputs(pipeline, reference, "transformer", INPUTS, names, ("scaling_factor", "shift_factor"))
