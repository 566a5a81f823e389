# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a viewer shows of files of every mode; the right pixels are worked out by hand."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from trl_diffusion.annotation.images import StoredImage
from trl_diffusion.data.images import image_size, open_image
from trl_diffusion.data.pictures import is_transparent, orientation, rgb_image, upright_image
from trl_diffusion.data.transforms import prepare_image
from trl_diffusion.metrics.scorer import open_image as open_to_score


WHITE, RED, GREEN, BLUE = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def two(mode: str, left, right) -> Image.Image:
    """An image of two pixels."""
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), left)
    image.putpixel((1, 0), right)
    return image


def encode(image: Image.Image, format: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def png(bits: int, kind: int, row: bytes, transparency: bytes | None = None) -> bytes:
    """A PNG of two pixels, of bit depths that PIL does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0))
    extra = b"" if transparency is None else chunk(b"tRNS", transparency)
    body = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + chunk(b"IEND", b"")


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    return image


def rgba_palette() -> Image.Image:
    image = palette()
    image.putpalette([*RED, 0, *GREEN, 128], "RGBA")
    return image


def floats(*values: float) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=np.float32))


def words(*values: int, kind: str = "<u2") -> Image.Image:
    return Image.fromarray(np.array([values], dtype=kind))


# 40 of 255 stays 40. Half a colour c on white, opacity 128 of 255: c * 128 / 255 + 255 - 128
HALF_220 = (237,) * 3  # 110.4 + 127
HALF_RED, HALF_GREEN = (255, 127, 127), (127, 255, 127)
SIXTEEN = (117,) * 3  # 30000 / 257
FILES = {
    "1": (encode(two("1", 0, 1)), (0,) * 3, WHITE),
    "1 with tRNS": (encode(two("1", 0, 1), transparency=0), WHITE, WHITE),
    "L": (encode(two("L", 40, 220)), (40,) * 3, (220,) * 3),
    "L with tRNS": (encode(two("L", 40, 220), transparency=40), WHITE, (220,) * 3),
    "LA": (encode(two("LA", (40, 0), (220, 128))), WHITE, HALF_220),
    "La": (two("La", (0, 0), (110, 128)), WHITE, HALF_220),
    "P": (encode(palette()), RED, GREEN),
    "P with tRNS as an index": (encode(palette(), transparency=0), WHITE, GREEN),
    "P with tRNS as bytes": (encode(palette(), transparency=bytes([0, 128])), WHITE, HALF_GREEN),
    "P with an RGBA palette": (rgba_palette(), WHITE, HALF_GREEN),
    "P with an RGBA palette, saved": (encode(rgba_palette()), WHITE, HALF_GREEN),
    "PA": (two("RGBA", (*RED, 0), (*GREEN, 128)).convert("PA"), WHITE, HALF_GREEN),
    "RGB": (encode(two("RGB", RED, GREEN)), RED, GREEN),
    "RGB with tRNS": (encode(two("RGB", RED, GREEN), transparency=RED), WHITE, GREEN),
    "RGBA": (encode(two("RGBA", (*RED, 0), (*RED, 128))), WHITE, HALF_RED),
    "RGBA, opaque": (encode(two("RGBA", (1, 2, 3, 255), (250, 7, 99, 255))), (1, 2, 3), (250, 7, 99)),
    "RGBA as WebP": (encode(two("RGBA", (*RED, 0), (*BLUE, 255)), "WEBP", lossless=True, exact=True), WHITE, BLUE),
    "RGBA as TIFF": (encode(two("RGBA", (*RED, 0), (*BLUE, 255)), "TIFF"), WHITE, BLUE),
    "RGBA as GIF": (encode(two("RGBA", (*RED, 0), (*BLUE, 255)), "GIF"), WHITE, BLUE),
    "RGBa": (two("RGBa", (0, 0, 0, 0), (128, 0, 0, 128)), WHITE, HALF_RED),
    "RGBX": (two("RGBX", (*RED, 0), (*GREEN, 128)), RED, GREEN),
    "CMYK": (encode(two("CMYK", (0, 255, 255, 0), (255, 0, 255, 128)), "TIFF"), RED, (0, 127, 0)),
    "CMYK as JPEG, inverted": (encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100), RED, RED),
    "YCbCr": (two("YCbCr", (76, 85, 255), (150, 44, 21)), (254, 0, 0), (0, 255, 1)),
    "HSV": (two("HSV", (0, 255, 255), (85, 255, 255)), RED, GREEN),
    "LAB": (encode(two("LAB", (255, 128, 128), (138, 209, 198)), "TIFF"), WHITE, RED),  # L 54.3, a 81, b 70
    "I;16": (encode(words(30000, 65535)), SIXTEEN, WHITE),
    "I;16, dark": (encode(words(40, 255)), (0,) * 3, (1,) * 3),
    "I;16 with tRNS": (encode(words(30000, 40000), transparency=30000), WHITE, (156,) * 3),  # 40000 / 257
    "I;16B": (encode(words(30000, 65535, kind=">u2"), "TIFF"), SIXTEEN, WHITE),
    "I of 8 bits": (two("I", 40, 220), (40,) * 3, (220,) * 3),
    "I of 16 bits": (encode(two("I", 30000, 65535), "TIFF"), SIXTEEN, WHITE),
    "I of 32 bits": (two("I", 2**30, 2**31 - 1), (128,) * 3, WHITE),
    "F up to 1": (encode(floats(0.2, 1), "TIFF"), (51,) * 3, WHITE),
    "F up to 1, overshot": (encode(floats(-0.1, 1.06), "TIFF"), (0,) * 3, WHITE),
    "F up to 255": (encode(floats(40, 220), "TIFF"), (40,) * 3, (220,) * 3),
    "F with a hole": (encode(floats(np.nan, 220), "TIFF"), (0,) * 3, (220,) * 3),
    "RGB of 16 bits": (png(16, 2, struct.pack(">6H", 30000, 0, 65535, 0, 30000, 0)), (117, 0, 255), (0, 117, 0)),
    "RGB of 16 bits with tRNS": (
        png(16, 2, struct.pack(">6H", 30000, 0, 65535, 0, 30000, 0), struct.pack(">3H", 30000, 0, 65535)),
        WHITE,
        (0, 117, 0),
    ),
    "RGBA of 16 bits": (png(16, 6, struct.pack(">8H", 65535, 0, 0, 0, 65535, 0, 0, 32896)), WHITE, HALF_RED),
    "grey of 4 bits": (png(4, 0, bytes([0x3F])), (51,) * 3, WHITE),
}


@pytest.mark.parametrize("name", FILES)
def test_every_mode_is_what_a_viewer_shows(name):
    """The two pixels of each mode have the colours that are worked out above; LAB goes through 8 bits, to 6 of 255."""
    value, left, right = FILES[name]
    image = open_image(value)
    shown = upright_image(image)
    assert shown.mode == "RGB" and shown.size == image.size
    tolerance = 6 if name == "LAB" else 1 if name == "CMYK as JPEG, inverted" else 0
    pixels = np.asarray(shown).astype(int)[0]
    assert np.abs(pixels[0] - left).max() <= tolerance and np.abs(pixels[-1] - right).max() <= tolerance, pixels


@pytest.mark.parametrize("name", FILES)
def test_training_annotation_and_evaluation_see_one_picture(name):
    """The training tensor, the picture of the annotation and that of a scorer are the same pixels."""
    value = FILES[name][0]
    shown = np.asarray(upright_image(open_image(value)))
    assert (np.asarray(StoredImage.read(value).upright) == shown).all()
    given = value if isinstance(value, Image.Image) else {"bytes": value, "path": None}
    assert (np.asarray(open_to_score(given)) == shown).all()
    seen = prepare_image(open_image(value), torch.zeros(0, 4), shown.shape[:2], torch.Generator()).pixel_values
    assert np.abs((seen.permute(1, 2, 0).numpy() + 1) * 127.5 - shown).max() < 1e-3


def test_an_rgb_image_is_not_copied():
    """Without transparency, profile and orientation the image is the very same object, so that no pixel can change."""
    image = open_image(encode(two("RGB", RED, GREEN)))
    assert upright_image(image) is image


def test_which_images_are_transparent():
    """An alpha channel that is opaque everywhere is none."""
    assert is_transparent(two("RGBA", (*RED, 255), (*RED, 254)))
    assert is_transparent(open_image(FILES["I;16 with tRNS"][0]))
    assert not is_transparent(two("RGBA", (*RED, 255), (*RED, 255)))
    assert not is_transparent(two("RGB", RED, RED))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    """Of a red and a blue frame the red one is seen."""
    first, second = (Image.new("RGB", (4, 4), color) for color in (RED, BLUE))
    settings = {"lossless": True} if format == "WEBP" else {}
    data = encode(first, format, save_all=True, append_images=[second], **settings)
    assert upright_image(open_image(data)).getpixel((1, 1)) == RED


# ----- colour profiles -----

SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])


def profile(space: bytes, primaries: np.ndarray | None, gamma: float, name: bytes = b"by hand") -> bytes:
    """An ICC profile of version 2: a power law, and primaries `(XYZ, RGB)` at D50."""

    def numbers(values) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(90 - len(name) % 4),
        b"wtpt": numbers((0.9642, 1.0, 0.8249)),
    }
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for letter, values in zip((b"r", b"g", b"b"), primaries.T, strict=True):
            tags |= {letter + b"XYZ": numbers(values), letter + b"TRC": curve}
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", place + len(body), len(data))
        body += data
    white = struct.pack(">iii", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    header = struct.pack(">I", place + len(body)) + bytes(4) + b"\x02\x10\0\0" + b"mntr" + space + b"XYZ " + bytes(12)
    return (header + b"acsp" + bytes(28) + white).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("primaries", [ADOBE, DISPLAY_P3], ids=["Adobe RGB", "Display P3"])
def test_a_colour_profile_is_converted_to_srgb(primaries, format):
    """Colours of wider spaces become those of sRGB: XYZ = P v^2.2 and v' = srgb(S^-1 XYZ), to 2 of 255."""
    color = np.array([100, 160, 60])
    expected = srgb(np.linalg.inv(SRGB) @ primaries @ (color / 255) ** (563 / 256))
    assert np.abs(expected - color).max() > 10
    settings = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = encode(
        Image.new("RGB", (16, 16), tuple(color.tolist())),
        format,
        icc_profile=profile(b"RGB ", primaries, 563 / 256),
        **settings,
    )
    shown = upright_image(open_image(data))
    assert np.abs(shown.getpixel((8, 8)) - expected).max() <= 2
    assert upright_image(shown).getpixel((8, 8)) == shown.getpixel((8, 8)), "and only once"


def test_a_profile_of_grey_and_of_a_transparent_image():
    """Linear 128 is 188 in sRGB; the profile of a transparent image is of its colours, and white is laid below after it."""
    grey = profile(b"GRAY", None, 1.0)
    assert rgb_image(open_image(encode(two("L", 0, 128), icc_profile=grey))).getpixel((1, 0)) == (188,) * 3
    assert rgb_image(open_image(encode(two("LA", (0, 0), (128, 255)), icc_profile=grey))).getpixel((0, 0)) == WHITE
    assert (
        rgb_image(open_image(encode(two("LA", (0, 0), (128, 255)), icc_profile=grey))).getpixel((1, 0)) == (188,) * 3
    )
    linear = profile(b"RGB ", SRGB, 1.0)
    image = open_image(encode(two("RGBA", (*RED, 0), (128, 128, 128, 255)), icc_profile=linear))
    shown = rgb_image(image)
    assert shown.getpixel((0, 0)) == WHITE and np.abs(np.array(shown.getpixel((1, 0))) - 188).max() <= 1


@pytest.mark.parametrize(
    "data",
    [b"", b"broken", profile(b"RGB ", ADOBE, 2.2)[:200], profile(b"GRAY", None, 1.0), profile(b"CMYK", ADOBE, 1.0)],
    ids=["empty", "broken", "cut off", "of grey", "of print"],
)
def test_a_profile_that_cannot_be_used_is_ignored(data):
    """The colours are then taken as sRGB."""
    image = two("RGB", (100, 160, 60), GREEN)
    image.info["icc_profile"] = data
    assert upright_image(image).getpixel((0, 0)) == (100, 160, 60)


def test_srgb_is_left_alone():
    """A profile named sRGB changes no pixel."""
    image = two("RGB", (100, 160, 60), GREEN)
    image.info["icc_profile"] = profile(b"RGB ", SRGB, 2.2, b"sRGB IEC61966-2.1")
    assert upright_image(image) is image


# ----- orientation -----


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
def test_every_format_is_turned(format):
    """16 x 8 stored on its side is 8 wide and 16 high, for the buckets too, in each format that stores an orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (0, 0, 8, 8))  # the left half, which goes to the top
    data = encode(image, format, exif=exif, quality=95)
    shown = upright_image(open_image(data))
    assert shown.size == (8, 16) and image_size(data) == (16, 8)
    top, bottom = shown.getpixel((4, 3)), shown.getpixel((4, 12))
    assert np.abs(np.array(top) - BLUE).max() < 10 and np.abs(np.array(bottom) - RED).max() < 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"", b"Exif\0\0II*\0"])
def test_broken_exif_is_ignored(exif):
    """It raises nothing, in the file and in memory."""
    image = Image.new("RGB", (16, 8), RED)
    assert upright_image(open_image(encode(image, "JPEG", exif=exif))).size == (16, 8)
    image.info["exif"] = exif
    assert upright_image(image).size == (16, 8)
    assert image_size(image) == (8, 16)


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_is_none(value):
    """Numbers other than 1 to 8 are no orientation."""
    image = Image.new("RGB", (16, 8))
    image.getexif()[0x0112] = value
    assert orientation(image) == 1 and upright_image(image).size == (16, 8)


# ----- what cannot be read -----

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty: it has no bytes"),
        (HEIC, "HEIC file, which Pillow does not read: convert it to JPEG or PNG"),
        (b"<!DOCTYPE html>", "it starts with b'<!DOCTYPE html>'"),
        (encode(PHOTO, "JPEG")[:-100], "the image is broken: image file is truncated"),
        (encode(PHOTO)[:90], "the image is broken"),
    ],
    ids=["empty", "HEIC", "page", "JPEG", "PNG"],
)
def test_what_cannot_be_read_says_why(data, reason):
    """The reason is in words, without addresses in memory."""
    with pytest.raises(ValueError, match=reason):
        open_image(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "TGA", "ICO"])
def test_a_broken_file_is_read_or_refused(format):
    """Of 60 damaged files of each format, each is a picture or a ValueError: nothing else comes out of PIL."""
    draw = random.Random(format)
    whole = encode(PHOTO, format)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 4, 16))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            assert upright_image(open_image(bytes(data[: draw.randrange(20, 2 * len(data))]))).mode == "RGB"
        except ValueError:
            refused += 1
    assert refused > 0
