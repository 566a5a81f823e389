# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The maximum mean discrepancy between features of images (Binkowski et al., Demystifying MMD GANs, ICLR 2018)."""

import warnings
from pathlib import Path
from typing import Any

import torch

from trl_diffusion.metrics.inception import InceptionFeatures, InceptionMetric
from trl_diffusion.metrics.scorer import ImageLike


def kid_from_features(
    features: torch.Tensor,
    reference_features: torch.Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """
    The squared maximum mean discrepancy under the kernel `(x.y / D + 1)^3`, without bias, over random subsets of both sets,
    by torchmetrics in float64.

    Args:
        features (`torch.Tensor` of shape `(N, D)`):
            Features of the images.
        reference_features (`torch.Tensor` of shape `(M, D)`):
            Features of the references.
        subsets (`int`, *optional*, defaults to `100`):
            Number of subsets.
        subset_size (`int`, *optional*, defaults to `1000`):
            Images in a subset.
        seed (`int`, *optional*, defaults to `0`):
            Of the subsets.

    Returns:
        `tuple[float, float]`: mean and standard deviation over the subsets. The mean is 0 for equal distributions, up to
        chance, and may be negative.

    Raises:
        `ValueError`: If a set has fewer images than a subset, or a subset fewer than two.
        `ImportError`: If torchmetrics is not installed.
    """
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ImportError('KID needs torchmetrics: `pip install "trl-diffusion[evaluation]"`.') from error

    n, m = len(features), len(reference_features)
    if subsets < 1:
        raise ValueError(f"`subsets` must be at least 1, got {subsets}.")
    if not 2 <= subset_size <= min(n, m):
        raise ValueError(
            f"KID's subsets must have 2 images at the least, and no more than there are: there are {n} images and {m} "
            f"references, and `subset_size` is {subset_size}."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
        distance = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=subsets, subset_size=subset_size)
    distance.update(reference_features.double(), real=True)
    distance.update(features.double(), real=False)
    # Subsets are drawn on the CPU. `torch.manual_seed` would reseed the GPUs too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, deviation = distance.compute()
    return mean.item(), deviation.item()


def kid_result(
    features: torch.Tensor,
    reference_features: torch.Tensor,
    extractor: InceptionFeatures,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    KID of features that were computed before, for FID as well, or for another set of images.

    Args:
        features (`torch.Tensor` of shape `(N, 2048)`):
            Features of the images.
        reference_features (`torch.Tensor` of shape `(M, 2048)`):
            Features of the references.
        extractor ([`InceptionFeatures`]):
            What they were computed with.
        subsets (`int`, *optional*, defaults to `100`):
            Number of subsets.
        subset_size (`int`, *optional*, defaults to `1000`):
            Images in a subset; all of the smaller set, where it has fewer.
        seed (`int`, *optional*, defaults to `0`):
            Of the subsets.

    Returns:
        `dict`: the mean over the subsets under a name that says what it depends on, `kid_<spec>_<subsets>x<size>_n<N>`, for
        instance `kid_inception2015_2048_clean_100x1000_n10000`; `standard_deviation` over the subsets, which is not the
        mean's error; `seed`, `num_images`, `num_references`, `higher_is_better` and `weights`.
    """
    subset_size = min(subset_size, len(features), len(reference_features))
    mean, deviation = kid_from_features(features, reference_features, subsets, subset_size, seed)
    return {
        f"kid_{extractor.spec}_{subsets}x{subset_size}_n{len(features)}": mean,
        "standard_deviation": deviation,
        "seed": seed,
        "num_images": len(features),
        "num_references": len(reference_features),
        "higher_is_better": False,
        "weights": extractor.weights,
    }


def kernel_inception_distance(
    images: list[ImageLike] | str | Path,
    references: list[ImageLike] | str | Path,
    extractor: InceptionFeatures,
    batch_size: int = 32,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    KID between images and references.

    Args:
        images (`list[PIL.Image.Image | str | Path | dict]`, `str` or `Path`):
            The images, their files, or a folder.
        references (`list[PIL.Image.Image | str | Path | dict]`, `str` or `Path`):
            What they are compared with, likewise.
        extractor ([`InceptionFeatures`]):
            What sees them.
        batch_size (`int`, *optional*, defaults to `32`):
            Images at a time.
        subsets (`int`, *optional*, defaults to `100`):
            As for [`kid_result`].
        subset_size (`int`, *optional*, defaults to `1000`):
            As for [`kid_result`].
        seed (`int`, *optional*, defaults to `0`):
            As for [`kid_result`].

    Returns:
        `dict`: as of [`kid_result`].
    """
    features, reference_features = extractor(images, batch_size), extractor(references, batch_size)
    return kid_result(features, reference_features, extractor, subsets, subset_size, seed)


class KID(InceptionMetric):
    """
    Kernel Inception distance: how far the distribution of images is from that of references, whatever their numbers. Lower is
    better. `compute` takes `subsets`, `subset_size` and `seed` too.
    """

    citation = """\
@inproceedings{binkowski2018demystifying,
    title={{Demystifying MMD GANs}},
    author={Bi{\\'n}kowski, Miko{\\l}aj and Sutherland, Danica J. and Arbel, Michael and Gretton, Arthur},
    booktitle={International Conference on Learning Representations},
    year={2018},
}"""

    def _compute(
        self,
        images: list[ImageLike],
        reference_images: list[ImageLike] | str | Path,
        batch_size: int = 32,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        return kernel_inception_distance(
            images, reference_images, self.extractor, batch_size, subsets, subset_size, seed
        )
