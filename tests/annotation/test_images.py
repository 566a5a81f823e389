# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from trl_diffusion.annotation.images import MOST_PIXELS, PADDING, StoredImage, crop_around, limit_pixels
from trl_diffusion.annotation.records import PairRecord, open_images
from trl_diffusion.boxes import normalize_boxes, orient_boxes
from trl_diffusion.data.transforms import prepare_image


RED, GROUND = (220, 20, 20), (240, 240, 240)


def encode(image: Image.Image, format: str = "PNG", orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation:
        exif[Image.ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, format=format, **({"exif": exif} if orientation else {}))
    return buffer.getvalue()


def scene(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A red rectangle; its box covers exactly its pixels."""
    image = Image.new("RGB", (width, height), GROUND)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=RED)
    return image


def red_box(image: Image.Image) -> list[float]:
    """The unit box of the red pixels of an upright image: a perfect detector."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    ys, xs = np.where(pixels[..., 0] - pixels[..., 1] > 100)
    return [
        xs.min() / image.width,
        ys.min() / image.height,
        (xs.max() + 1) / image.width,
        (ys.max() + 1) / image.height,
    ]


SHAPES = {"landscape": (90, 60), "portrait": (60, 90), "square": (64, 64), "strip": (400, 3)}


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_come_back_in_pixels_of_the_stored_image(shape, orientation):
    """Boxes in the upright image are converted to the stored file, for every EXIF orientation."""
    width, height = SHAPES[shape]
    box = (width // 3, height // 3, width // 3 + width // 4, height // 3 + max(height // 4, 1))
    image = StoredImage(encode(scene(width, height, box), orientation=orientation))
    turned = orientation in (5, 6, 7, 8)
    assert image.upright.size == ((height, width) if turned else (width, height))
    assert image.stored_box(red_box(image.upright)) == pytest.approx(box, abs=1e-3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_that_is_found_is_the_box_that_is_trained_on(orientation):
    """From the detector to the stored file to the training tensor, a box stays on its object."""
    box = (10, 20, 34, 50)
    stored = scene(96, 64, box)
    image = StoredImage(encode(stored, orientation=orientation))
    found = torch.tensor([image.stored_box(red_box(image.upright))])
    opened = Image.open(io.BytesIO(image.data))
    seen = prepare_image(opened, found, (64, 64), torch.Generator())
    pixels = Image.fromarray(((seen.pixel_values.permute(1, 2, 0) / 2 + 0.5) * 255).round().byte().numpy())
    if seen.boxes[0, 2] > seen.boxes[0, 0]:  # otherwise the box is outside the crop
        assert seen.boxes[0].tolist() == pytest.approx(red_box(pixels), abs=1.5 / 64)


def test_orienting_twice_is_the_identity():
    """The inverse orientation of the annotation undoes the orientation of the training."""
    boxes = normalize_boxes(torch.tensor([[3.0, 5.0, 20.0, 30.0]]), 40, 60)
    inverse = {6: 8, 8: 6}
    for orientation in range(1, 9):
        back = orient_boxes(orient_boxes(boxes, orientation), inverse.get(orientation, orientation))
        assert torch.allclose(back, boxes, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "P", "L", "LA", "1", "I;16", "F", "JPEG", "WEBP", "GIF"])
def test_every_mode_is_seen_as_people_see_it(mode):
    """For every mode of the file, the upright image is RGB with the same light and dark regions."""
    array = np.full((24, 36), 40, dtype=np.uint8)
    array[6:18, 9:27] = 220
    image, format = Image.fromarray(array), "PNG"
    if mode in ("JPEG", "WEBP", "GIF"):
        image, format = image.convert("RGB"), mode
    elif mode == "I;16":
        image = Image.fromarray(array.astype(np.uint16) * 257)
    elif mode == "F":
        image, format = Image.fromarray(array.astype(np.float32)), "TIFF"
    elif mode == "CMYK":
        image, format = image.convert("RGB").convert("CMYK"), "TIFF"
    elif mode == "1":
        image = image.point(lambda value: 255 * (value > 128)).convert("1")
    else:
        image = image.convert("RGB").convert(mode) if mode != "P" else image.convert("RGB").quantize(8)
    upright = StoredImage(encode(image, format)).upright
    assert upright.mode == "RGB" and upright.size == (36, 24)
    pixels = np.asarray(upright).astype(int)
    dark, light = (0, 255) if mode == "1" else (40, 220)
    assert np.abs(pixels[12, 18] - light).max() <= 12 and np.abs(pixels[2, 2] - dark).max() <= 12


def test_16_bits_are_scaled_in_training_as_in_annotation():
    """A 16-bit grey ramp is a ramp in the training tensor: PIL alone would make it white."""
    ramp = np.tile(np.linspace(0, 65535, 64, dtype=np.uint16), (64, 1))
    image = Image.open(io.BytesIO(encode(Image.fromarray(ramp))))
    seen = prepare_image(image, torch.zeros(0, 4), (64, 64), torch.Generator()).pixel_values
    assert seen[0, 0].tolist() == pytest.approx(np.linspace(-1, 1, 64).tolist(), abs=0.01)


def test_one_pixel():
    """An image of one pixel has a box and a crop."""
    image = StoredImage(encode(Image.new("RGB", (1, 1), RED)))
    assert image.stored_box([0, 0, 1, 1]) == [0, 0, 1, 1]
    crop = crop_around(image.upright, [0, 0, 1, 1], 16, 2.0)
    assert crop.getpixel((8, 8)) == RED and crop.getpixel((0, 0)) == PADDING


def test_a_huge_image_is_made_smaller_and_its_boxes_are_not():
    """A panorama is downscaled to at most MOST_PIXELS, and its boxes are in its original pixels."""
    box = (6000, 100, 8000, 700)
    image = StoredImage(encode(scene(12000, 800, box)))
    assert image.upright.width * image.upright.height <= MOST_PIXELS
    assert image.upright.width / image.upright.height == pytest.approx(15, rel=0.01)
    assert image.stored_box(red_box(image.upright)) == pytest.approx(box, abs=4)


@pytest.mark.parametrize(
    "format, orientation, most, is_file",
    [("JPEG", None, 10000, True), ("JPEG", 1, 10000, True), ("JPEG", 6, 10000, False), ("JPEG", None, 900, False)]
    + [("PNG", None, 10000, False)],
)
def test_a_file_is_shown_only_where_it_shows_just_the_image(format, orientation, most, is_file):
    """A JPEG file is sent unchanged unless it is rotated or too large; other formats are encoded."""
    image = StoredImage(encode(scene(60, 40, (5, 5, 30, 30)), format, orientation))
    shown, file = image.shown(most)
    assert (file == image.data) if is_file else (file is None)
    assert shown.width * shown.height <= most
    grey = StoredImage(encode(Image.new("L", (8, 8)), "JPEG"))
    assert grey.shown(most)[1] is None


def test_boxes_are_clipped_to_the_image():
    """A box that extends beyond the image is clipped to it."""
    image = StoredImage(encode(Image.new("RGB", (50, 20))))
    assert image.stored_box([-0.1, 0.5, 1.2, 1.01]) == pytest.approx([0, 10, 50, 20])


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims this width and height."""
    data = bytearray(encode(Image.new("RGB", (1, 1))))
    data[16:24] = side.to_bytes(4, "big") * 2

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


POISON = {
    "empty": (b"", "no bytes"),
    "html": (
        b"<!DOCTYPE html><html>not found</html>",
        "not an image that can be read; it starts with b'<!DOCTYPE html>",
    ),
    "truncated jpeg": (encode(scene(64, 64, (5, 5, 30, 30)), "JPEG")[:500], "broken"),
    "truncated png": (encode(scene(64, 64, (5, 5, 30, 30)))[:90], "broken"),
    "bomb": (bomb(20000), "claims too many pixels"),
    "smaller bomb": (bomb(10000), "claims 100,000,000 pixels"),
    "thread": (encode(Image.new("RGB", (2000, 1))), "2000 x 1 pixels"),
    "noise": (bytes(range(256)), "not an image that can be read"),
}


@pytest.mark.parametrize("name", POISON)
def test_poison_is_an_error_with_a_reason(name):
    """An image that cannot be read makes its row an error with the name of the image and the reason."""
    data, reason = POISON[name]
    good = StoredImage(encode(Image.new("RGB", (8, 8))))
    record = PairRecord("x", "a cat", chosen=good, rejected=StoredImage(data))
    open_images(record)
    assert record.status == "error" and record.reason.startswith("rejected: ") and reason in record.reason
    assert record.to_row()["instances"] == []


def test_reading_values(tmp_path):
    """Bytes, paths, undecoded columns and images in memory are read; the bytes of files are unchanged."""
    data = encode(scene(20, 10, (2, 2, 8, 8)), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    path = str(tmp_path / "a.jpg")
    for value in (data, path, {"bytes": data, "path": None}, {"bytes": None, "path": path}):
        assert StoredImage.read(value).data == data
    turned = Image.open(io.BytesIO(encode(scene(20, 10, (2, 2, 8, 8)), "PNG", orientation=6)))
    assert StoredImage.read(turned).upright.size == (10, 20)
    assert StoredImage(data).uid == StoredImage.read(path).uid != StoredImage(data + b"x").uid
    with pytest.raises(ValueError, match="expected an image"):
        StoredImage.read(None)
    with pytest.raises(OSError):
        StoredImage.read(str(tmp_path / "missing.jpg"))


@pytest.mark.parametrize("place", [(10, 10), (60, 30), (88, 45)])
def test_crops_are_centred_and_of_one_scale(place):
    """An instance fills the same central share of its crop at any position, also at the edge of the image."""
    left, top = place
    image = scene(100, 60, (left, top, left + 12, top + 12))
    box = [left / 100, top / 60, (left + 12) / 100, (top + 12) / 60]
    crop = crop_around(image, box, 120, 1.25)
    assert crop.size == (120, 120)
    margin = (1 - 1 / 1.25) / 2
    assert red_box(crop) == pytest.approx([margin, margin, 1 - margin, 1 - margin], abs=1.5 / 120)


def test_two_sizes_of_one_thing_give_one_crop():
    """An object and its enlarged copy give the same crop."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    small = image.resize((64, 64), Image.Resampling.BICUBIC)
    large = image.resize((256, 256), Image.Resampling.BICUBIC)
    box = [0.25, 0.25, 0.75, 0.75]
    crops = [np.asarray(crop_around(view, box, 64, 1.25)).astype(int) for view in (small, large)]
    assert np.abs(crops[0] - crops[1]).mean() < 6


def test_limiting_pixels_keeps_the_shape():
    """An image within the limit is unchanged; a larger one is downscaled with the same aspect ratio."""
    image = Image.new("RGB", (300, 100))
    assert limit_pixels(image, 30000) is image
    small = limit_pixels(image, 3000)
    assert small.width * small.height <= 3000 and small.width / small.height == pytest.approx(3, rel=0.05)
