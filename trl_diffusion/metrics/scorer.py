# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Shared by all metrics of single images: scoring batches of images, and summarizing the scores.

A metric consists of a [`Scorer`], which implements the algorithm, and a thin [`ImageMetric`] around it for
`evaluate.load`. The files of the metrics use absolute imports, because `evaluate` copies them to another place before
it imports them.
"""

import inspect
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
from trl_diffusion.data.images import open_image as read_image
from trl_diffusion.data.pictures import upright_image


ImageLike = PIL.Image.Image | str | Path | dict[str, Any]  # a dict as `datasets` stores an image


class ScoringError(Exception):
    """A single image could not be scored, for example because a model gave no valid answer."""


@dataclass
class Scores:
    """
    Scores of a list of images.

    Args:
        values (`list[float | None]`):
            One score per image, `None` if the image could not be scored.
        errors (`dict[int, str]`):
            Reasons for missing scores, by the index of the image.
    """

    values: list[float | None]
    errors: dict[int, str] = field(default_factory=dict)

    @property
    def scored(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """The mean over the scored images, `None` if there are none."""
        return statistics.fmean(self.scored) if self.scored else None

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean, `None` with fewer than two scores."""
        return statistics.stdev(self.scored) / math.sqrt(len(self.scored)) if len(self.scored) > 1 else None


class Scorer(ABC):
    """
    Scores images one by one.

    Attributes:
        name (`str`):
            Name of the score, in results and tables.
        higher_is_better (`bool`):
            Whether a higher score is better.
        needs_prompts (`bool`):
            Whether the score depends on the image's prompt.
        weights (`dict[str, str]`):
            Ids of the weights that the score depends on, with their revisions.
        settings (`dict[str, Any]`):
            What else it depends on. Scores of other settings are not used again.

    Args:
        device (`str`, *optional*):
            Device of the model. Defaults to the GPU if there is one, else to the CPU.
    """

    name: str
    higher_is_better: bool = True
    needs_prompts: bool = True

    def __init__(self, device: str | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.weights: dict[str, str] = {}
        self.settings: dict[str, Any] = {}

    def prepare(self, image: PIL.Image.Image) -> Any:
        """Converts an image to an input of the model. Runs in threads while the model processes the previous batch."""
        return image

    @abstractmethod
    def score_batch(self, prepared: list, prompts: list[str] | None) -> list[float | ScoringError]:
        """
        Scores a batch.

        Args:
            prepared (`list` of length `B`):
                Outputs of [`~Scorer.prepare`].
            prompts (`list[str]` of length `B`, *optional*):
                Prompts of the images, `None` if the score does not need them.

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
                The images, or their files or stored forms in `datasets`, which are read batch by batch.
            prompts (`list[str]` of length `N`, *optional*):
                Prompts of the images. Required if the score needs them.
            batch_size (`int`, *optional*, defaults to `16`):
                Number of images per batch.
            disable_tqdm (`bool`, *optional*, defaults to `True`):
                Whether to hide the progress bar.

        Returns:
            [`Scores`]

        Raises:
            `ValueError`: If there are no images, if the number of prompts differs, if a file is not an image, or if a
                score is not finite.
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
                            f"{', '.join(self.weights) or 'of the scorer'} are damaged, or overflow in their data type."
                        )
                    scores.values.append(value)
                progress.update(len(prepared))
        return scores

    def result(self, scores: Scores) -> dict[str, Any]:
        """
        Builds the result of the metric.

        Args:
            scores ([`Scores`]):
                The scores.

        Returns:
            `dict`: the mean over the scored images under the name of the metric, `standard_error`, `scores`, `errors`
            by the index of the image, `higher_is_better` and `weights`.
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
            Converts an image to an input of the model.
        batch_size (`int`):
            Number of images per batch.

    Yields:
        `list`: outputs of `prepare` for the images of one batch.
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
            The image, its file, or a dict with its `bytes` or `path` as `datasets` stores it.

    Returns:
        `PIL.Image.Image`: the image as a viewer shows it, see [`data.pictures.upright_image`].

    Raises:
        `ValueError`: If it cannot be read.
    """
    try:
        return upright_image(read_image(str(image) if isinstance(image, Path) else image, any_shape=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"{_name(image) or 'A stored image'} cannot be read as an image: {error}.") from error


def _name(image: ImageLike) -> str:
    """The file of the image, if any."""
    if isinstance(image, dict):
        return image.get("path") or ""
    return "" if isinstance(image, PIL.Image.Image) else str(image)


def qualified_name(function: Callable) -> str:
    """The module and name of a function, or of the class of a callable object."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def check_settings(settings: dict[str, Any], name: str, known: Iterable[str]) -> None:
    """
    Checks the settings that are passed on to [`~evaluate.Metric`], which silently ignores unknown ones.

    Args:
        settings (`dict`):
            Settings that are not the metric's own.
        name (`str`):
            Name of the metric, for the message.
        known (`Iterable[str]`):
            Settings of the metric, for the message.

    Raises:
        `ValueError`: If a setting is not one of [`~evaluate.Metric`].
    """
    if unknown := sorted(settings.keys() - inspect.signature(evaluate.Metric).parameters.keys()):
        raise ValueError(f"`{name}` has no setting {', '.join(unknown)}; its settings are {', '.join(known)}.")


class ImageMetric(evaluate.Metric, ABC):
    """
    A scorer as a module of `evaluate`: `metric.compute(images=[...], prompts=[...], batch_size=16)` returns the result
    of [`Scorer.result`]. The scorer is created, and its weights are loaded, at the first use.

    `evaluate` writes its inputs to the disk before it computes. Pass image files rather than images in memory, which
    it would have to encode.

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
