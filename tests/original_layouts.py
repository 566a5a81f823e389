# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Tiny pipelines as single files in the layouts of the original code."""

import re

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests import tiny


Weights = dict[str, torch.Tensor]
UNET = "model.diffusion_model."


# ----- from diffusers to the original layout: the inverse of what is tested, written by hand -----


def renamed(weights: Weights, *names: tuple[str, str]) -> Weights:
    """Weights with parts of their names replaced: each by the first pattern that it matches."""
    result = {}
    for key, weight in weights.items():
        name = next((re.sub(old, new, key) for old, new in names if re.match(old, key)), None)
        assert name is not None, f"no name for {key}"
        result[name] = weight.contiguous()
    assert len(result) == len(weights)
    return result


def original_unet(weights: Weights, prefix: str = UNET) -> Weights:
    """The UNets of `tests.tiny`: two levels of one layer."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    resnet |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    inside = {".".join(key.split(".")[:-1]): key for key in weights}
    names = []
    for module in inside:
        head, _, tail = module.rpartition(".")
        if ".resnets." in module:
            names.append((re.escape(module), f"{head}.{resnet[tail]}"))
    weights = renamed(weights, *((old + r"(?=\.)", new) for old, new in names), ("", ""))
    blocks = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        # After the attention, if there is one
        "up_blocks.0.upsamplers.0.conv": f"output_blocks.1.{2 if any('up_blocks.0.att' in key for key in weights) else 1}.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    return renamed(weights, *((re.escape(old) + r"(?=\.)", prefix + new) for old, new in blocks.items()))


def original_vae(weights: Weights, prefix: str = "first_stage_model.") -> Weights:
    """The VAE of `tests.tiny`: three levels, of which the decoder's are counted from the other end."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    names = [
        (rf"(\w+)\.mid_block\.attentions\.0\.{re.escape(old)}\.", rf"\1.mid.attn_1.{new}.")
        for old, new in attention.items()
    ]
    names += [(rf"(\w+)\.mid_block\.resnets\.{n}\.", rf"\1.mid.block_{n + 1}.") for n in range(2)]
    for n in range(3):
        names += [
            (rf"encoder\.down_blocks\.{n}\.resnets\.(\d)\.conv_shortcut", rf"encoder.down.{n}.block.\1.nin_shortcut"),
            (rf"encoder\.down_blocks\.{n}\.resnets\.(\d)", rf"encoder.down.{n}.block.\1"),
            (rf"encoder\.down_blocks\.{n}\.downsamplers\.0", rf"encoder.down.{n}.downsample"),
            (rf"decoder\.up_blocks\.{n}\.resnets\.(\d)\.conv_shortcut", rf"decoder.up.{2 - n}.block.\1.nin_shortcut"),
            (rf"decoder\.up_blocks\.{n}\.resnets\.(\d)", rf"decoder.up.{2 - n}.block.\1"),
            (rf"decoder\.up_blocks\.{n}\.upsamplers\.0", rf"decoder.up.{2 - n}.upsample"),
        ]
    names += [(r"(encoder|decoder)\.conv_norm_out", r"\1.norm_out"), ("", "")]
    weights = renamed(weights, *names)
    # The original attention is a convolution of 1x1
    return {
        prefix + key: weight[:, :, None, None].contiguous() if ".attn_1." in key and weight.ndim == 2 else weight
        for key, weight in weights.items()
    }


def original_clip(weights: Weights, prefix: str) -> Weights:
    return {
        f"{prefix}text_model.{key.removeprefix('text_model.')}": weight.contiguous() for key, weight in weights.items()
    }


def original_open_clip(weights: Weights, prefix: str) -> Weights:
    weights, result = dict(weights), {}
    for key in [key for key in weights if ".q_proj." in key]:
        three = torch.cat([weights.pop(key.replace("q_proj", name)) for name in ("q_proj", "k_proj", "v_proj")])
        layer, what = re.match(r".*layers\.(\d+)\.self_attn\.q_proj\.(\w+)", key).groups()
        result[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{what}"] = three
    result[f"{prefix}text_projection"] = weights.pop("text_projection.weight").T.contiguous()
    names = [
        (r".*position_embedding\.weight", "positional_embedding"),
        (r".*token_embedding", "token_embedding"),
        (r".*final_layer_norm", "ln_final"),
        (r".*layers\.(\d+)\.layer_norm(\d)", r"transformer.resblocks.\1.ln_\2"),
        (r".*layers\.(\d+)\.mlp\.fc1", r"transformer.resblocks.\1.mlp.c_fc"),
        (r".*layers\.(\d+)\.mlp\.fc2", r"transformer.resblocks.\1.mlp.c_proj"),
        (r".*layers\.(\d+)\.self_attn\.out_proj", r"transformer.resblocks.\1.attn.out_proj"),
    ]
    return result | {prefix + key: weight for key, weight in renamed(weights, *names).items()}


def joined(weights: Weights, *names: str) -> Weights:
    """Weights and biases of several layers as one layer."""
    return {what: torch.cat([weights.pop(f"{name}.{what}") for name in names]) for what in ("weight", "bias")}


def swapped(weight: torch.Tensor) -> torch.Tensor:
    """Of a modulation: diffusers has the scale first, the original the shift."""
    return torch.cat(weight.chunk(2)[::-1])


def original_sd3(weights: Weights, prefix: str = UNET) -> Weights:
    weights, result = dict(weights), {}
    last = max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks."))
    for n in range(last + 1):
        ours, theirs = f"transformer_blocks.{n}", f"joint_blocks.{n}"
        threes = [
            ("x_block.attn", [f"attn.to_{x}" for x in "qkv"]),
            ("context_block.attn", [f"attn.add_{x}_proj" for x in "qkv"]),
        ]
        if f"{ours}.attn2.to_q.weight" in weights:
            threes.append(("x_block.attn2", [f"attn2.to_{x}" for x in "qkv"]))
        for name, three in threes:
            for what, weight in joined(weights, *(f"{ours}.{one}" for one in three)).items():
                result[f"{theirs}.{name}.qkv.{what}"] = weight
    for key in ["norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"]:
        for what in ("weight", "bias"):
            weights[f"{key}.{what}"] = swapped(weights[f"{key}.{what}"])
    block = r"transformer_blocks\.(\d+)\."
    names = [
        (block + r"attn(2?)\.norm_([qk])", r"joint_blocks.\1.x_block.attn\2.ln_\3"),
        (block + r"attn\.norm_added_([qk])", r"joint_blocks.\1.context_block.attn.ln_\2"),
        (block + r"attn(2?)\.to_out\.0", r"joint_blocks.\1.x_block.attn\2.proj"),
        (block + r"attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
        (block + r"norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
        (block + r"norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
        (block + r"ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
        (block + r"ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
        (block + r"ff_context\.net\.0\.proj", r"joint_blocks.\1.context_block.mlp.fc1"),
        (block + r"ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
        (r"pos_embed\.pos_embed", "pos_embed"),
        (r"pos_embed\.proj", "x_embedder.proj"),
        (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
        (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"proj_out", "final_layer.linear"),
        (r"context_embedder", "context_embedder"),
    ]
    return {prefix + key: weight for key, weight in (result | renamed(weights, *names)).items()}


def original_flux(weights: Weights, prefix: str = "") -> Weights:
    weights, result = dict(weights), {}
    for ours, theirs, parts in (
        ("transformer_blocks.0", "double_blocks.0.img_attn.qkv", [f"attn.to_{x}" for x in "qkv"]),
        ("transformer_blocks.0", "double_blocks.0.txt_attn.qkv", [f"attn.add_{x}_proj" for x in "qkv"]),
        ("single_transformer_blocks.0", "single_blocks.0.linear1", [*(f"attn.to_{x}" for x in "qkv"), "proj_mlp"]),
    ):
        for what, weight in joined(weights, *(f"{ours}.{part}" for part in parts)).items():
            result[f"{theirs}.{what}"] = weight
    for what in ("weight", "bias"):
        weights[f"norm_out.linear.{what}"] = swapped(weights[f"norm_out.linear.{what}"])
    double, single, embedder = r"transformer_blocks\.0\.", r"single_transformer_blocks\.0\.", r"time_text_embed\."
    names = [
        (double + r"norm1\.linear", "double_blocks.0.img_mod.lin"),
        (double + r"norm1_context\.linear", "double_blocks.0.txt_mod.lin"),
        (double + r"attn\.norm_q\.weight", "double_blocks.0.img_attn.norm.query_norm.scale"),
        (double + r"attn\.norm_k\.weight", "double_blocks.0.img_attn.norm.key_norm.scale"),
        (double + r"attn\.norm_added_q\.weight", "double_blocks.0.txt_attn.norm.query_norm.scale"),
        (double + r"attn\.norm_added_k\.weight", "double_blocks.0.txt_attn.norm.key_norm.scale"),
        (double + r"attn\.to_out\.0", "double_blocks.0.img_attn.proj"),
        (double + r"attn\.to_add_out", "double_blocks.0.txt_attn.proj"),
        (double + r"ff\.net\.0\.proj", "double_blocks.0.img_mlp.0"),
        (double + r"ff\.net\.2", "double_blocks.0.img_mlp.2"),
        (double + r"ff_context\.net\.0\.proj", "double_blocks.0.txt_mlp.0"),
        (double + r"ff_context\.net\.2", "double_blocks.0.txt_mlp.2"),
        (single + r"norm\.linear", "single_blocks.0.modulation.lin"),
        (single + r"attn\.norm_q\.weight", "single_blocks.0.norm.query_norm.scale"),
        (single + r"attn\.norm_k\.weight", "single_blocks.0.norm.key_norm.scale"),
        (single + r"proj_out", "single_blocks.0.linear2"),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"proj_out", "final_layer.linear"),
        (r"context_embedder", "txt_in"),
        (r"x_embedder", "img_in"),
    ]
    for ours, theirs in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        names += [
            (embedder + rf"{ours}_embedder\.linear_1", f"{theirs}.in_layer"),
            (embedder + rf"{ours}_embedder\.linear_2", f"{theirs}.out_layer"),
        ]
    return {prefix + key: weight for key, weight in (result | renamed(weights, *names)).items()}


# ----- tiny models of which the kind is told from the real names and shapes -----


def sdxl_pipeline():
    """With a second encoder of ten layers, by whose last one diffusers knows SDXL, and of a width of its own."""
    pipeline = tiny.sdxl_pipeline()
    small = {"vocab_size": len(tiny.tokenizer()), "max_position_embeddings": 12, "num_attention_heads": 2}
    small |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "num_hidden_layers": 10}
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=24, intermediate_size=32, projection_dim=24, **small)
    )
    config = dict(pipeline.unet.config) | {"cross_attention_dim": 40, "projection_class_embeddings_input_dim": 72}
    pipeline.unet = UNet2DConditionModel.from_config(config)
    return pipeline


def sd3_pipeline():
    """With the 38 layers by which diffusers knows Stable Diffusion 3.5 large."""
    pipeline = tiny.sd3_pipeline()
    pipeline.transformer = SD3Transformer2DModel.from_config(dict(pipeline.transformer.config) | {"num_layers": 38})
    return pipeline


def sd_file() -> Weights:
    pipeline = tiny.sd_pipeline()
    return (
        original_unet(pipeline.unet.state_dict())
        | original_vae(pipeline.vae.state_dict())
        | original_clip(pipeline.text_encoder.state_dict(), "cond_stage_model.transformer.")
    )


def sdxl_file(pipeline) -> Weights:
    return (
        original_unet(pipeline.unet.state_dict())
        | original_vae(pipeline.vae.state_dict())
        | original_clip(pipeline.text_encoder.state_dict(), "conditioner.embedders.0.transformer.")
        | original_open_clip(pipeline.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    )
