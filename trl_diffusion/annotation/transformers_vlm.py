# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A vision-language model that runs in this process, with transformers."""

from functools import cached_property

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from ..batching import batched
from ..messages import cut
from ..revisions import UNTRUSTED, pinned, resolve_revision
from .vlm import VLM, GenerationError, Request, cut_off


class TransformersVLM(VLM):
    """
    A vision-language model from transformers, decoded greedily.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"Qwen/Qwen2.5-VL-7B-Instruct"`):
            Hub id or folder of an image-text-to-text model. The default is IAPO's.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of requests per batch.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Maximum length of an answer in tokens.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights.
        device (`str`, *optional*):
            Device of the model. Defaults to the GPU if there is one, else to the CPU.

    Raises:
        `ValueError`: If there is no such model, the Hub cannot be reached and nothing is cached, or the batch size is not positive.
    """

    def __init__(
        self,
        model_name_or_path: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        revision: str | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 512,
        dtype: str = "auto",
        device: str | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"The model's batch size must be at least 1, got {batch_size}.")
        self.model_name_or_path = model_name_or_path
        self.revision = resolve_revision(model_name_or_path, revision)
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.dtype = dtype
        self._device = device

    def describe(self) -> dict:
        return {
            "model": self.model_name_or_path,
            "revision": self.revision,
            "decoding": "greedy",
            "max_new_tokens": self.max_new_tokens,
            "dtype": self.dtype,
        }

    def __getstate__(self) -> dict:
        # Another process loads the model itself, on its own device
        return {name: value for name, value in self.__dict__.items() if name not in ("model", "processor")}

    @property
    def device(self) -> str:
        return self._device or ("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def model(self):
        model = AutoModelForImageTextToText.from_pretrained(
            self.model_name_or_path, dtype=self.dtype, **UNTRUSTED, use_safetensors=True, **pinned(self.revision)
        )
        return model.to(self.device).eval()

    @cached_property
    def processor(self):
        processor_class = PROCESSOR_MAPPING.get(type(self.model.config), AutoProcessor)
        if issubclass(processor_class, ProcessorMixin) and "video_processor" in processor_class.get_attributes():
            processor_class = without_video(processor_class)
        return processor_class.from_pretrained(self.model_name_or_path, **UNTRUSTED, **pinned(self.revision))

    def generate(self, requests: list[Request]) -> list[str | GenerationError]:
        # Batches hold requests of similar length, which reduces padding.
        order = sorted(range(len(requests)), key=lambda index: size(requests[index]))
        texts = [""] * len(requests)
        for batch in batched(order, self.batch_size):
            for index, text in zip(batch, self.generate_batch([requests[i] for i in batch]), strict=True):
                texts[index] = text
        return texts

    @torch.inference_mode()
    def generate_batch(self, requests: list[Request]) -> list[str | GenerationError]:
        """Same as `generate`, for one batch. If it fails, its requests are asked one at a time, to find those that fail."""
        model, processor = self.model, self.processor  # what fails in loading them is no matter of the requests
        chats = [self.chat(request) for request in requests]
        problem = "the model does not accept this request"
        try:
            inputs = self.encode(chats).to(self.device, model.dtype)
            problem = "the model fails at this request"
            tokens = model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
            )
        except (torch.OutOfMemoryError, MemoryError):
            problem = "the memory is too small for this request: use a smaller model or another `--vlm_dtype`"
        except (
            RuntimeError,
            ValueError,
            IndexError,
            ArithmeticError,
            OSError,
        ) as error:  # others are mistakes of the code
            problem = f"{problem}: {type(error).__name__}: {cut(str(error), 400)}"
        else:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
            texts = processor.batch_decode(tokens, skip_special_tokens=True)
            ends = ended(tokens, model.generation_config.eos_token_id)
            return [text if end else cut_off(self.max_new_tokens, text) for text, end in zip(texts, ends, strict=True)]
        if len(requests) == 1:
            return [GenerationError(problem)]
        torch.cuda.empty_cache()  # does nothing without a GPU
        return [text for request in requests for text in self.generate_batch([request])]

    def encode(self, chats: list[list[dict]]) -> BatchFeature:
        """The inputs of the model, which end with the start of its answer."""
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )

    def chat(self, request: Request) -> list[dict]:
        """The request as a chat. Special tokens in its text, such as an image placeholder, are split by a space."""
        text = request.text
        for token in self.processor.tokenizer.added_tokens_decoder.values():
            if token.special:
                text = text.replace(token.content, f"{token.content[:1]} {token.content[1:]}")
        content = [{"type": "image", "image": image} for image in request.images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def ended(tokens: torch.Tensor, ends: int | list[int] | None) -> list[bool]:
    """
    Tells which answers end, rather than being cut off.

    Args:
        tokens (`torch.Tensor` of shape `(B, L)`):
            Tokens of the answers.
        ends (`int` or `list[int]`, *optional*):
            The tokens that end an answer.

    Returns:
        `list[bool]` of length `B`
    """
    ends = torch.as_tensor([] if ends is None else ends, device=tokens.device, dtype=tokens.dtype)
    return torch.isin(tokens, ends).any(dim=1).tolist()


def size(request: Request) -> tuple[int, int]:
    """Size of a request, for sorting: pixels, then characters."""
    return sum(image.width * image.height for image in request.images), len(request.text)


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """
    Removes the video processor from a processor class, because it needs torchvision.

    Args:
        processor_class (`type[ProcessorMixin]`):
            A processor class from transformers with `image_processor`, `tokenizer` and `video_processor`.

    Returns:
        `type[ProcessorMixin]`
    """

    class ImageTextProcessor(processor_class):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template)

    return ImageTextProcessor
