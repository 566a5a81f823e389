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

"""Scores of images, each a module of `evaluate` and usable without it."""

from pathlib import Path


# Each is a module of this package.
METRICS = (
    "pickscore",
    "hpsv2",
    "hpsv2_1",
    "aesthetic",
    "clip_score",
    "image_reward",
    "fid",
    "kid",
    "num_negative_attributes",
    "caption_match",
    "win_rate",
)


def metric_path(name: str) -> str:
    """
    Where a metric is, for `evaluate.load`.

    Args:
        name (`str`):
            Name of a metric, such as `"pickscore"`.

    Returns:
        `str`: the path of its module.

    Raises:
        `ValueError`: If there is no such metric; names those that there are.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    return str(Path(__file__).with_name(f"{name}.py"))
