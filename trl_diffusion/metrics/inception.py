# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Shared by FID and KID: the features of TensorFlow's Inception v3 of 2015-12-05, with which FID is defined.

Images are resized as in Clean-FID (Parmar et al., CVPR 2022, https://github.com/GaParmar/clean-fid). The original FID
(Heusel et al., NeurIPS 2017, https://github.com/bioinf-jku/TTUR) resizes with TensorFlow, which aliases.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from datasets import Features, Image
from torch import nn
from tqdm import tqdm

from trl_diffusion.metrics.scorer import ImageLike, check_settings, prepared_batches
from trl_diffusion.metrics.weights import load_tensors, local_file, read_tensors


# The name ends with the beginning of the file's SHA-256. torch-fidelity publishes the same file under another name.
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d"
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Convolution(nn.Module):
    """
    Convolution, batch normalisation and ReLU.

    Args:
        in_channels (`int`):
            Channels of the input.
        out_channels (`int`):
            Channels of the output.
        kernel_size (`int` or `tuple[int, int]`):
            Size of the kernel.
        stride (`int`, *optional*, defaults to `1`):
            Stride.
        padding (`str`, *optional*, defaults to `"same"`):
            `"same"` keeps the size, `"valid"` pads nothing.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: str = "same",
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def average_pool(x: torch.Tensor) -> torch.Tensor:
    """3x3 mean pooling that ignores padding, as in TensorFlow. torchvision's Inception counts padding as zeros."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: torch.Tensor) -> torch.Tensor:
    """3x3 max pooling."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionA(nn.Module):
    """Kernels of size 1, 5 and two of 3, at 35x35."""

    def __init__(self, channels: int, pool_channels: int):
        super().__init__()
        self.branch1x1 = Convolution(channels, 64, 1)
        self.branch5x5_1 = Convolution(channels, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(channels, pool_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.branch1x1(x)
        large = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pooled = self.branch_pool(average_pool(x))
        return torch.cat([small, large, double, pooled], dim=1)


class InceptionB(nn.Module):
    """From 35x35 to 17x17."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3 = Convolution(channels, 384, 3, stride=2, padding="valid")
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2, padding="valid")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single = self.branch3x3(x)
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([single, double, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):
    """Kernels of size 1x7 and 7x1, at 17x17."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.branch1x1 = Convolution(channels, 192, 1)
        self.branch7x7_1 = Convolution(channels, inner, 1)
        self.branch7x7_2 = Convolution(inner, inner, (1, 7))
        self.branch7x7_3 = Convolution(inner, 192, (7, 1))
        self.branch7x7dbl_1 = Convolution(channels, inner, 1)
        self.branch7x7dbl_2 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_3 = Convolution(inner, inner, (1, 7))
        self.branch7x7dbl_4 = Convolution(inner, inner, (7, 1))
        self.branch7x7dbl_5 = Convolution(inner, 192, (1, 7))
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.branch1x1(x)
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pooled = self.branch_pool(average_pool(x))
        return torch.cat([small, single, double, pooled], dim=1)


class InceptionD(nn.Module):
    """From 17x17 to 8x8."""

    def __init__(self, channels: int):
        super().__init__()
        self.branch3x3_1 = Convolution(channels, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2, padding="valid")
        self.branch7x7x3_1 = Convolution(channels, 192, 1)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2, padding="valid")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.branch3x3_2(self.branch3x3_1(x))
        large = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([small, self.branch7x7x3_4(large), F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):
    """Kernels of size 1x3 and 3x1 in parallel, at 8x8."""

    def __init__(self, channels: int, pool: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.pool = pool
        self.branch1x1 = Convolution(channels, 320, 1)
        self.branch3x3_1 = Convolution(channels, 384, 1)
        self.branch3x3_2a = Convolution(384, 384, (1, 3))
        self.branch3x3_2b = Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = Convolution(channels, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1))
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = self.branch1x1(x)
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = self.branch_pool(self.pool(x))
        split = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        split += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([small, *split, pooled], dim=1)


class InceptionV3(nn.Module):
    """
    The variant of Inception v3 (Szegedy et al., CVPR 2016) that FID uses: average pooling ignores padding, and the
    last block uses max pooling. The parameters have torchvision's names.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padding="valid")
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1, padding="valid")
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding="valid")
        self.Mixed_5b = InceptionA(192, pool_channels=32)
        self.Mixed_5c = InceptionA(256, pool_channels=64)
        self.Mixed_5d = InceptionA(288, pool_channels=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, inner=128)
        self.Mixed_6c = InceptionC(768, inner=160)
        self.Mixed_6d = InceptionC(768, inner=160)
        self.Mixed_6e = InceptionC(768, inner=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, pool=average_pool)
        self.Mixed_7c = InceptionE(2048, pool=max_pool)
        # Not used. With 1008 classes, it distinguishes FID's weights from torchvision's, which have 1000 classes.
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixels (`torch.Tensor` of shape `(B, 3, 299, 299)`):
                RGB values from 0 to 255.

        Returns:
            `torch.Tensor` of shape `(B, 2048)`: mean of the last block over all positions.
        """
        x = (pixels - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (B, 768, 17, 17)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)
        return x.mean(dim=(2, 3))


def fetch_inception() -> tuple[Path, str]:
    """
    Finds the published weights in the cache of `torch.hub`, or downloads them.

    Returns:
        `tuple[Path, str]`: the file, and its hash, which serves as revision.

    Raises:
        `ValueError`: If they cannot be downloaded, or are not the published ones.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), hash_prefix=SHA256)
        except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the hash does not match
            raise ValueError(
                f"The weights of FID's Inception are not at {path} and could not be downloaded from {URL}: {error} Download "
                "this file on a machine with network access, and put it at this path or pass its path as `weights_path`."
            ) from error
    path, digest = local_file(path)
    if not digest.startswith(f"sha256:{SHA256}"):
        raise ValueError(f"{path} is not the file from {URL}, its hash is {digest}: delete it to download it again.")
    return path, digest


def resize(image: PIL.Image.Image) -> torch.Tensor:
    """
    Resizes an image as Clean-FID does: bicubic, antialiased, per channel, in floating point without rounding.

    Args:
        image (`PIL.Image.Image`):
            Image of any size and mode. Transparency is dropped, and grayscale is converted to RGB.

    Returns:
        `torch.Tensor` of shape `(3, 299, 299)`, with values from 0 to 255.
    """
    channels = [
        channel.convert("F").resize((299, 299), PIL.Image.Resampling.BICUBIC)
        for channel in image.convert("RGB").split()
    ]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)


def image_files(folder: str | Path) -> list[Path]:
    """
    Lists the images in a folder and its subfolders.

    Args:
        folder (`str` or `Path`):
            The folder.

    Returns:
        `list[Path]`: the files with an image suffix, sorted.

    Raises:
        `ValueError`: If there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(
            f"The folder {folder} has no images: no file in it ends with one of {', '.join(IMAGE_SUFFIXES)}."
        )
    return files


class InceptionFeatures:
    """
    Computes the Inception features of images, for FID and KID, resized as in Clean-FID (https://github.com/GaParmar/clean-fid).

    Attributes:
        spec (`str`):
            What features depend on besides the images: the network (`inception2015`), the layer (`2048`, its last
            pooling) and the resizing (`clean`).
        weights (`dict[str, str]`):
            Source of the weights, and their hash.

    Args:
        weights_path (`str` or `Path`, *optional*):
            File in the format of the published one. Defaults to the published one, which is downloaded.
        device (`str`, *optional*):
            Device of the network. Defaults to the GPU if there is one, else to the CPU.

    Raises:
        `ValueError`: If the weights cannot be loaded, or do not fit the network.
    """

    spec = "inception2015_2048_clean"

    def __init__(self, weights_path: str | Path | None = None, device: str | None = None):
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        path, digest = fetch_inception() if weights_path is None else local_file(weights_path)
        self.weights = {str(weights_path or URL): digest}
        network = InceptionV3()
        # Batch counters have no meaning after training, and some versions of PyTorch do not save them
        counters = {
            name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")
        }
        load_tensors(network, counters | read_tensors(path), str(path))
        self.network = network.to(self.device).eval()

    @torch.inference_mode()
    def __call__(
        self, images: list[ImageLike] | str | Path, batch_size: int = 32, disable_tqdm: bool = True
    ) -> torch.Tensor:
        """
        Computes the features of images.

        Args:
            images (`list[PIL.Image.Image | str | Path | dict]` of length `N`, `str` or `Path`):
                The images, their files (read batch by batch), or a folder.
            batch_size (`int`, *optional*, defaults to `32`):
                Number of images per batch.
            disable_tqdm (`bool`, *optional*, defaults to `True`):
                Whether to hide the progress bar.

        Returns:
            `torch.Tensor` of shape `(N, 2048)`, on the CPU.

        Raises:
            `ValueError`: If there are no images, a file is not an image, or features are not finite.
        """
        if isinstance(images, str | Path):
            images = image_files(images)
        if not images:
            raise ValueError("There are no images to compute Inception features of.")
        features = []
        with tqdm(total=len(images), desc="inception", disable=disable_tqdm) as progress:
            for prepared in prepared_batches(images, resize, batch_size):
                features.append(self.network(torch.stack(prepared).to(self.device)).cpu())
                progress.update(len(prepared))
        features = torch.cat(features)
        if not features.isfinite().all():
            raise ValueError(f"The features are not finite: the weights {', '.join(self.weights)} are damaged.")
        return features


class InceptionMetric(evaluate.Metric, ABC):
    """
    A distance between images and reference images as a module of `evaluate`: `metric.compute(images=[...],
    references=[...], batch_size=32)`. Their numbers may differ, and each may be a folder. The network is loaded at the
    first use.

    Args:
        weights_path (`str` or `Path`, *optional*):
            See [`InceptionFeatures`].
        device (`str`, *optional*):
            See [`InceptionFeatures`].
        settings:
            Arguments of [`~evaluate.Metric`].
    """

    citation: str

    def __init__(self, *args, weights_path: str | Path | None = None, device: str | None = None, **settings):
        check_settings(settings, type(self).__name__.lower(), ("weights_path", "device"))
        self.weights_path, self.device = weights_path, device
        super().__init__(*args, **settings)

    @cached_property
    def extractor(self) -> InceptionFeatures:
        return InceptionFeatures(self.weights_path, self.device)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=inspect.cleandoc(type(self).__doc__),
            citation=self.citation,
            inputs_description=inspect.cleandoc(InceptionMetric.__doc__),
            features=Features({"images": Image(decode=False)}),
        )

    def compute(
        self,
        *,
        images: list[ImageLike] | str | Path | None = None,
        references: list[ImageLike] | str | Path | None = None,
        **settings,
    ) -> dict[str, Any]:
        """Computes the distance between images and references."""
        # `evaluate` would treat `references` as a feature, and all features must have the same length
        if references is None:
            raise ValueError(f"{type(self).__name__} needs `references`: images, or a folder of images.")
        if isinstance(images, str | Path):
            images = [str(path) for path in image_files(images)]
        return super().compute(images=images, reference_images=references, **settings)

    @abstractmethod
    def _compute(self, images: list[ImageLike], reference_images: list[ImageLike] | str | Path) -> dict[str, Any]: ...
