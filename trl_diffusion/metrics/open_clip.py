# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Loads weights of open_clip (https://github.com/mlfoundations/open_clip) into the CLIP of transformers."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel
from transformers.initialization import no_init_weights

from trl_diffusion.metrics.weights import load_tensors, read_tensors


# From open_clip's names to those of transformers: equal tensors, transposed matrices, and parts of a transformer block
SAME = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert_open_clip(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Converts a state dict of open_clip to transformers.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            State dict of an open_clip `CLIP` with a ViT.

    Returns:
        `dict[str, torch.Tensor]`: state dict of [`~transformers.CLIPModel`], without copies. Unknown tensors keep
        their names, so loading refuses them.
    """
    converted = {}
    for name, tensor in tensors.items():
        if name == "attn_mask":
            continue  # the causal mask, a constant in old files that transformers creates itself
        block = BLOCK.fullmatch(name)
        if block is None:
            if name in TRANSPOSED:
                converted[TRANSPOSED[name]] = tensor.T
            else:
                converted[SAME.get(name, name)] = tensor
            continue
        tower, index, part, kind = block.groups()
        layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{index}"
        if part == "attn.in_proj":
            for projection, piece in zip("qkv", tensor.chunk(3)):
                converted[f"{layer}.self_attn.{projection}_proj.{kind}"] = piece
        else:
            converted[f"{layer}.{IN_BLOCK.get(part, part)}.{kind}"] = tensor
    return converted


def load_open_clip(path: Path, config: CLIPConfig) -> CLIPModel:
    """
    Loads a file of open_clip into the CLIP of transformers.

    Args:
        path (`Path`):
            The file.
        config ([`~transformers.CLIPConfig`]):
            Architecture of the model.

    Returns:
        [`~transformers.CLIPModel`]: in float32 on the CPU.

    Raises:
        `ValueError`: If the file cannot be read, or does not fit the architecture.
    """
    with no_init_weights():  # the initialization would take longer than everything else
        model = CLIPModel(config)
    load_tensors(model, convert_open_clip(read_tensors(path)), str(path))
    return model
