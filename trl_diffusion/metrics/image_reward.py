# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""ImageReward (Xu et al., NeurIPS 2023, https://github.com/THUDM/ImageReward) predicts how people rate an image."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import nn
from transformers import BertTokenizer, BlipConfig, BlipTextModel, BlipVisionModel

from trl_diffusion.metrics.scorer import ImageMetric, Scorer
from trl_diffusion.metrics.weights import fetch_file, load_tensors, local_file, read_tensors
from trl_diffusion.revisions import pinned, resolve_revision


REPO, FILE = "THUDM/ImageReward", "ImageReward.pt"
MAX_TOKENS = 35  # prompts are truncated and padded to this length
# Mean and standard deviation of the rewards, from the published code
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
# Those of CLIP for pixels in [0, 1]
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Left over from BLIP's pretraining: projections for its contrastive loss, and position ids
UNUSED = {
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
}
# The vision transformer has timm's names. The rules are applied in order.
RENAMED = (
    (r"^blip\.", ""),
    (r"^mlp\.layers\.", "mlp."),
    (r"^visual_encoder\.cls_token$", "visual_encoder.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "visual_encoder.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "visual_encoder.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "visual_encoder.post_layernorm."),
    (r"^visual_encoder\.blocks\.", "visual_encoder.encoder.layers."),
    (r"^(visual_encoder\.encoder\.layers\.\d+\.)norm([12])\.", r"\1layer_norm\2."),
    (r"^(visual_encoder\.encoder\.layers\.\d+\.)attn\.qkv\.", r"\1self_attn.qkv."),
    (r"^(visual_encoder\.encoder\.layers\.\d+\.)attn\.proj\.", r"\1self_attn.projection."),
)


def published_config() -> BlipConfig:
    """The config of ImageReward-v1.0: ViT-L/16 at 224 pixels, and BERT-base with cross-attention to the image."""
    return BlipConfig(
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 16,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": 30524,  # BERT's, and two tokens that ImageReward does not use
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "layer_norm_eps": 1e-12,
        },
    )


def preprocess(image: PIL.Image.Image, size: int) -> torch.Tensor:
    """
    Resizes the shorter side, crops the centre, and then converts to RGB, in the order of the published code.

    Args:
        image (`PIL.Image.Image`):
            The image.
        size (`int`):
            Side of the result in pixels.

    Returns:
        `torch.Tensor` of shape `(3, size, size)`, normalised with CLIP's mean and standard deviation.
    """
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(PIXEL_MEAN)[:, None, None]) / torch.tensor(PIXEL_STD)[:, None, None]


class ImageRewardModel(nn.Module):
    """
    A text encoder whose tokens attend to the patches of the image, and a head on the last hidden state of the first
    token.

    Args:
        config (`BlipConfig`):
            Config of the encoders.
    """

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.visual_encoder = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        # As published: no activations between the layers
        self.mlp = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
                Images from [`preprocess`].
            input_ids (`torch.Tensor` of shape `(B, L)`):
                Tokens of their prompts.
            attention_mask (`torch.Tensor` of shape `(B, L)`):
                1 for a token, 0 for padding.

        Returns:
            `torch.Tensor` of shape `(B,)`: normalised rewards.
        """
        patches = self.visual_encoder(pixel_values).last_hidden_state  # (B, P + 1, D)
        text = self.text_encoder(input_ids, attention_mask=attention_mask, encoder_hidden_states=patches)
        rewards = self.mlp(text.last_hidden_state[:, 0]).squeeze(1)
        return (rewards - REWARD_MEAN) / REWARD_STD


def convert_image_reward(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames the published tensors to the names of [`ImageRewardModel`].

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            Content of `ImageReward.pt`.

    Returns:
        `dict[str, torch.Tensor]`: the tensors without the five in `UNUSED`. Unknown tensors keep their names.
    """
    converted = {}
    for name, tensor in tensors.items():
        if name in UNUSED:
            continue
        for published, ours in RENAMED:
            name = re.sub(published, ours, name)
        converted[name] = tensor
    return converted


class ImageRewardScorer(Scorer):
    """
    ImageReward-v1.0 (https://github.com/THUDM/ImageReward): the normalized reward `(r - 0.1672) / 1.0333`, where `r` is the output of a BLIP model that was
    trained on 137,000 comparisons, and the constants are the authors' mean and standard deviation. Prompts are
    truncated to 35 tokens. Higher is better.

    Args:
        weights_path (`str` or `Path`, *optional*):
            File in the format of the published one. Defaults to the published one, which is downloaded.
        tokenizer_name_or_path (`str`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
            Hub id or folder of BERT's tokenizer.
        config (`BlipConfig`, *optional*):
            Config of the encoders. Defaults to that of ImageReward-v1.0.
        device (`str`, *optional*):
            Device of the model. Defaults to the GPU if there is one, else to the CPU.

    Raises:
        `ValueError`: If the weights or the tokenizer cannot be loaded, or the weights do not fit the model.
    """

    name = "image_reward"

    def __init__(
        self,
        weights_path: str | Path | None = None,
        tokenizer_name_or_path: str = "google-bert/bert-base-uncased",
        config: BlipConfig | None = None,
        device: str | None = None,
    ):
        super().__init__(device)
        path, revision = fetch_file(REPO, FILE) if weights_path is None else local_file(weights_path)
        tokenizer_revision = resolve_revision(tokenizer_name_or_path)
        self.weights = {
            str(weights_path or f"{REPO}/{FILE}"): revision,
            tokenizer_name_or_path: tokenizer_revision,
        }
        self.tokenizer = BertTokenizer.from_pretrained(tokenizer_name_or_path, **pinned(tokenizer_revision))
        config = config or published_config()
        self.image_size = config.vision_config.image_size
        model = ImageRewardModel(config)
        load_tensors(model, convert_image_reward(read_tensors(path)), str(path))
        self.model = model.to(self.device).eval()

    def prepare(self, image: PIL.Image.Image) -> torch.Tensor:
        return preprocess(image, self.image_size)

    @torch.inference_mode()
    def score_batch(self, prepared: list[torch.Tensor], prompts: list[str]) -> list[float]:
        # Always padded to 35 tokens, so that a score does not depend on the other prompts of the batch
        text = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        pixel_values = torch.stack(prepared).to(self.device)
        return self.model(pixel_values, text.input_ids, text.attention_mask).tolist()


class ImageReward(ImageMetric):
    """
    [`ImageRewardScorer`] as a module of `evaluate`:
    `evaluate.load(metric_path("image_reward")).compute(images=[...], prompts=[...])`.
    """

    scorer_type = ImageRewardScorer
    citation = """\
@inproceedings{xu2023imagereward,
    title={{ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation}},
    author={Xu, Jiazheng and Liu, Xiao and Wu, Yuchen and Tong, Yuxuan and Li, Qinkai and Ding, Ming and Tang, Jie and Dong, Yuxiao},
    booktitle={Advances in Neural Information Processing Systems},
    year={2023},
}"""
