# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The segmenter, an optional role after the detector (our addition to IAPO): it outlines each instance in its box."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from ..batching import batched
from ..boxes import denormalize_boxes
from ..messages import shown
from ..revisions import UNTRUSTED, pinned, resolve_revision
from ..segmentation import encode_rle
from .records import PairRecord


class Segmenter(ABC):
    """
    Finds the pixels of each instance in both images. An instance without a usable mask in an image keeps its box there, and the
    reason is recorded.
    """

    @abstractmethod
    def segment(self, queries: list[tuple[PIL.Image.Image, list[float]]]) -> list[np.ndarray | None]:
        """
        Finds the objects in boxes.

        Args:
            queries (`list[tuple[PIL.Image.Image, list[float]]]` of length `B`):
                Upright images, each with the unit box of an object. Several boxes of an image come with the same image object.

        Returns:
            `list[np.ndarray | None]` of length `B`: the mask of each object, bool, of shape `(height, width)` of its image, or
            `None` if there is none.
        """

    @abstractmethod
    def describe(self) -> dict:
        """Everything that a mask depends on (`model`, `revision`, precision), for the manifest."""

    def __call__(self, pairs: list[PairRecord]) -> list[PairRecord]:
        """Fills in the masks of `instances`, and `without_mask`."""
        places = []
        for pair in pairs:
            pair.without_mask = []
            if pair.status == "ok":
                places += [(pair, instance, name) for instance in pair.instances for name in ("chosen", "rejected")]
        queries = [(getattr(pair, name).upright, getattr(instance, f"{name}_box")) for pair, instance, name in places]
        masks = self.segment(queries)
        if len(masks) != len(queries):
            raise ValueError(
                f"The segmenter gave {len(masks)} answers to {len(queries)} queries; it must give one to each."
            )
        for (pair, instance, name), (image, box), mask in zip(places, queries, masks, strict=True):
            if mask is not None and not is_mask(mask, image):
                pair.fail(
                    f"segmenter, {instance.label!r}: {shown(mask)} is no mask of {image.width} x {image.height} pixels"
                )
            elif why := unusable(mask, box):
                pair.without_mask.append({"label": instance.label, "image": name, "reason": why})
            else:
                setattr(instance, f"{name}_mask", encode_rle(mask))
        return pairs


def is_mask(mask: Any, image: PIL.Image.Image) -> bool:
    """Whether something is a bool array with the height and width of an image."""
    return isinstance(mask, np.ndarray) and mask.dtype == bool and mask.shape == (image.height, image.width)


def unusable(mask: np.ndarray | None, box: list[float]) -> str:
    """
    Tells why a mask cannot stand for an instance.

    Args:
        mask (`np.ndarray` of shape `(height, width)`, *optional*):
            The mask: bool.
        box (`list[float]`):
            Unit box of the instance.

    Returns:
        `str`: the reason, empty if the mask has a pixel that the box touches.
    """
    if mask is None:
        return "there is no mask"
    if not mask.any():
        return "the mask is empty"
    height, width = mask.shape
    left, top = int(max(box[0], 0) * width), int(max(box[1], 0) * height)
    right, bottom = int(np.ceil(min(box[2], 1) * width)), int(np.ceil(min(box[3], 1) * height))
    return "" if mask[top:bottom, left:right].any() else "the mask has nothing of the box"


class Canvas(NamedTuple):
    """
    The square that a model sees, with the image in its upper left corner.

    Attributes:
        side (`int`):
            Pixels of the square, both ways.
        width (`int`), height (`int`):
            Pixels of the image in it.
        keeps_shape (`bool`):
            Whether the image has its shape, with an empty rest of the square beside it, or is stretched to the square.
    """

    side: int
    width: int
    height: int
    keeps_shape: bool


def canvas_for(image: PIL.Image.Image, size: dict[str, int]) -> Canvas:
    """
    Computes how an image is laid on the square.

    Args:
        image (`PIL.Image.Image`):
            The image.
        size (`dict[str, int]`):
            From the model's image processor: `longest_edge`, and the image keeps its shape (SAM); or `height` and `width`, and it
            is stretched to the square (SAM 2 and later).

    Returns:
        [`annotation.segmenter.Canvas`]
    """
    if "longest_edge" not in size:
        return Canvas(size["height"], size["width"], size["height"], keeps_shape=False)
    side = size["longest_edge"]
    scale = side / max(image.size)
    return Canvas(side, int(image.width * scale + 0.5), int(image.height * scale + 0.5), keeps_shape=True)


class TransformersSegmenter(Segmenter):
    """
    A model of the Segment Anything family from transformers, which is shown a box of each instance. Of its masks for a box, the one
    with the highest IoU that it predicts counts. An image is encoded once for all its boxes.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"facebook/sam2.1-hiera-large"`):
            Hub id or folder of a SAM, SAM 2, SAM 2.1 or SAM 3 model. Of SAM 3, the tracker is used, which takes boxes.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        batch_size (`int`, *optional*, defaults to `4`):
            Number of images per batch.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Data type of the weights.
        device (`str`, *optional*):
            Device of the model. Defaults to the GPU if there is one, else to the CPU.

    Raises:
        `ValueError`: If there is no such model, or the batch size is not positive.
    """

    def __init__(
        self,
        model_name_or_path: str = "facebook/sam2.1-hiera-large",
        revision: str | None = None,
        batch_size: int = 4,
        dtype: str = "float32",
        device: str | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"The segmenter's batch size must be at least 1, got {batch_size}.")
        self.model_name_or_path = model_name_or_path
        self.revision = resolve_revision(model_name_or_path, revision)
        self.batch_size = batch_size
        self.dtype = dtype
        self._device = device

    def describe(self) -> dict:
        return {"model": self.model_name_or_path, "revision": self.revision, "dtype": self.dtype}

    def __getstate__(self) -> dict:
        # Another process loads the model itself, on its own device
        return {name: value for name, value in self.__dict__.items() if name not in ("model", "processing")}

    @property
    def device(self) -> str:
        return self._device or ("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def processing(self) -> dict[str, Any]:
        """The settings of the image processor. The processors of SAM 2 and later cannot be made without torchvision."""
        from transformers import BaseImageProcessor

        return BaseImageProcessor.get_image_processor_dict(self.model_name_or_path, **pinned(self.revision))[0]

    @cached_property
    def model(self):
        from transformers import AutoModelForMaskGeneration

        model, loaded = AutoModelForMaskGeneration.from_pretrained(
            self.model_name_or_path,
            dtype=self.dtype,
            **UNTRUSTED,
            use_safetensors=True,
            output_loading_info=True,
            **pinned(self.revision),
        )
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(
                f"{self.model_name_or_path} lacks {len(missing):,} of the weights of {type(model).__name__}, such as {missing[0]}: it is "
                "no such model, or not all of it was saved. Name another `--segmenter`."
            )
        return model.to(self.device).eval()

    def segment(self, queries: list[tuple[PIL.Image.Image, list[float]]]) -> list[np.ndarray | None]:
        boxes: dict[int, list[int]] = {}  # places of the boxes of each image
        for place, (image, _) in enumerate(queries):
            boxes.setdefault(id(image), []).append(place)
        # Batches hold images with equally many boxes: nothing is padded, so no mask depends on the other images in its batch.
        alike: dict[int, list[list[int]]] = {}
        for places in boxes.values():
            alike.setdefault(len(places), []).append(places)
        masks = [None] * len(queries)
        for groups in alike.values():
            for batch in batched(groups, self.batch_size):
                images = [queries[places[0]][0] for places in batch]
                found = self.segment_batch(images, [[queries[place][1] for place in places] for places in batch])
                for places, of_image in zip(batch, found, strict=True):
                    for place, mask in zip(places, of_image, strict=True):
                        masks[place] = mask
        return masks

    @torch.inference_mode()
    def segment_batch(self, images: list[PIL.Image.Image], boxes: list[list[list[float]]]) -> list[np.ndarray]:
        """
        Finds the objects in the boxes of images that have equally many.

        Args:
            images (`list[PIL.Image.Image]` of length `B`):
                The images.
            boxes (`list` of shape `(B, N, 4)`):
                Their unit boxes.

        Returns:
            `list[np.ndarray]`: for each image its masks, bool, of shape `(N, height, width)`.
        """
        canvases = [canvas_for(image, self.processing["size"]) for image in images]
        pixels = torch.stack([self.pixels(*laid) for laid in zip(images, canvases, strict=True)])
        in_pixels = [
            denormalize_boxes(torch.tensor(of_image), canvas.width, canvas.height)
            for of_image, canvas in zip(boxes, canvases, strict=True)
        ]
        outputs = self.model(
            pixel_values=pixels.to(self.device, self.model.dtype), input_boxes=torch.stack(in_pixels).to(self.device)
        )
        best = outputs.iou_scores.argmax(dim=-1)
        logits = outputs.pred_masks.take_along_dim(best[:, :, None, None, None], dim=2).float()
        return [
            masks_of_image(of_image, image, canvas).cpu().numpy()
            for of_image, image, canvas in zip(logits, images, canvases, strict=True)
        ]

    def pixels(self, image: PIL.Image.Image, canvas: Canvas) -> torch.Tensor:
        """The image on its canvas, normalised: `(3, side, side)`. Beside it is zero."""
        resized = image.resize((canvas.width, canvas.height), PIL.Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(self.processing[name])[:, None, None] for name in ("image_mean", "image_std"))
        return F.pad((values - mean) / std, (0, canvas.side - canvas.width, 0, canvas.side - canvas.height))


def masks_of_image(logits: torch.Tensor, image: PIL.Image.Image, canvas: Canvas) -> torch.Tensor:
    """
    Scales a model's masks to an image.

    Args:
        logits (`torch.Tensor` of shape `(N, 1, h, w)`):
            The masks of the whole canvas, positive inside of objects.
        image (`PIL.Image.Image`):
            The image.
        canvas ([`annotation.segmenter.Canvas`]):
            How the image was laid on it.

    Returns:
        `torch.Tensor` of shape `(N, height, width)`: bool.
    """
    if canvas.keeps_shape:
        logits = F.interpolate(logits, (canvas.side, canvas.side), mode="bilinear")
        logits = logits[..., : canvas.height, : canvas.width]
    return F.interpolate(logits, (image.height, image.width), mode="bilinear")[:, 0] > 0
