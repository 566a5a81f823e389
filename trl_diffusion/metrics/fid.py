# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The Fréchet Inception distance (Heusel et al., NeurIPS 2017)."""

import warnings
from pathlib import Path
from typing import Any

import torch

from trl_diffusion.metrics.inception import InceptionFeatures, InceptionMetric
from trl_diffusion.metrics.scorer import ImageLike


def fid_from_features(features: torch.Tensor, reference_features: torch.Tensor) -> float:
    """
    Computes the Fréchet distance between normal distributions with the means and covariances of the features:
    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`, with torchmetrics in float64.

    Args:
        features (`torch.Tensor` of shape `(N, D)`):
            Features of the images.
        reference_features (`torch.Tensor` of shape `(M, D)`):
            Features of the reference images.

    Returns:
        `float`: 0 for equal distributions, up to rounding.

    Raises:
        `ValueError`: If a set has fewer than two images.
        `ImportError`: If torchmetrics is not installed.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError('FID needs torchmetrics: run `pip install "trl-diffusion[evaluation]"`.') from error

    (n, d), m = features.shape, len(reference_features)
    if min(n, m) < 2:
        raise ValueError(f"FID needs at least two images and two references, got {n} and {m}.")
    if min(n, m) <= d:
        warnings.warn(
            f"The FID of {n} images and {m} references is biased, and not comparable with the FID of other numbers of "
            f"images: the covariance of {d} features needs at least {d + 1} images, and 10,000 or more are usual. KID has "
            "no bias."
        )
    given = torch.nn.Identity()  # torchmetrics then uses the given features
    given.num_features = d
    distance = FrechetInceptionDistance(feature=given)
    distance.update(reference_features.double(), real=True)
    distance.update(features.double(), real=False)
    return distance.compute().item()


def fid_result(
    features: torch.Tensor, reference_features: torch.Tensor, extractor: InceptionFeatures
) -> dict[str, Any]:
    """
    Computes FID (arXiv:1706.08500) from features, which can be shared with KID or between sets of images.

    Args:
        features (`torch.Tensor` of shape `(N, 2048)`):
            Features of the images.
        reference_features (`torch.Tensor` of shape `(M, 2048)`):
            Features of the reference images.
        extractor ([`InceptionFeatures`]):
            The extractor of the features.

    Returns:
        `dict`: the distance under the name `fid_<spec>_n<N>`, such as `fid_inception2015_2048_clean_n10000`, which
        states what it depends on; `num_images`, `num_references`, `higher_is_better` and `weights`.

    Raises:
        `ValueError`: If there are fewer than two images or two references.
    """
    return {
        f"fid_{extractor.spec}_n{len(features)}": fid_from_features(features, reference_features),
        "num_images": len(features),
        "num_references": len(reference_features),
        "higher_is_better": False,
        "weights": extractor.weights,
    }


def frechet_inception_distance(
    images: list[ImageLike] | str | Path,
    references: list[ImageLike] | str | Path,
    extractor: InceptionFeatures,
    batch_size: int = 32,
) -> dict[str, Any]:
    """
    Computes FID between images and reference images.

    Args:
        images (`list[PIL.Image.Image | str | Path | dict]`, `str` or `Path`):
            The images, their files, or a folder.
        references (`list[PIL.Image.Image | str | Path | dict]`, `str` or `Path`):
            The reference images, in the same form.
        extractor ([`InceptionFeatures`]):
            The feature extractor.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of images per batch.

    Returns:
        `dict`: see [`fid_result`].
    """
    return fid_result(extractor(images, batch_size), extractor(references, batch_size), extractor)


class FID(InceptionMetric):
    """Fréchet Inception distance between the distributions of images and reference images. Lower is better."""

    citation = """\
@inproceedings{heusel2017gans,
    title={{GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium}},
    author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
    booktitle={Advances in Neural Information Processing Systems},
    year={2017},
}"""

    def _compute(
        self, images: list[ImageLike], reference_images: list[ImageLike] | str | Path, batch_size: int = 32
    ) -> dict[str, Any]:
        return frechet_inception_distance(images, reference_images, self.extractor, batch_size)
