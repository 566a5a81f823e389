# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a pipeline of Krea 2 must be so that it is trained rightly, see [`backbones.checks`]."""

from diffusers import Krea2Pipeline

from .checks import refuse, refuse_reference


def check_layers(pipeline: Krea2Pipeline) -> None:
    """Refuses layers of the text encoder that do not exist, or another number of them than the transformer takes."""
    layers, number = pipeline.text_encoder_select_layers, pipeline.transformer.config.num_text_layers
    last = pipeline.text_encoder.config.text_config.num_hidden_layers
    if len(layers) != number or not all(0 <= layer <= last for layer in layers):
        refuse(
            f"`text_encoder_select_layers` is {layers}, and `transformer.config.num_text_layers` is {number}",
            f"the transformer takes so many of the layers 0 to {last} of `text_encoder`",
            "Make the pipeline with the layers that belong to the transformer",
        )


def check_same_inputs(pipeline: Krea2Pipeline, reference: Krea2Pipeline) -> None:
    """Refuses a reference that takes other layers of the text encoder, or latents in other patches."""
    for key in ("text_encoder_select_layers", "patch_size"):
        own, other = getattr(pipeline, key), getattr(reference, key)
        if own != other:
            refuse_reference(f"its `{key}` is {other} and the policy's is {own}")


def check_length(pipeline: Krea2Pipeline, max_sequence_length: int) -> None:
    """Refuses a number of tokens that leaves none for the prompt."""
    number = pipeline.prompt_template_encode_num_suffix_tokens
    if max_sequence_length <= number:
        raise ValueError(
            f"`max_sequence_length` is {max_sequence_length}, of which the end of the template takes {number}. Leave some for the "
            "prompt."
        )
