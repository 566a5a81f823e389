# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Metrics of images. Each is a module of `evaluate` and can be used without it."""

from pathlib import Path


# Names of modules in this package
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
    Returns the path of a metric, for `evaluate.load`.

    Args:
        name (`str`):
            Name of a metric, such as `"pickscore"`.

    Returns:
        `str`: the path of its module.

    Raises:
        `ValueError`: If there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    return str(Path(__file__).with_name(f"{name}.py"))
