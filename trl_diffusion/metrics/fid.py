# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The Fréchet distance between features of images (Heusel et al., NeurIPS 2017)."""

import warnings
from pathlib import Path
from typing import Any

import torch

from trl_diffusion.metrics.inception import InceptionFeatures, InceptionMetric
from trl_diffusion.metrics.scorer import ImageLike


def fid_from_features(features: torch.Tensor, reference_features: torch.Tensor) -> float:
    """
    The Fréchet distance between normal distributions with the features' means and covariances:
    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`, by torchmetrics in float64.

    Args:
        features (`torch.Tensor` of shape `(N, D)`):
            Features of the images.
        reference_features (`torch.Tensor` of shape `(M, D)`):
            Features of the references.

    Returns:
        `float`: 0 for equal distributions, up to rounding.

    Raises:
        `ValueError`: If a set has fewer than two images.
        `ImportError`: If torchmetrics is not installed.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError('FID needs torchmetrics: `pip install "trl-diffusion[evaluation]"`.') from error

    (n, d), m = features.shape, len(reference_features)
    if min(n, m) < 2:
        raise ValueError(f"FID needs two images and two references at the least, there are {n} and {m}.")
    if min(n, m) <= d:
        warnings.warn(
            f"FID of {n} images and {m} references is biased, and not to be compared with that of other numbers: "
            f"covariances of {d} features need {d + 1} images at the least, and 10,000 or more are usual. KID has no bias."
        )
    given = torch.nn.Identity()  # torchmetrics takes the features as they are
    given.num_features = d
    distance = FrechetInceptionDistance(feature=given)
    distance.update(reference_features.double(), real=True)
    distance.update(features.double(), real=False)
    return distance.compute().item()


def fid_result(
    features: torch.Tensor, reference_features: torch.Tensor, extractor: InceptionFeatures
) -> dict[str, Any]:
    """
    FID of features that were computed before, for KID as well, or for another set of images.

    Args:
        features (`torch.Tensor` of shape `(N, 2048)`):
            Features of the images.
        reference_features (`torch.Tensor` of shape `(M, 2048)`):
            Features of the references.
        extractor ([`InceptionFeatures`]):
            What they were computed with.

    Returns:
        `dict`: the distance under a name that says what it depends on, `fid_<spec>_n<N>`, for instance
        `fid_inception2015_2048_clean_n10000`; `num_images`, `num_references`, `higher_is_better` and `weights`.
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
    FID between images and references.

    Args:
        images (`list[PIL.Image.Image | str | Path | dict]`, `str` or `Path`):
            The images, their files, or a folder.
        references (`list[PIL.Image.Image | str | Path | dict]`, `str` or `Path`):
            What they are compared with, likewise.
        extractor ([`InceptionFeatures`]):
            What sees them.
        batch_size (`int`, *optional*, defaults to `32`):
            Images at a time.

    Returns:
        `dict`: as of [`fid_result`].
    """
    return fid_result(extractor(images, batch_size), extractor(references, batch_size), extractor)


class FID(InceptionMetric):
    """Fréchet Inception distance: how far the distribution of images is from that of references. Lower is better."""

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
