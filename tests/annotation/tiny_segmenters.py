# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Segment Anything models with tiny random weights, saved to folders as the published ones are."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3VideoConfig,
    Sam3VideoModel,
    SamConfig,
    SamModel,
    SamProcessor,
)
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil


SIDE = 64  # pixels of the square that all of these models see
PROMPTS = {"hidden_size": 16, "image_size": SIDE, "patch_size": 16}
DECODER = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}

MEMORY = {
    "image_size": SIDE,
    "memory_attention_hidden_size": 16,
    "memory_encoder_hidden_size": 16,
    "memory_attention_num_layers": 1,
    "memory_attention_feed_forward_hidden_size": 32,
    "memory_encoder_output_channels": 8,
    "mask_downsampler_embed_dim": 16,
    "memory_fuser_embed_dim": 16,
    "memory_fuser_intermediate_dim": 16,
    "memory_attention_rope_feat_sizes": [4, 4],
}


def spread(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model with larger weights than usual, with which masks and scores depend on images and boxes, and masks have an inside."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=(2 / weight[0].numel()) ** 0.5)
    return model


def write_processor(folder: Path, name: str, mean: list[float], std: list[float], side: int = SIDE) -> None:
    """What the processors of SAM 2 and later save, which cannot be made without torchvision."""
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": mean,
        "image_processor_type": f"{name}ImageProcessor",
        "image_std": std,
        "processor_class": f"{name}Processor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def tiny_sam(folder: Path) -> Path:
    vision = {
        "hidden_size": 16,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_dim": 32,
    }
    vision |= {"image_size": SIDE, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8}
    config = SamConfig(vision_config=vision, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER)
    spread(SamModel, config).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    SamProcessor(SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size=square)).save_pretrained(folder)
    return folder


def sam2_settings() -> dict[str, Any]:
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [SIDE, SIDE],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [4, 4, 2, 2],
        "global_attention_blocks": [3],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    }
    return {"vision_config": vision, "prompt_encoder_config": PROMPTS, "mask_decoder_config": DECODER}


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def tiny_sam2(folder: Path) -> Path:
    spread(Sam2Model, Sam2Config(**sam2_settings())).save_pretrained(folder)
    write_processor(folder, "Sam2", *IMAGENET)
    return folder


def tiny_sam2_video(folder: Path) -> Path:
    """As the published SAM 2.1: the model for videos, of which the segmenter takes the part for images."""
    spread(Sam2VideoModel, Sam2VideoConfig(**sam2_settings(), **MEMORY)).save_pretrained(folder)
    write_processor(folder, "Sam2Video", *IMAGENET)
    return folder


def sam3_vision() -> dict[str, Any]:
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": 32,
    }
    return {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "fpn_hidden_size": 16,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    }


def tiny_sam3(folder: Path) -> Path:
    config = Sam3TrackerConfig(vision_config=sam3_vision(), prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER)
    spread(Sam3TrackerModel, config).save_pretrained(folder)
    write_processor(folder, "Sam3", [0.5] * 3, [0.5] * 3)
    return folder


def tiny_sam3_video(folder: Path) -> Path:
    """As the published SAM 3: detector and tracker in one model, of which the segmenter takes the tracker with the image encoder."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_layers": 1}
    tokens = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "projection_dim": 16,
    }
    detector = {
        "model_type": "sam3",
        "vision_config": sam3_vision(),
        "text_config": {"model_type": "clip_text_model", **text, **tokens},
        "geometry_encoder_config": small,
        "detr_encoder_config": small,
        "detr_decoder_config": small | {"num_queries": 5},
        "mask_decoder_config": {"hidden_size": 16, "num_attention_heads": 2},
    }
    tracker = {"model_type": "sam3_tracker_video", "vision_config": sam3_vision(), **MEMORY}
    tracker |= {"prompt_encoder_config": PROMPTS, "mask_decoder_config": DECODER}
    config = Sam3VideoConfig(detector_config=detector, tracker_config=tracker, low_res_mask_size=16)
    spread(Sam3VideoModel, config).save_pretrained(folder)
    # transformers repeats a prefix where it saves this model; the published file has it once
    file = folder / "model.safetensors"
    weights = {
        name.replace("tracker_model.tracker_model.", "tracker_model."): w for name, w in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    write_processor(folder, "Sam3Video", [0.5] * 3, [0.5] * 3)
    return folder


SEGMENTERS = {
    "sam": tiny_sam,
    "sam2": tiny_sam2,
    "sam2_video": tiny_sam2_video,
    "sam3": tiny_sam3,
    "sam3_video": tiny_sam3_video,
}
