# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What all metrics of single images share: batches in, one score an image out, and what is said about the whole.

A metric is a [`Scorer`], which holds the algorithm, and a thin [`ImageMetric`] around it, which `evaluate.load` finds. The
files of the metrics import absolutely: `evaluate` copies them elsewhere before it imports them.
"""

import inspect
import io
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import evaluate
import PIL.Image
import torch
from datasets import Features, Image, Value
from tqdm import tqdm

from trl_diffusion.batching import CORES, batched


ImageLike = PIL.Image.Image | str | Path | dict[str, Any]  # the last as `datasets` stores an image


class ScoringError(Exception):
    """One image could not be scored, and the others can: a judge that gave no valid answer, say."""


@dataclass
class Scores:
    """
    What a scorer says about images.

    Args:
        values (`list[float | None]`):
            One score an image, in their order; `None` where there is none.
        errors (`dict[int, str]`):
            Why, by the image's place in the list.
    """

    values: list[float | None]
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def scored(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """The corpus figure: the mean over the scored images, `None` where there is none."""
        return statistics.fmean(self.scored) if self.scored else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean; `None` with fewer than two scores."""
        return statistics.stdev(self.scored) / math.sqrt(len(self.scored)) if len(self.scored) > 1 else None


class Scorer(ABC):
    """
    Scores images one by one.

    Attributes:
        name (`str`):
            Of the score, in results and tables.
        higher_is_better (`bool`):
            Which way is up.
        needs_prompts (`bool`):
            Whether the score depends on the image's prompt.
        weights (`dict[str, str]`):
            What the score depends on: ids of the weights and their revisions. Empty where there are none.

    Args:
        device (`str`, *optional*):
            Where the model is. Defaults to the GPU, or to the CPU where there is none.
    """

    name: str
    higher_is_better: bool = True
    needs_prompts: bool = True

    def __init__(self, device: str | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.weights: dict[str, str] = {}

    def prepare(self, image: PIL.Image.Image) -> Any:
        """What the model is given of an image. Runs in threads, while the model works on the batch before."""
        return image

    @abstractmethod
    def score_batch(self, prepared: list, prompts: list[str] | None) -> list[float | ScoringError]:
        """
        Scores a batch.

        Args:
            prepared (`list` of length `B`):
                What [`~Scorer.prepare`] made of the images.
            prompts (`list[str]` of length `B`, *optional*):
                Their prompts; `None` where the score needs none.

        Returns:
            `list[float | ScoringError]` of length `B`.
        """

    def score(
        self,
        images: list[ImageLike],
        prompts: list[str] | None = None,
        batch_size: int = 16,
        disable_tqdm: bool = True,
    ) -> Scores:
        """
        Scores images.

        Args:
            images (`list[PIL.Image.Image | str | Path | dict]` of length `N`):
                The images; or their files, or what `datasets` stores of them, which are read batch by batch.
            prompts (`list[str]` of length `N`, *optional*):
                Their prompts.
            batch_size (`int`, *optional*, defaults to `16`):
                Images scored at a time.
            disable_tqdm (`bool`, *optional*, defaults to `True`):
                Show no progress.

        Returns:
            [`Scores`]

        Raises:
            `ValueError`: If there are no images, or not as many prompts; if a file is no image; if a score is not finite.
        """
        if not images:
            raise ValueError(f"There are no images to compute `{self.name}` of.")
        if not self.needs_prompts:
            prompts = None
        elif prompts is None or len(prompts) != len(images):
            raise ValueError(
                f"`{self.name}` needs a prompt for each image: there are {len(images)} images and "
                f"{'no' if prompts is None else len(prompts)} prompts."
            )
        scores = Scores([])
        with tqdm(total=len(images), desc=self.name, disable=disable_tqdm) as progress:
            for prepared in prepared_batches(images, self.prepare, batch_size):
                done = len(scores.values)
                of_batch = prompts[done : done + len(prepared)] if prompts is not None else None
                for place, value in enumerate(self.score_batch(prepared, of_batch), start=done):
                    if isinstance(value, ScoringError):
                        scores.errors[place] = str(value)
                        value = None
                    elif not math.isfinite(value):
                        raise ValueError(
                            f"`{self.name}` of image {place} {_name(images[place])} is {value}: the weights "
                            f"{', '.join(self.weights) or 'of the scorer'} are damaged, or overflow in their type."
                        )
                    scores.values.append(value)
                progress.update(len(prepared))
        return scores

    def result(self, scores: Scores) -> dict[str, Any]:
        """
        What a metric returns.

        Args:
            scores ([`Scores`]):
                The scores.

        Returns:
            `dict`: under the metric's name the mean over the scored images, `standard_error`, `scores`, `errors` by the
            image's place, `higher_is_better` and `weights`.
        """
        return {
            self.name: scores.mean,
            "standard_error": scores.standard_error,
            "scores": scores.values,
            "errors": scores.errors,
            "higher_is_better": self.higher_is_better,
            "weights": self.weights,
        }


def prepared_batches(
    images: list[ImageLike], prepare: Callable[[PIL.Image.Image], Any], batch_size: int
) -> Iterator[list]:
    """
    Reads and prepares images in threads, one batch ahead of the model.

    Args:
        images (`list[PIL.Image.Image | str | Path | dict]` of length `N`, at least 1):
            The images.
        prepare (`Callable`):
            What is made of each.
        batch_size (`int`):
            Images in a batch.

    Yields:
        `list`: what `prepare` made of the images of a batch.
    """
    with ThreadPoolExecutor(CORES) as pool:
        ahead: list[Future] | None = None
        for batch in batched(images, batch_size):
            submitted = [pool.submit(lambda image: prepare(open_image(image)), image) for image in batch]
            if ahead is not None:
                yield [future.result() for future in ahead]
            ahead = submitted
        yield [future.result() for future in ahead]


def open_image(image: ImageLike) -> PIL.Image.Image:
    """
    Reads an image.

    Args:
        image (`PIL.Image.Image`, `str`, `Path` or `dict`):
            The image, its file, or its `bytes` or `path` as `datasets` stores them.

    Returns:
        `PIL.Image.Image`: with its pixels in memory.

    Raises:
        `ValueError`: If it cannot be read.
    """
    if isinstance(image, PIL.Image.Image):
        return image
    source = image
    if isinstance(image, dict):
        source = image["path"] if image.get("bytes") is None else io.BytesIO(image["bytes"])
    try:
        with PIL.Image.open(source) as file:
            file.load()
            return file
    except (OSError, ValueError, SyntaxError, AttributeError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{_name(image) or 'A stored image'} cannot be read as an image: {error}.") from error


def _name(image: ImageLike) -> str:
    """The image's file, where there is one."""
    if isinstance(image, dict):
        return image.get("path") or ""
    return "" if isinstance(image, PIL.Image.Image) else str(image)


def qualified_name(function: Callable) -> str:
    """What a function is called, with its module; for an object that can be called, its class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def check_settings(settings: dict[str, Any], name: str, known: Iterable[str]) -> None:
    """
    Checks what is left for [`~evaluate.Metric`], which would drop what it does not know in silence.

    Args:
        settings (`dict`):
            The settings that the metric has not taken.
        name (`str`):
            The metric's name, for the message.
        known (`Iterable[str]`):
            The settings that it takes, likewise.

    Raises:
        `ValueError`: If one is neither the metric's nor that of [`~evaluate.Metric`].
    """
    if unknown := sorted(settings.keys() - inspect.signature(evaluate.Metric).parameters.keys()):
        raise ValueError(f"`{name}` has no setting {', '.join(unknown)}; there is {', '.join(known)}.")


class ImageMetric(evaluate.Metric, ABC):
    """
    A scorer as a module of `evaluate`: `metric.compute(images=[...], prompts=[...], batch_size=16)` gives what
    [`Scorer.result`] describes. The scorer is made, and its weights are read, once, when the first images come.

    `evaluate` keeps what it is given on the disk until it computes: give files of images rather than images in memory, which it
    would encode.

    Args:
        settings:
            Arguments of the scorer, such as `device`, and of [`~evaluate.Metric`].
    """

    citation: str = ""

    def __init__(self, *args, **settings):
        known = inspect.signature(self.scorer_type).parameters
        self.scorer_settings = {name: settings.pop(name) for name in known if name in settings}
        check_settings(settings, self.scorer_type.name, known)
        super().__init__(*args, **settings)

    @property
    @abstractmethod
    def scorer_type(self) -> type[Scorer]:
        """The scorer's class."""

    @cached_property
    def scorer(self) -> Scorer:
        return self.scorer_type(**self.scorer_settings)

    def _info(self) -> evaluate.MetricInfo:
        features = {"images": Image(decode=False)}
        if self.scorer_type.needs_prompts:
            features["prompts"] = Value("string")
        return evaluate.MetricInfo(
            description=inspect.cleandoc(self.scorer_type.__doc__),
            citation=self.citation,
            inputs_description=inspect.cleandoc(self.__doc__),
            features=Features(features),
        )

    def _compute(
        self, images: list[ImageLike], prompts: list[str] | None = None, batch_size: int = 16
    ) -> dict[str, Any]:
        return self.scorer.result(self.scorer.score(images, prompts, batch_size=batch_size))
