# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a pipeline of Sana must be so that it is trained rightly, see [`backbones.checks`]."""

from diffusers import AutoencoderDC, DiffusionPipeline, DPMSolverMultistepScheduler, SchedulerMixin

from . import flow_checks
from .checks import check_vae_scale, refuse


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """
    Refuses a scheduler that does not tell how the pipeline shifts its timesteps: the `DPMSolverMultistepScheduler` that the models
    come with tells it by `flow_shift`, a `FlowMatchEulerDiscreteScheduler` by `shift`.
    """
    config, correct = scheduler.config, "Load the scheduler that belongs to the model"
    if not isinstance(scheduler, DPMSolverMultistepScheduler):
        flow_checks.check_scheduler(scheduler)
        if config.use_dynamic_shifting:
            refuse(
                f"`scheduler.config.use_dynamic_shifting` is {config.use_dynamic_shifting}",
                "a `SanaPipeline` gives its scheduler no `mu`",
                correct,
            )
        return
    if config.prediction_type != "flow_prediction" or not config.use_flow_sigmas:
        refuse(
            f"`scheduler` has `prediction_type={config.prediction_type!r}` and `use_flow_sigmas={config.use_flow_sigmas}`",
            "the model is a rectified flow",
            f"{correct}: it has 'flow_prediction' and True",
        )
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
        if config[key]:
            refuse(f"`scheduler.config.{key}` is {config[key]}", "it goes before the schedule of the flow", correct)
    shift = config.flow_shift
    if not isinstance(shift, int | float) or not 0 < shift < float("inf"):
        refuse(f"`scheduler.config.flow_shift` is {shift!r}", "timesteps are shifted by it", correct)


def check_parts(pipeline: DiffusionPipeline) -> None:
    """Refuses a transformer that is told a guidance scale, another VAE than its own, or another text encoder."""
    config, width = pipeline.transformer.config, pipeline.text_encoder.config.hidden_size
    if config.guidance_embeds:
        refuse(
            f"`transformer.config.guidance_embeds` is {config.guidance_embeds}",
            "a `SanaPipeline` tells its transformer no guidance scale (Sana-Sprint's pipeline does)",
            "Load the transformer of a Sana that is not distilled",
        )
    check_vae_scale(pipeline, "transformer", config.in_channels, AutoencoderDC, "encoder_block_out_channels")
    if config.caption_channels != width:
        refuse(
            f"`transformer.config.caption_channels` is {config.caption_channels}, and the text encoder gives {width}",
            "they belong to different models",
            "Load the text encoder that belongs to the transformer",
        )
    if (number := len(pipeline.tokenizer("").input_ids)) != 1:
        refuse(
            f"`tokenizer` makes {number} tokens of an empty prompt",
            "the model knows one, which stands before every prompt",
            "Load the model's own `tokenizer`, which begins with `<bos>`",
        )
