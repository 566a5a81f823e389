# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The detector of IAPO (Sun et al., CVPR 2026) locates each instance in both images."""

from abc import ABC, abstractmethod
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import PIL.Image
import torch

from ..batching import batched
from ..boxes import normalize_boxes
from ..messages import shown
from ..revisions import UNTRUSTED, pinned, resolve_revision
from .records import Instance, PairRecord


class Detection(NamedTuple):
    """
    An object found in an image.

    Attributes:
        box (`list[float]`):
            Unit box.
        score (`float`):
            The detector's confidence in [0, 1].
    """

    box: list[float]
    score: float


class Detector(ABC):
    """Finds each planned instance in both images. An instance that is missing in one of them is dropped and recorded."""

    @abstractmethod
    def detect(self, queries: list[tuple[PIL.Image.Image, str]]) -> list[Detection | None]:
        """
        Finds objects by name.

        Args:
            queries (`list[tuple[PIL.Image.Image, str]]` of length `B`):
                Upright images, each with the name of the object to find.

        Returns:
            `list[Detection | None]` of length `B`: the most confident detection of each query, or `None`.
        """

    @abstractmethod
    def describe(self) -> dict:
        """Everything that a detection depends on (`model`, `revision`, thresholds), for the manifest."""

    def __call__(self, pairs: list[PairRecord]) -> list[PairRecord]:
        """Fills in `instances`."""
        places = [(pair, label) for pair in pairs if pair.status == "ok" for label in pair.labels]
        queries = [(image.upright, label) for pair, label in places for image in (pair.chosen, pair.rejected)]
        hits = self.detect(queries)
        if len(hits) != len(queries):
            raise ValueError(
                f"The detector gave {len(hits)} answers to {len(queries)} queries; it must give one to each."
            )
        for (pair, label), chosen, rejected in zip(places, hits[::2], hits[1::2], strict=True):
            missing = [name for name, hit in (("chosen", chosen), ("rejected", rejected)) if hit is None]
            if wrong := [hit for hit in (chosen, rejected) if hit is not None and not is_detection(hit)]:
                pair.fail(f"detector, {label!r}: {shown(wrong[0])} is no unit box with a score")
            elif missing:
                pair.drop(label, f"not detected in the {' and the '.join(missing)} image")
            else:
                pair.instances.append(Instance(label, chosen.box, rejected.box, chosen.score, rejected.score))
        return pairs


def is_detection(hit: Detection) -> bool:
    """Whether a box has an area within the image, and a score that is a number."""
    if len(hit.box) != 4 or not all(isinstance(number, int | float) for number in [*hit.box, hit.score]):
        return False
    x_min, y_min, x_max, y_max = hit.box
    if not abs(hit.score) < 1e9:  # nor if it is NaN
        return False
    return -0.01 <= x_min < x_max <= 1.01 and -0.01 <= y_min < y_max <= 1.01


class TransformersDetector(Detector):
    """
    A zero-shot detector from transformers. Each instance is a query of its own, so its score does not depend on the
    others.

    Args:
        model_name_or_path (`str`, *optional*, defaults to `"IDEA-Research/grounding-dino-base"`):
            Hub id or folder of a Grounding DINO, MM Grounding DINO, OWL-ViT, OWLv2 (needs scipy) or OmDet-Turbo (needs
            torchvision) model.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        threshold (`float`, *optional*, defaults to `0.3`):
            Detections with a lower score are ignored.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images per batch.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Data type of the weights.
        device (`str`, *optional*):
            Device of the model. Defaults to the GPU if there is one, else to the CPU.

    Raises:
        `ValueError`: If the threshold is not in [0, 1), or the batch size is not positive.
    """

    def __init__(
        self,
        model_name_or_path: str = "IDEA-Research/grounding-dino-base",
        revision: str | None = None,
        threshold: float = 0.3,
        batch_size: int = 16,
        dtype: str = "float32",
        device: str | None = None,
    ):
        if not 0 <= threshold < 1:
            raise ValueError(f"The detector's threshold must be in [0, 1), got {threshold}.")
        if batch_size < 1:
            raise ValueError(f"The detector's batch size must be at least 1, got {batch_size}.")
        self.model_name_or_path = model_name_or_path
        self.revision = resolve_revision(model_name_or_path, revision)
        self.threshold = threshold
        self.batch_size = batch_size
        self.dtype = dtype
        self._device = device

    def describe(self) -> dict:
        return {
            "model": self.model_name_or_path,
            "revision": self.revision,
            "threshold": self.threshold,
            "dtype": self.dtype,
        }

    def __getstate__(self) -> dict:
        # Another process loads the model itself, on its own device
        return {name: value for name, value in self.__dict__.items() if name not in ("model", "processor")}

    @property
    def device(self) -> str:
        return self._device or ("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def processor(self):
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self.model_name_or_path, **UNTRUSTED, **pinned(self.revision))

    @cached_property
    def model(self):
        from transformers import AutoModelForZeroShotObjectDetection

        model = AutoModelForZeroShotObjectDetection.from_pretrained(
            self.model_name_or_path, dtype=self.dtype, **UNTRUSTED, use_safetensors=True, **pinned(self.revision)
        )
        return model.to(self.device).eval()

    def detect(self, queries: list[tuple[PIL.Image.Image, str]]) -> list[Detection | None]:
        # Batches hold images of one size: nothing is padded, so no detection depends on the other images in its batch.
        by_size = sorted(range(len(queries)), key=lambda index: queries[index][0].size)
        hits = [None] * len(queries)
        for _, indices in groupby(by_size, key=lambda index: queries[index][0].size):
            for batch in batched(list(indices), self.batch_size):
                for index, hit in zip(batch, self.detect_batch([queries[i] for i in batch]), strict=True):
                    hits[index] = hit
        return hits

    @torch.inference_mode()
    def detect_batch(self, queries: list[tuple[PIL.Image.Image, str]]) -> list[Detection | None]:
        """Same as `detect`, for one batch of images of the same size."""
        images = [image for image, _ in queries]
        labels = [[label.replace(".", " ")] for _, label in queries]  # a full stop would end Grounding DINO's phrase
        padding = self.processor.text_kwargs.get("padding", True)  # OWL-ViT pads all texts to one fixed length
        inputs = self.processor(images=images, text=labels, padding=padding, truncation=True, return_tensors="pt").to(
            self.device
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        sizes = [(image.height, image.width) for image in images]
        results = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), threshold=self.threshold, target_sizes=sizes, text_labels=labels
        )
        return [best_hit(result, image) for result, image in zip(results, images, strict=True)]


def best_hit(result: dict[str, torch.Tensor], image: PIL.Image.Image) -> Detection | None:
    """
    Selects the most confident detection whose box has a positive area.

    Args:
        result (`dict[str, torch.Tensor]`):
            Output of post-processing: `scores` of shape `(N,)` and `boxes` of shape `(N, 4)` in pixels of the image.
        image (`PIL.Image.Image`):
            The image.

    Returns:
        [`Detection`], or `None` if no box has a positive area.
    """
    boxes = normalize_boxes(result["boxes"].cpu(), *image.size).clamp(0, 1)
    scores = result["scores"].cpu()
    covers = (boxes[:, :2] < boxes[:, 2:]).all(dim=1) & scores.isfinite()
    if not covers.any():
        return None
    best = torch.where(covers, scores.float(), -1.0).argmax()
    return Detection(boxes[best].tolist(), scores[best].item())
