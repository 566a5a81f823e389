# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""FLUX.2 dev: Mistral's hidden layers, and the transformer of FLUX.2 that is told a guidance scale."""

from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

from .checks import refuse
from .flow_checks import check_chat, check_thousand_timesteps
from .flux_2 import Flux2KleinBackbone
from .flux_2_checks import check_flux_2_vae, check_hidden_layers


class Flux2Backbone(Flux2KleinBackbone):
    """
    A [`~diffusers.Flux2Pipeline`] as training sees it. See [`backbones.base.Backbone`]. Latents and timesteps are those of
    [`backbones.flux_2.Flux2KleinBackbone`].
    """

    pipeline_class = Flux2Pipeline
    text_encoder_classes = {"text_encoder": "Mistral3ForConditionalGeneration"}
    guidance_hint = "FLUX.2 dev has none, its `guidance_scale` is told to the transformer"

    def __init__(self, pipeline, source=None):
        super().__init__(pipeline, source)
        self.embedded_guidance = 1.0 if self.denoiser.config.guidance_embeds else None

    @classmethod
    def check_parts(cls, pipeline) -> None:
        check_thousand_timesteps(pipeline)
        check_flux_2_vae(pipeline)
        check_hidden_layers(pipeline, pipeline.text_encoder.config.text_config, (10, 20, 30))  # the pipeline's default
        check_chat(pipeline)
        if pipeline.system_message != SYSTEM_MESSAGE:
            refuse(
                "`pipeline.system_message` is another one",
                "it is not saved, so that the trained model would be sampled with the default",
                "Load the pipeline anew, and leave it as it is",
            )

    @staticmethod
    def templated(tokenizer, prompt) -> str:
        (messages,) = format_input([prompt], SYSTEM_MESSAGE)
        return tokenizer.apply_chat_template(messages, tokenize=False)

    @staticmethod
    def guidance_branches(pipeline, context, arguments) -> tuple[str, ...]:
        return ("conditional",)
