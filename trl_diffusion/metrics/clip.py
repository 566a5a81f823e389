# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the scorers on CLIP share: the model, with none of its weights left to chance, and the cosine of image and prompt."""

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
    While something of a Hub repository or a folder is read.

    Args:
        name_or_path (`str`):
            Hub id or folder.

    Raises:
        `ValueError`: If a file is missing or broken; says how to fetch it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{name_or_path} cannot be read: {str(error).splitlines()[0].rstrip('.')}. What is on the Hub is fetched by "
            f"`hf download {name_or_path}` where the network is; bring the Hub's cache along (`HF_HOME`)."
        ) from error


def load_clip(model_name_or_path: str) -> tuple[CLIPModel, str]:
    """
    Loads a CLIP of transformers, and every tensor is accounted for.

    Args:
        model_name_or_path (`str`):
            Hub id or folder.

    Returns:
        `tuple[CLIPModel, str]`: the model in float32 on the CPU, and its revision.

    Raises:
        `ValueError`: If there is no such model, or its weights cannot be read, or do not fit its config.
    """
    revision = resolve_revision(model_name_or_path)
    with reading(model_name_or_path):
        model, report = CLIPModel.from_pretrained(
            model_name_or_path,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are reported, and refused below with the others
            output_loading_info=True,
            **pinned(revision),
        )
    misfits = sorted(
        {*report["missing_keys"], *report["unexpected_keys"], *(name for name, *_ in report["mismatched_keys"])}
    )
    if misfits:
        raise ValueError(
            f"The weights of {model_name_or_path} do not fit its config.json: missing, left over or of another shape are "
            f"{', '.join(misfits[:5])}{f' and {len(misfits) - 5} more' if len(misfits) > 5 else ''}."
        )
    return model, revision


def clip_pixels(image: PIL.Image.Image, image_processor: CLIPImageProcessorPil) -> torch.Tensor:
    """
    Prepares an image as CLIP was published: transparency is dropped, the shorter side resized, the middle cut out.

    Args:
        image (`PIL.Image.Image`):
            The image.
        image_processor ([`~transformers.CLIPImageProcessorPil`]):
            Knows the size, the mean and the deviation.

    Returns:
        `torch.Tensor` of shape `(3, size, size)`.
    """
    # Not the processor's own conversion, which lays transparent images on white
    return image_processor(image.convert("RGB"), do_convert_rgb=False, return_tensors="pt")["pixel_values"][0]


class CosineScorer(Scorer):
    """
    Scores by the cosine of CLIP's embeddings of an image and of its prompt, times `scale`.

    A prompt of more tokens than the model has places (77) is cut, and its end token kept.

    Attributes:
        scale (`float`):
            What the cosine is multiplied by.

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
        if len(self.tokenizer) != model.config.text_config.vocab_size:  # without its files it is empty, not an error
            raise ValueError(
                f"The tokenizer of {processor_name_or_path} has {len(self.tokenizer)} tokens, and the model knows "
                f"{model.config.text_config.vocab_size}: its files are missing, or it is another model's. What is on the Hub "
                f"is fetched by `hf download {processor_name_or_path}` where the network is."
            )
        self.model = model.to(self.device).eval()
        self.weights[processor_name_or_path] = processor_revision

    def prepare(self, image: PIL.Image.Image) -> torch.Tensor:
        return clip_pixels(image, self.image_processor)

    def tokenize(self, prompts: list[str]) -> BatchEncoding:
        """The prompts as the model takes them: `input_ids` and `attention_mask` of shape `(B, longest prompt)`."""
        places = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(prompts, padding=True, truncation=True, max_length=places, return_tensors="pt")

    @torch.inference_mode()
    def score_batch(self, prepared: list[torch.Tensor], prompts: list[str]) -> list[float]:
        images = self.model.get_image_features(pixel_values=torch.stack(prepared).to(self.device)).pooler_output
        texts = self.model.get_text_features(**self.tokenize(prompts).to(self.device)).pooler_output
        return (self.scale * cosine_similarity(images, texts)).tolist()
