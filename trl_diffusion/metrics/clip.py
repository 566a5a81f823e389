# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Shared by the CLIP scorers: loading a model with all of its weights, and the cosine similarity of image and prompt."""

from collections.abc import Iterator
from contextlib import contextmanager

import PIL.Image
import torch
from safetensors import SafetensorError
from torch.nn.functional import cosine_similarity
from transformers import BatchEncoding, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from trl_diffusion.metrics.scorer import Scorer
from trl_diffusion.revisions import pinned, resolve_revision


VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@contextmanager
def reading(name_or_path: str) -> Iterator[None]:
    """
    Context in which files of a Hub repository or a folder are read.

    Args:
        name_or_path (`str`):
            Hub id or folder.

    Raises:
        `ValueError`: If a file is missing or broken, with the command that downloads it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{name_or_path} cannot be read: {str(error).splitlines()[0].rstrip('.')}. If it is on the Hub, run "
            f"`hf download {name_or_path}` on a machine with network access and copy its Hub cache (`HF_HOME`) here."
        ) from error


def load_clip(model_name_or_path: str) -> tuple[CLIPModel, str]:
    """
    Loads a CLIP model of transformers, and checks that the weights contain exactly its tensors.

    Args:
        model_name_or_path (`str`):
            Hub id or folder.

    Returns:
        `tuple[CLIPModel, str]`: the model in float32 on the CPU, and its revision.

    Raises:
        `ValueError`: If there is no such model, or its weights cannot be read or do not fit its config.
    """
    revision = resolve_revision(model_name_or_path)
    with reading(model_name_or_path):
        model, report = CLIPModel.from_pretrained(
            model_name_or_path,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # mismatches are reported, and refused below
            output_loading_info=True,
            use_safetensors=True,
            **pinned(revision),
        )
    misfits = sorted(
        {*report["missing_keys"], *report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])}
    )
    if misfits:
        raise ValueError(
            f"The weights of {model_name_or_path} do not fit its config.json: these tensors are missing, unexpected or of "
            f"another shape: {', '.join(misfits[:5])}{f' and {len(misfits) - 5} more' if len(misfits) > 5 else ''}."
        )
    return model, revision


def clip_pixels(image: PIL.Image.Image, image_processor: CLIPImageProcessorPil) -> torch.Tensor:
    """
    Prepares an image like the published CLIP: drops transparency, resizes the shorter side, crops the centre.

    Args:
        image (`PIL.Image.Image`):
            The image.
        image_processor ([`~transformers.CLIPImageProcessorPil`]):
            Provides size, mean and standard deviation.

    Returns:
        `torch.Tensor` of shape `(3, size, size)`.
    """
    # The processor's own conversion would put transparent images on a white background
    return image_processor(image.convert("RGB"), do_convert_rgb=False, return_tensors="pt")["pixel_values"][0]


class CosineScorer(Scorer):
    """
    Scores an image by the cosine similarity of its CLIP embedding with that of its prompt, times `scale`.

    Prompts are truncated to the model's maximum length (77 tokens), with their end token kept.

    Attributes:
        scale (`float`):
            Factor of the cosine similarity.

    Args:
        model ([`~transformers.CLIPModel`]):
            The model.
        processor_name_or_path (`str`):
            Hub id or folder of the tokenizer and the image processor.
        processor_revision (`str`):
            Their revision, as [`resolve_revision`] gives it.
        device (`str`, *optional*):
            Where the model is. Defaults to the GPU, or to the CPU where there is none.
    """

    scale: float = 100.0

    def __init__(
        self, model: CLIPModel, processor_name_or_path: str, processor_revision: str, device: str | None = None
    ):
        super().__init__(device)
        pin = pinned(processor_revision)
        with reading(processor_name_or_path):
            self.tokenizer = CLIPTokenizer.from_pretrained(processor_name_or_path, **pin)
            self.image_processor = CLIPImageProcessorPil.from_pretrained(processor_name_or_path, **pin)
        if len(self.tokenizer) != model.config.text_config.vocab_size:  # without its files, it loads as an empty one
            raise ValueError(
                f"The tokenizer of {processor_name_or_path} has {len(self.tokenizer)} tokens, but the model has "
                f"{model.config.text_config.vocab_size}: its files are missing, or it belongs to another model. If it is on "
                f"the Hub, run `hf download {processor_name_or_path}` on a machine with network access."
            )
        self.model = model.to(self.device).eval()
        self.weights[processor_name_or_path] = processor_revision

    def prepare(self, image: PIL.Image.Image) -> torch.Tensor:
        return clip_pixels(image, self.image_processor)

    def tokenize(self, prompts: list[str]) -> BatchEncoding:
        """Tokenizes prompts: `input_ids` and `attention_mask` of shape `(B, longest prompt)`."""
        places = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(prompts, padding=True, truncation=True, max_length=places, return_tensors="pt")

    @torch.inference_mode()
    def score_batch(self, prepared: list[torch.Tensor], prompts: list[str]) -> list[float]:
        images = self.model.get_image_features(pixel_values=torch.stack(prepared).to(self.device)).pooler_output
        texts = self.model.get_text_features(**self.tokenize(prompts).to(self.device)).pooler_output
        return (self.scale * cosine_similarity(images, texts)).tolist()
