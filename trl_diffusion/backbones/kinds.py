# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is in a file that somebody calls a model."""

import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type


UNET = "model.diffusion_model."
FIRST, LABELS = f"{UNET}input_blocks.0.0.weight", f"{UNET}label_emb.0.0.weight"
REFINER = 2560  # numbers that the UNet of the refiner of Stable Diffusion XL takes beside the prompt
# What a file is that is no whole model: by parts of the names of its weights, in this order
PARTS = (
    ("a LoRA", ("lora_up.", "lora_down.", "lora_A.", "lora_B.", ".hada_", ".lokr_", "lora_unet_", "lora_te")),
    ("an IP-Adapter", ("image_proj.", "ip_adapter.")),
    ("a ControlNet", ("control_model.", "controlnet_", "input_hint_block.")),
    ("a textual inversion", ("emb_params", "string_to_param", "clip_l", "clip_g")),
)
# The same by what one of the names begins with
BEGINNINGS = (
    ("the UNet of a pipeline's folder", ("time_embedding.linear_1.", "down_blocks.")),
    ("the transformer of a pipeline's folder", ("transformer_blocks.", "single_transformer_blocks.")),
    ("a VAE", ("decoder.conv_in.", "first_stage_model.decoder.", "vae.decoder.", "decoder.mid")),
    (
        "a text encoder",
        ("text_model.", "transformer.text_model.", "embeddings.token_embedding.", "encoder.block.0.", "shared."),
    ),
)
WAYS_OUT = {
    "a LoRA": "Pass the model that it was trained on",
    "a VAE": "Pass it as `vae`, beside the model that it belongs to",
    "the UNet of a pipeline's folder": "Pass the folder of the whole pipeline",
    "the transformer of a pipeline's folder": "Pass the folder of the whole pipeline",
}
# Kinds of which diffusers reads no pipeline out of one file
WITHOUT_FILES = {"flux-2-dev": "a transformer of FLUX.2"}
OTHER_INPUTS = {5: "depth maps", 7: "small images", 8: "an image to edit", 9: "inpainting masks"}


def kind_of(checkpoint: dict[str, torch.Tensor], path: str, supported: dict[str, type]) -> str:
    """
    The kind of model in a checkpoint, as diffusers calls it.

    Args:
        checkpoint (`dict[str, torch.Tensor]`):
            The weights.
        path (`str`):
            The file, for messages.
        supported (`dict[str, type]`):
            The pipeline classes of the kinds that are supported.

    Returns:
        `str`

    Raises:
        `ValueError`: If it is none of these, with what it is.
    """
    kind = infer_diffusers_model_type(checkpoint)
    if kind == "v1" and LABELS in checkpoint:  # without the text encoders by which diffusers knows it
        kind = "xl_refiner" if checkpoint[LABELS].shape[1] == REFINER else "xl_base"
    elif kind == "v2" and LABELS in checkpoint:
        kind = "unclip"
    # diffusers takes whatever it does not know for Stable Diffusion 1
    is_unknown = kind == "v1" and FIRST not in checkpoint
    channels = checkpoint[FIRST].shape[1] if kind in supported and FIRST in checkpoint else 4
    if kind in supported and not is_unknown and channels == 4:
        return kind
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(family.__name__ for family in supported.values()))
    part = _part(checkpoint) if is_unknown or "control" in kind else None
    what = part or (
        "no model that is known" if is_unknown else WITHOUT_FILES.get(kind, f"a model of the kind {kind!r}")
    )
    if channels != 4:
        what = f"a model whose UNet takes {channels} channels ({OTHER_INPUTS.get(channels, 'not only an image')})"
    way_out = WAYS_OUT.get(part, "Pass a text-to-image model with weights named as in the original code")
    way_out = "Pass the folder or the Hub id of the whole pipeline" if kind in WITHOUT_FILES else way_out
    raise ValueError(f"{path} holds {what}. A single file must hold the model of one of these: {names}. {way_out}.")


def _part(checkpoint: dict[str, torch.Tensor]) -> str | None:
    for what, parts in PARTS:
        if any(part in key for key in checkpoint for part in parts):
            return what
    return next((what for what, parts in BEGINNINGS if any(key.startswith(parts) for key in checkpoint)), None)
