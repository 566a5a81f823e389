# Copyright 2026 The trl_diffusion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""From rows of a dataset to a batch of tensors."""

from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch

from ..criteria import Criteria
from ..noising import keyed_generator
from .formats import check_attributes, check_box, check_preference, open_image
from .transforms import TrainingImage, prepare_image


@dataclass
class InstancePairCollator:
    """
    Collates rows with the columns `id`, `prompt`, `chosen`, `rejected` and, where present, `instances`.

    Crops and flips are drawn for each image from (seed, row id), so that a row looks the same in every epoch, in every
    process and after a resume. Each image of a pair has its own.

    Args:
        resolution (`int`):
            Width and height in pixels of the training images.
        center_crop (`bool`, *optional*, defaults to `True`):
            Crop the middle; else crop anywhere.
        random_flip (`bool`, *optional*, defaults to `False`):
            Flip left to right half of the time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of crops and flips.
    """

    resolution: int
    center_crop: bool = True
    random_flip: bool = False
    seed: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            rows (`list[dict]` of length `B`):
                The rows.

        Returns:
            `dict`: `chosen_pixel_values` and `rejected_pixel_values` `(B, 3, H, W)` in [-1, 1]; for both images also
            `*_boxes` `(B, N, 4)` (unit boxes, zeros as padding), `*_original_sizes` and `*_crop_top_lefts` `(B, 2)`;
            `judged` and `conflicts` `(B, N)`, bool; `id` and `prompt`, lists of `B` strings.

        Raises:
            `ValueError`: If a row does not fit; names the row and the column.
        """
        ids = _ids(rows)
        num_instances = max(len(_instances(row)) for row in rows)
        batch = {}
        for column in ("chosen", "rejected"):
            images = [self._prepare(row, column) for row in rows]
            batch[f"{column}_pixel_values"] = torch.stack([image.pixel_values for image in images])
            batch[f"{column}_boxes"] = torch.stack([_pad(image.boxes, num_instances) for image in images])
            batch[f"{column}_original_sizes"] = torch.tensor([image.original_size for image in images])
            batch[f"{column}_crop_top_lefts"] = torch.tensor([image.crop_top_left for image in images])

        preferences = [_preferences(row) for row in rows]
        for key, counted in (("judged", ("chosen", "rejected")), ("conflicts", ("rejected",))):
            flags = [torch.tensor([name in counted for name in row], dtype=torch.bool) for row in preferences]
            batch[key] = torch.stack([_pad(row, num_instances) for row in flags])
        batch["id"] = ids
        batch["prompt"] = [_prompt(row) for row in rows]
        return batch

    def _prepare(self, row: dict[str, Any], column: str) -> TrainingImage:
        image = _open_image(row, column)
        boxes = []
        for index, instance in enumerate(_instances(row)):
            try:
                boxes.append(check_box(instance.get(f"{column}_box"), *image.size))
            except ValueError as error:
                raise ValueError(
                    f"`instances[{index}].{column}_box` of the row with id {row['id']!r} is not a box: {error}."
                ) from error
        return prepare_image(
            image,
            torch.tensor(boxes).reshape(-1, 4),
            self.resolution,
            keyed_generator(self.seed, str(row["id"]), column, "augmentation"),
            center_crop=self.center_crop,
            random_flip=self.random_flip,
        )


@dataclass
class AttributeCollator:
    """
    Collates rows with the columns `id`, `prompt`, `image`, `positive_attributes` and `negative_attributes`.

    Crops and flips are drawn for each image from (seed, row id), so that a row looks the same in every epoch, in every
    process and after a resume.

    Args:
        resolution (`int`):
            Width and height in pixels of the training images.
        criteria ([`Criteria`]):
            The tree of the attributes.
        center_crop (`bool`, *optional*, defaults to `True`):
            Crop the middle; else crop anywhere.
        random_flip (`bool`, *optional*, defaults to `False`):
            Flip left to right half of the time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of crops and flips.
    """

    resolution: int
    criteria: Criteria
    center_crop: bool = True
    random_flip: bool = False
    seed: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            rows (`list[dict]` of length `B`):
                The rows.

        Returns:
            `dict`: `pixel_values` `(B, 3, H, W)` in [-1, 1]; `original_sizes` and `crop_top_lefts` `(B, 2)`; `id` and
            `prompt`, lists of `B` strings; `positive_attributes` and `negative_attributes`, lists of `B` lists of ids.

        Raises:
            `ValueError`: If a row does not fit; names the row and the column.
        """
        ids = _ids(rows)
        images = [self._prepare(row) for row in rows]
        positive, negative = zip(*(check_attributes(row, self.criteria) for row in rows), strict=True)
        return {
            "id": ids,
            "prompt": [_prompt(row) for row in rows],
            "pixel_values": torch.stack([image.pixel_values for image in images]),
            "original_sizes": torch.tensor([image.original_size for image in images]),
            "crop_top_lefts": torch.tensor([image.crop_top_left for image in images]),
            "positive_attributes": list(positive),
            "negative_attributes": list(negative),
        }

    def _prepare(self, row: dict[str, Any]) -> TrainingImage:
        return prepare_image(
            _open_image(row, "image"),
            torch.empty(0, 4),
            self.resolution,
            keyed_generator(self.seed, str(row["id"]), "image", "augmentation"),
            center_crop=self.center_crop,
            random_flip=self.random_flip,
        )


def _ids(rows: list[dict[str, Any]]) -> list[str]:
    if any(row["id"] is None for row in rows):
        raise ValueError(
            "A row has no `id`. Every row needs its own, or none: without the column, rows are numbered. Remove it with "
            '`dataset.remove_columns("id")`, or fill it.'
        )
    return [str(row["id"]) for row in rows]


def _open_image(row: dict[str, Any], column: str) -> PIL.Image.Image:
    try:
        return open_image(row[column])
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(
            f"The image in column `{column}` of the row with id {row['id']!r} cannot be read: {error}. Replace it, or "
            "drop the row with `dataset.filter`."
        ) from error


def _instances(row: dict[str, Any]) -> list[dict[str, Any]]:
    instances = row.get("instances") or []
    if not all(isinstance(instance, dict) for instance in instances):
        raise ValueError(f"`instances` of the row with id {row['id']!r} must be a list of objects, got {instances}.")
    return instances


def _preferences(row: dict[str, Any]) -> list[str]:
    preferences = []
    for index, instance in enumerate(_instances(row)):
        try:
            preferences.append(check_preference(instance.get("preference")))
        except ValueError as error:
            raise ValueError(
                f"`instances[{index}].preference` of the row with id {row['id']!r} is not a preference: {error}."
            ) from error
    return preferences


def _prompt(row: dict[str, Any]) -> str:
    if not isinstance(row["prompt"], str):
        raise ValueError(f"`prompt` of the row with id {row['id']!r} must be a string, got {row['prompt']!r}.")
    return row["prompt"]


def _pad(values: torch.Tensor, length: int) -> torch.Tensor:
    """Appends zeros along the first dimension up to `length`."""
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])
