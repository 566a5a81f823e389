# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The kernel Inception distance (Binkowski et al., Demystifying MMD GANs, ICLR 2018)."""

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
    Computes the unbiased squared maximum mean discrepancy with the kernel `(x.y / D + 1)^3` on random subsets of both
    sets, with torchmetrics in float64.

    Args:
        features (`torch.Tensor` of shape `(N, D)`):
            Features of the images.
        reference_features (`torch.Tensor` of shape `(M, D)`):
            Features of the reference images.
        subsets (`int`, *optional*, defaults to `100`):
            Number of subsets.
        subset_size (`int`, *optional*, defaults to `1000`):
            Images per subset.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the subsets.

    Returns:
        `tuple[float, float]`: mean and standard deviation over the subsets. For equal distributions, the mean varies
        around 0 and may be negative.

    Raises:
        `ValueError`: If `subsets` is less than 1, or `subset_size` is less than 2 or larger than one of the sets.
        `ImportError`: If torchmetrics is not installed.
    """
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ImportError('KID needs torchmetrics: run `pip install "trl-diffusion[evaluation]"`.') from error

    n, m = len(features), len(reference_features)
    if subsets < 1:
        raise ValueError(f"`subsets` must be at least 1, got {subsets}.")
    if not 2 <= subset_size <= min(n, m):
        raise ValueError(
            f"The `subset_size` of KID must be at least 2 and at most the number of images and of references: there are "
            f"{n} images and {m} references, and `subset_size` is {subset_size}."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
        distance = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=subsets, subset_size=subset_size)
    distance.update(reference_features.double(), real=True)
    distance.update(features.double(), real=False)
    # Subsets are sampled on the CPU. `torch.manual_seed` would also reseed the GPUs.
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
    Computes KID (arXiv:1801.01401) from features, which can be shared with FID or between sets of images.

    Args:
        features (`torch.Tensor` of shape `(N, 2048)`):
            Features of the images.
        reference_features (`torch.Tensor` of shape `(M, 2048)`):
            Features of the reference images.
        extractor ([`InceptionFeatures`]):
            The extractor of the features.
        subsets (`int`, *optional*, defaults to `100`):
            Number of subsets.
        subset_size (`int`, *optional*, defaults to `1000`):
            Images per subset, at most the size of the smaller set.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the subsets.

    Returns:
        `dict`: the mean over the subsets under the name `kid_<spec>_<subsets>x<size>_n<N>`, such as
        `kid_inception2015_2048_clean_100x1000_n10000`, which states what it depends on; `standard_deviation` over the
        subsets, which is not the standard error of the mean; `seed`, `num_images`, `num_references`,
        `higher_is_better` and `weights`.

    Raises:
        `ValueError`: If `subsets` is below 1, `subset_size` is below 2, or there are fewer than two images or references.
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
    Computes KID between images and reference images.

    Args:
        images (`list[PIL.Image.Image | str | Path | dict]`, `str` or `Path`):
            The images, their files, or a folder.
        references (`list[PIL.Image.Image | str | Path | dict]`, `str` or `Path`):
            The reference images, in the same form.
        extractor ([`InceptionFeatures`]):
            The feature extractor.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of images per batch.
        subsets (`int`, *optional*, defaults to `100`):
            See [`kid_result`].
        subset_size (`int`, *optional*, defaults to `1000`):
            See [`kid_result`].
        seed (`int`, *optional*, defaults to `0`):
            See [`kid_result`].

    Returns:
        `dict`: see [`kid_result`].
    """
    features, reference_features = extractor(images, batch_size), extractor(references, batch_size)
    return kid_result(features, reference_features, extractor, subsets, subset_size, seed)


class KID(InceptionMetric):
    """
    Kernel Inception distance between the distributions of images and reference images, unbiased for any number of
    images. Lower is better. `compute` also accepts `subsets`, `subset_size` and `seed`.
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
