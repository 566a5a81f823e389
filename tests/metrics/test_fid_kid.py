# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import hashlib
import math
import sys
import warnings
from pathlib import Path
from urllib.error import URLError

import evaluate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from trl_diffusion.metrics import inception, metric_path
from trl_diffusion.metrics.fid import fid_from_features, fid_result, frechet_inception_distance
from trl_diffusion.metrics.inception import InceptionFeatures, InceptionV3, fetch_inception, image_files, resize
from trl_diffusion.metrics.kid import kernel_inception_distance, kid_from_features, kid_result
from trl_diffusion.revisions import digest_of_file


def random_network(seed: int = 0) -> InceptionV3:
    """Random weights for which activations neither vanish nor explode."""
    torch.manual_seed(seed)
    network = InceptionV3().eval()
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(std=math.sqrt(2 / tensor[0].numel()))
        elif name.endswith(("bn.bias", "running_mean")):
            tensor.normal_(std=0.1)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.8, 1.2)
    return network


@pytest.fixture(scope="module")
def network():
    return random_network()


@pytest.fixture(scope="module")
def weights_path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(dict(network.state_dict()), path)
    return str(path)


@pytest.fixture(scope="module")
def extractor(weights_path):
    return InceptionFeatures(weights_path, device="cpu")


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels)


def gaussian(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * scale + shift)


class Brightness:
    """Three features instead of Inception's, so that complete computations are fast."""

    spec, weights = "brightness", {"none": "0"}

    def __init__(self):
        self.seen = 0

    def __call__(self, images, batch_size=32):
        images = [Image.open(path) for path in image_files(images)] if isinstance(images, str | Path) else images
        self.seen += len(images)
        return torch.stack([resize(image).mean(dim=(1, 2)) / 255 for image in images])


# The network ----------------------------------------------------------------------------------------------------------


def test_blocks_have_the_published_shapes(network):
    """A 299x299 image has the grid sizes of the paper, 149, 147, 147, 73, 71, 35, 17 and 8, and 2048 features."""
    shapes = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
        for name, module in network.named_children()
    ]
    with torch.inference_mode():
        features = network(torch.rand(1, 3, 299, 299) * 255)
    for hook in hooks:
        hook.remove()
    assert shapes == {
        "Conv2d_1a_3x3": (32, 149, 149),
        "Conv2d_2a_3x3": (32, 147, 147),
        "Conv2d_2b_3x3": (64, 147, 147),
        "Conv2d_3b_1x1": (80, 73, 73),
        "Conv2d_4a_3x3": (192, 71, 71),
        "Mixed_5b": (256, 35, 35),
        "Mixed_5c": (288, 35, 35),
        "Mixed_5d": (288, 35, 35),
        "Mixed_6a": (768, 17, 17),
        "Mixed_6b": (768, 17, 17),
        "Mixed_6c": (768, 17, 17),
        "Mixed_6d": (768, 17, 17),
        "Mixed_6e": (768, 17, 17),
        "Mixed_7a": (1280, 8, 8),
        "Mixed_7b": (2048, 8, 8),
        "Mixed_7c": (2048, 8, 8),
    }
    assert features.shape == (1, 2048) and features.std() > 0.01


def test_the_number_of_parameters_is_the_published_one(network):
    """With 1000 classes and the auxiliary head, the count would be torchvision's 27,161,264; it fits the file of
    95,628,359 bytes."""
    tensors = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    number = sum(parameter.numel() for parameter in network.parameters())
    auxiliary = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 768 * 1000 + 1000
    assert number - 8 * (2048 + 1) + auxiliary == 27_161_264
    assert len(tensors) == 94 * 5 + 2
    pickled = 95_628_359 - 4 * sum(tensor.numel() for tensor in tensors.values())
    assert 100 < pickled / len(tensors) < 300  # bytes that name and describe a tensor


# Output and input channels, height and width of the kernels of one block of each kind, in the published file
KERNELS = {
    "Mixed_5b": {
        "branch1x1": (64, 192, 1, 1),
        "branch5x5_1": (48, 192, 1, 1),
        "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, 192, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (32, 192, 1, 1),
    },
    "Mixed_6a": {
        "branch3x3": (384, 288, 3, 3),
        "branch3x3dbl_1": (64, 288, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    },
    "Mixed_6b": {
        "branch1x1": (192, 768, 1, 1),
        "branch7x7_1": (128, 768, 1, 1),
        "branch7x7_2": (128, 128, 1, 7),
        "branch7x7_3": (192, 128, 7, 1),
        "branch7x7dbl_1": (128, 768, 1, 1),
        "branch7x7dbl_2": (128, 128, 7, 1),
        "branch7x7dbl_3": (128, 128, 1, 7),
        "branch7x7dbl_4": (128, 128, 7, 1),
        "branch7x7dbl_5": (192, 128, 1, 7),
        "branch_pool": (192, 768, 1, 1),
    },
    "Mixed_7a": {
        "branch3x3_1": (192, 768, 1, 1),
        "branch3x3_2": (320, 192, 3, 3),
        "branch7x7x3_1": (192, 768, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1),
        "branch7x7x3_4": (192, 192, 3, 3),
    },
    "Mixed_7b": {
        "branch1x1": (320, 1280, 1, 1),
        "branch3x3_1": (384, 1280, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (448, 1280, 1, 1),
        "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, 1280, 1, 1),
    },
}


@pytest.mark.parametrize("block", KERNELS)
def test_kernels_have_the_published_shapes(network, block):
    """Branches have the published widths, and split kernels the published order of rows and columns."""
    tensors = network.get_submodule(block).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("conv.weight")}
    assert shapes == {f"{name}.conv.weight": shape for name, shape in KERNELS[block].items()}


def convolve(tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor, stride: int = 1, pad: bool = True):
    """Convolution, batch normalisation with eps 0.001 and ReLU, written out."""
    kernel = tensors[f"{name}.conv.weight"]
    x = F.conv2d(x, kernel, stride=stride, padding=[size // 2 if pad else 0 for size in kernel.shape[2:]])
    gamma, beta, mean, variance = (
        tensors[f"{name}.bn.{key}"][:, None, None] for key in ("weight", "bias", "running_mean", "running_var")
    )
    return ((x - mean) / (variance + 0.001).sqrt() * gamma + beta).clamp(min=0)


def chain(tensors: dict[str, torch.Tensor], block: str, x: torch.Tensor, *names: str, last_stride: int = 1):
    for name in names:
        strided = name == names[-1] and last_stride == 2
        x = convolve(tensors, f"{block}.{name}", x, stride=2 if strided else 1, pad=not strided)
    return x


def mean_inside(x: torch.Tensor) -> torch.Tensor:
    """3x3 means without padding."""
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
    sums = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).reshape(x.shape)
    return sums / F.conv2d(ones, kernel, padding=1)


def maximum(x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """3x3 maxima, padded with stride 1 and without padding with stride 2."""
    if stride == 1:
        x = F.pad(x, (1, 1, 1, 1), value=-math.inf)
    return x.unfold(2, 3, stride).unfold(3, 3, stride).amax(dim=(4, 5))


def plain_block(tensors: dict[str, torch.Tensor], block: str, x: torch.Tensor) -> torch.Tensor:
    """A block of the paper with FID's changes, with torchvision's names."""
    double = ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]
    sevens = [f"branch7x7dbl_{place}" for place in range(1, 6)]

    def through(*names: str, last_stride: int = 1) -> torch.Tensor:
        return chain(tensors, block, x, *names, last_stride=last_stride)

    def pooled(values: torch.Tensor) -> torch.Tensor:
        return chain(tensors, block, values, "branch_pool")

    if block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        outputs = [through("branch1x1"), through("branch5x5_1", "branch5x5_2"), through(*double)]
        outputs += [pooled(mean_inside(x))]
    elif block == "Mixed_6a":
        outputs = [through("branch3x3", last_stride=2), through(*double, last_stride=2), maximum(x, stride=2)]
    elif block.startswith("Mixed_6"):
        outputs = [through("branch1x1"), through("branch7x7_1", "branch7x7_2", "branch7x7_3"), through(*sevens)]
        outputs += [pooled(mean_inside(x))]
    elif block == "Mixed_7a":
        long = [f"branch7x7x3_{place}" for place in range(1, 5)]
        outputs = [through("branch3x3_1", "branch3x3_2", last_stride=2), through(*long, last_stride=2)]
        outputs += [maximum(x, stride=2)]
    else:
        outputs = [through("branch1x1")]
        outputs += [through("branch3x3_1", f"branch3x3_2{side}") for side in "ab"]
        outputs += [through(*double[:2], f"branch3x3dbl_3{side}") for side in "ab"]
        outputs += [pooled(mean_inside(x) if block == "Mixed_7b" else maximum(x))]
    return torch.cat(outputs, dim=1)


BLOCKS = ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]


def test_the_network_is_the_published_one(network):
    """Features equal a plain float64 computation of the paper with FID's changes, to 1e-4 relatively."""
    tensors = {name: tensor.double() for name, tensor in network.state_dict().items()}
    pixels = torch.rand(2, 3, 139, 123, generator=torch.Generator().manual_seed(0)) * 255
    x = pixels.double() / 128 - 1
    x = convolve(tensors, "Conv2d_1a_3x3", x, stride=2, pad=False)
    x = convolve(tensors, "Conv2d_2a_3x3", x, pad=False)
    x = maximum(convolve(tensors, "Conv2d_2b_3x3", x), stride=2)
    x = convolve(tensors, "Conv2d_3b_1x1", x)
    x = maximum(convolve(tensors, "Conv2d_4a_3x3", x, pad=False), stride=2)
    for block in BLOCKS:
        expected = plain_block(tensors, f"Mixed_{block}", x)
        with torch.inference_mode():
            ours = network.get_submodule(f"Mixed_{block}")(x.float())
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
        x = expected
    with torch.inference_mode():
        features = network(pixels)
    assert (features - x.mean(dim=(2, 3))).abs().max() < 1e-4 * features.abs().max()


@pytest.mark.parametrize("block", ["Mixed_5b", "Mixed_6b", "Mixed_7b"])
def test_average_pools_count_no_padding(network, block):
    """3x3 means of ones are one; with padding they would be 4/9 in the corners and 6/9 at the edges."""
    module = network.get_submodule(block)
    means = []
    hook = module.branch_pool.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0]))
    with torch.inference_mode():
        module(torch.ones(1, module.branch1x1.conv.in_channels, 5, 5))
    hook.remove()
    assert torch.equal(means[0], torch.ones_like(means[0]))


def test_the_last_block_pools_maxima(network):
    """A nine among zeros gives nines around it (max pooling); the block before gives ones (mean pooling)."""
    x = torch.zeros(1, 2048, 5, 5)
    x[:, :, 2, 2] = 9
    square = torch.zeros(5, 5)
    square[1:4, 1:4] = 1
    assert torch.equal(network.Mixed_7c.pool(x)[0, 0], 9 * square)
    torch.testing.assert_close(network.Mixed_7b.pool(x)[0, 0], square)


# The weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("Mixed_6a.branch3x3.bn.bias"), r"lacks Mixed_6a\.branch3x3\.bn\.bias"),
        (
            lambda tensors: tensors.update({"AuxLogits.fc.bias": torch.zeros(1)}),
            r"has the unexpected tensors AuxLogits\.fc\.bias",
        ),
        (lambda tensors: tensors.update({"fc.bias": torch.zeros(1000)}), r"other shapes for fc\.bias"),
    ],
)
def test_every_tensor_is_accounted_for(network, tmp_path, change, message):
    """Errors name a missing tensor, an unexpected one, and torchvision's thousand classes, with the file."""
    tensors = dict(network.state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth .*{message}"):
        InceptionFeatures(str(tmp_path / "other.pth"))


def test_counters_of_batches_may_be_missing(network, tmp_path):
    """A file gives the same network with and without batch normalisation counters."""
    tensors = dict(network.state_dict())
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    assert len(tensors) - len(without) == 94
    for content in (tensors, without):
        torch.save(content, tmp_path / "weights.pth")
        loaded = InceptionFeatures(str(tmp_path / "weights.pth"), device="cpu").network.state_dict()
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_weights_are_fetched_once_and_checked(tmp_path, monkeypatch):
    """Offline, the error names URL and path; a file with another hash is refused; the right one is taken from the
    cache."""

    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    path = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(
        ValueError, match=f"{path}.*downloaded from https://github.com/mseitzer.*no network.*weights_path"
    ):
        fetch_inception()
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the file from https://github.com/mseitzer.*delete it"):
        fetch_inception()
    digest = hashlib.sha256(b"something else").hexdigest()
    monkeypatch.setattr(inception, "SHA256", digest[:8])
    assert fetch_inception() == (path, f"sha256:{digest[:16]}")


# Images ---------------------------------------------------------------------------------------------------------------


def bicubic(length: int, size: int) -> np.ndarray:
    """Matrix of the antialiased bicubic filter with a = -0.5, one row for each output."""
    scale = length / size
    width = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    x = np.abs((np.arange(length) + 0.5)[None] - centers[:, None]) / width
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("size", [(64, 48), (299, 299), (512, 512), (640, 301)])
def test_images_are_resized_without_rounding(mode, size):
    """Any image is resized to 299x299 with a floating-point bicubic filter and clipped to [0, 255]; alpha is
    dropped."""
    image = picture(*size, mode)
    pixels = np.asarray(image, dtype=np.float64)
    pixels = np.repeat(pixels[..., None], 3, axis=2) if mode == "L" else pixels[..., :3]
    rows, columns = bicubic(size[1], 299), bicubic(size[0], 299)
    expected = np.einsum("rh,hwc,kw->crk", rows, pixels, columns, optimize=True).clip(0, 255)
    resized = resize(image)
    assert resized.dtype == torch.float32
    np.testing.assert_allclose(resized.numpy(), expected, atol=2e-3)


def test_features_are_those_of_each_image(extractor, network, tmp_path):
    """Features do not depend on batching beyond rounding, keep their order, are equal for files, folders and
    images, and those of a transparent image are those of the image on white."""
    images = [picture(40, 30, seed=0), picture(299, 299, "RGBA", seed=1), picture(30, 60, "L", seed=2)]
    (tmp_path / "sub").mkdir()
    for name, image in zip(("a.png", "b.PNG", "sub/c.png"), images):
        image.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    with torch.inference_mode():
        white = Image.new("RGBA", (299, 299), "white")
        seen = [images[0], Image.alpha_composite(white, images[1]), images[2]]
        expected = torch.cat([network(resize(image)[None]) for image in seen])
    assert (expected[0] - expected[1]).abs().max() > 0.1 * expected.abs().max()
    for given, batch_size in ((images, 2), (str(tmp_path), 3), ([{"path": str(tmp_path / "a.png")}, *images[1:]], 1)):
        features = extractor(given, batch_size=batch_size)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_image_is_refused(extractor, tmp_path):
    """A missing folder, a folder without images, a broken file and an empty list raise errors."""
    with pytest.raises(ValueError, match="There is no folder .*nowhere"):
        extractor(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=f"folder {tmp_path} has no images"):
        extractor(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="broken.png cannot be read"):
        extractor(tmp_path)
    with pytest.raises(ValueError, match="There are no images"):
        extractor([])


def test_damaged_weights_are_told(extractor, monkeypatch):
    """Features that are not finite raise an error."""
    monkeypatch.setattr(extractor, "network", lambda pixels: torch.full((len(pixels), 2048), math.nan))
    with pytest.raises(ValueError, match="not finite: the weights .*inception.pth are damaged"):
        extractor([picture(8, 8)])


# FID ------------------------------------------------------------------------------------------------------------------


def plain_fid(x: np.ndarray, y: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^(1/2) S2 S1^(1/2))^(1/2)), with symmetric roots, in float64."""

    def root(matrix: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(min=0)) @ vectors.T

    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    cross = np.linalg.eigvalsh(root(first) @ second @ root(first)).clip(min=0)
    difference = x.mean(axis=0) - y.mean(axis=0)
    return difference @ difference + np.trace(first) + np.trace(second) - 2 * np.sqrt(cross).sum()


@pytest.mark.parametrize("n, m", [(500, 300), (40, 60), (10, 400)])
@pytest.mark.filterwarnings("ignore:FID of")
def test_fid_is_the_frechet_distance(n, m):
    """FID equals a float64 computation with symmetric roots to 1e-6 relatively, also for singular covariances."""
    x, y = gaussian(n, 24, seed=0), gaussian(m, 24, seed=1, scale=1.5, shift=0.3)
    expected = plain_fid(x.numpy(), y.numpy())
    assert expected > 10
    assert fid_from_features(x, y) == pytest.approx(expected, rel=1e-6)
    assert fid_from_features(y, x) == pytest.approx(expected, rel=1e-6)
    assert fid_from_features(x.float(), y.float()) == pytest.approx(expected, rel=1e-5)


def test_fid_is_torchmetrics():
    """The same features, passed to torchmetrics in batches through a module, give the same FID."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flatten(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1).double() / 255

    images = torch.randint(0, 256, (60, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    distance = FrechetInceptionDistance(feature=Flatten())
    for batch in images[:32].split(10):
        distance.update(batch, real=True)
    for batch in images[32:].split(7):
        distance.update(batch, real=False)
    features = Flatten()(images)
    assert fid_from_features(features[32:], features[:32]) == pytest.approx(distance.compute().item(), rel=1e-9)


def test_fid_of_equal_covariances_is_that_of_the_means():
    """The FID of shifted features is the squared length of the shift: 16 * 0.5^2 = 4."""
    x = gaussian(200, 16, seed=0)
    assert fid_from_features(x + 0.5, x) == pytest.approx(4.0, abs=1e-6)
    assert fid_from_features(x, x) == pytest.approx(0.0, abs=1e-6)
    # Scaled by 3 about the mean, (3 - 1)^2 tr(S) is left
    centred = x - x.mean(dim=0)
    expected = 4 * np.trace(np.cov(x.numpy(), rowvar=False))
    assert fid_from_features(3 * centred, centred) == pytest.approx(expected, rel=1e-9)


def test_few_images_are_warned_of():
    """FID warns with both numbers unless there are more images than features; one image is too few."""
    with pytest.warns(UserWarning, match="FID of 8 images and 50 references is biased.* at least 9 images"):
        fid_from_features(gaussian(8, 8, seed=0), gaussian(50, 8, seed=1))
    with pytest.warns(UserWarning, match="FID of 50 images and 8 references"):
        fid_from_features(gaussian(50, 8, seed=0), gaussian(8, 8, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fid_from_features(gaussian(9, 8, seed=0), gaussian(50, 8, seed=1))
    for n, m in ((1, 9), (9, 1)):
        with pytest.raises(ValueError, match=f"at least two images and two references, got {n} and {m}"):
            fid_from_features(torch.randn(n, 8), torch.randn(m, 8))


# KID ------------------------------------------------------------------------------------------------------------------


def plain_kid(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy, term by term."""
    n = len(x)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def test_kid_is_the_unbiased_discrepancy():
    """If the subset is the whole set, KID equals the double sums over all pairs to 1e-9, with no deviation."""
    x, y = gaussian(15, 6, seed=0), gaussian(15, 6, seed=1, shift=0.5)
    mean, deviation = kid_from_features(x, y, subsets=3, subset_size=15)
    assert mean == pytest.approx(plain_kid(x.numpy(), y.numpy()), rel=1e-9)
    assert deviation == pytest.approx(0.0, abs=1e-9 * abs(mean))
    assert kid_from_features(y, x, subsets=3, subset_size=15)[0] == pytest.approx(mean, rel=1e-9)


def test_kid_has_no_bias():
    """For two samples of one distribution, KID is 0 on average for any subset size, within four standard errors."""
    rng = np.random.default_rng(0)
    for size in (2, 10, 40):
        values = []
        for _ in range(150):
            x, y = torch.from_numpy(rng.normal(size=(2, 40, 5)))
            values.append(kid_from_features(x, y, subsets=4, subset_size=size)[0])
        assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(150)


def test_subsets_depend_on_the_seed_alone():
    """KID depends on its seed only, and does not change the global random generator."""
    x, y = gaussian(40, 6, seed=0), gaussian(50, 6, seed=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = kid_from_features(x, y, subsets=5, subset_size=10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert kid_from_features(x, y, subsets=5, subset_size=10, seed=3) == first
    assert kid_from_features(x, y, subsets=5, subset_size=10, seed=4) != first


def test_subsets_fit_the_images():
    """A subset larger than a set or smaller than two, and zero subsets, are refused with the numbers."""
    x, y = torch.randn(20, 4), torch.randn(30, 4)
    for size in (21, 1):
        with pytest.raises(ValueError, match=f"20 images and 30 references, and `subset_size` is {size}"):
            kid_from_features(x, y, subset_size=size)
    with pytest.raises(ValueError, match="`subsets` must be at least 1, got 0"):
        kid_from_features(x, y, subsets=0, subset_size=5)


# Results --------------------------------------------------------------------------------------------------------------


def test_results_say_what_they_depend_on():
    """Names contain extractor, subsets and number of images; shared features give the same distances."""
    images, references = [[picture(9, 9, seed=s) for s in range(*seeds)] for seeds in ((0, 12), (12, 42))]
    extractor = Brightness()
    fid = frechet_inception_distance(images, references, extractor)
    kid = kernel_inception_distance(images, references, extractor, subsets=7, subset_size=5, seed=2)
    assert list(fid)[0] == "fid_brightness_n12" and list(kid)[0] == "kid_brightness_7x5_n12"
    for result in (fid, kid):
        assert (result["num_images"], result["num_references"], result["higher_is_better"]) == (12, 30, False)
        assert result["weights"] == extractor.weights
    assert kid["seed"] == 2 and kid["standard_deviation"] > 0

    extractor.seen = 0
    features, reference_features = extractor(images), extractor(references)
    assert fid_result(features, reference_features, extractor) == fid
    assert kid_result(features, reference_features, extractor, subsets=7, subset_size=5, seed=2) == kid
    assert extractor.seen == 42
    assert list(kid_result(features, reference_features, extractor))[0] == "kid_brightness_100x12_n12"


def test_torchmetrics_is_named_where_it_is_missing(monkeypatch):
    """Without torchmetrics, both errors name what to install."""
    x = torch.randn(5, 2)
    for name, compute in (("fid", fid_from_features), ("kid", kid_from_features)):
        monkeypatch.setitem(sys.modules, f"torchmetrics.image.{name}", None)
        with pytest.raises(ImportError, match=rf"{name.upper()} needs torchmetrics: .*trl-diffusion\[evaluation\]"):
            compute(x, x)


@pytest.mark.parametrize("name", ["fid", "kid"])
def test_unknown_settings(name):
    """A misspelt setting is refused, instead of being ignored by `evaluate`."""
    with pytest.raises(
        ValueError, match=f"`{name}` has no setting weights_pth; its settings are weights_path, device"
    ):
        evaluate.load(metric_path(name), weights_pth="weights.pth")


def test_kid_is_a_module_of_evaluate(weights_path, extractor, tmp_path):
    """`evaluate` returns the function's result for files, folders and added batches, and requires references."""
    for place, sizes in (("images", (20, 30, 40)), ("references", (50, 60)), ("empty", ())):
        (tmp_path / place).mkdir()
        for size in sizes:
            picture(size, size, seed=size).save(tmp_path / place / f"{size}.png")
    images, references = tmp_path / "images", tmp_path / "references"
    files = [str(path) for path in image_files(images)]
    expected = kernel_inception_distance(images, references, extractor, subsets=10)
    assert list(expected)[0] == "kid_inception2015_2048_clean_10x2_n3"
    assert expected.pop("weights") == {weights_path: digest_of_file(Path(weights_path))}

    metric = evaluate.load(metric_path("kid"), weights_path=weights_path, device="cpu")
    metric.add_batch(images=files[:2])
    metric.add_batch(images=files[2:])
    for result in (
        metric.compute(references=references, subsets=10),
        metric.compute(images=files, references=image_files(references), subsets=10),
        metric.compute(images=images, references=references, subsets=10, batch_size=2),
    ):
        assert result.pop("weights") == extractor.weights
        assert result == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="KID needs `references`"):
        metric.compute(images=files)
    with pytest.raises(ValueError, match="empty has no images"):
        metric.compute(images=files, references=tmp_path / "empty")


@pytest.mark.slow
def test_fid_is_a_module_of_evaluate(weights_path, extractor):
    """`evaluate` returns the function's result, with a warning, and 0 for identical sets."""
    images = [picture(20, 20, seed=seed) for seed in range(4)]
    metric = evaluate.load(metric_path("fid"), weights_path=weights_path, device="cpu")
    with pytest.warns(UserWarning, match="FID of 3 images and 4 references"):
        result = metric.compute(images=images[:3], references=images)
    with pytest.warns(UserWarning):
        expected = frechet_inception_distance(images[:3], images, extractor)
    name = "fid_inception2015_2048_clean_n3"
    assert list(result) == list(expected) and list(result)[0] == name
    assert result[name] == pytest.approx(expected[name], rel=1e-4) and result[name] > 0
    features = extractor(images)
    with pytest.warns(UserWarning):
        assert fid_from_features(features, features) == pytest.approx(0.0, abs=1e-4 * features.var(dim=0).sum().item())
