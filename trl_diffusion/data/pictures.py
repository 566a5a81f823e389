# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Images as a viewer shows them: upright, in sRGB, on white."""

import io
from functools import lru_cache

import numpy as np
import PIL.Image
import PIL.ImageCms


TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
BACKGROUND = (255, 255, 255)  # what transparent images are laid on, as browsers do
WHITES = (1, 255, 65535, 2**31 - 1)  # what numbers of unknown range may count up to, or overshoot a little


def orientation(image: PIL.Image.Image) -> int:
    """
    The EXIF orientation of an image.

    Args:
        image (`PIL.Image.Image`):
            The stored image.

    Returns:
        `int`: 1 to 8; 1 is upright. EXIF data that cannot be read count as none.
    """
    if image.format == "TIFF":  # PIL turns these as it loads them
        return 1
    try:
        value = image.getexif().get(PIL.Image.ExifTags.Base.Orientation)
    except Exception:  # PIL raises whatever it runs into in broken EXIF data; a viewer goes on without them
        return 1
    return value if value in TURNS else 1


def is_transparent(image: PIL.Image.Image) -> bool:
    """Whether some pixel of a loaded image is not opaque."""
    alpha = _color_and_alpha(image)[1]
    return alpha is not None and alpha.getextrema()[0] < 255


def upright_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    The picture that a viewer shows: [`data.pictures.rgb_image`] with the EXIF orientation applied. All images that users give
    go through this function, in training, annotation and evaluation.

    Args:
        image (`PIL.Image.Image`):
            The stored image, in any mode. Of an animation it is the frame that is open, by default the first one.

    Returns:
        `PIL.Image.Image`: the RGB image; the very same object if nothing had to be changed.
    """
    turn = orientation(image)
    image = rgb_image(image)
    if turn == 1:
        return image
    image = image.transpose(TURNS[turn])
    image.info = {}  # it would be turned again
    return image


def rgb_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """
    Converts an image to RGB as a viewer does, without turning it. Transparent pixels are laid on white, colour profiles are
    converted to sRGB (a broken one is ignored), and numbers of more than 8 bits are scaled to 8. The range of 32-bit numbers is
    unknown: white is 1 (for floating point numbers), 255, 65535 or 2^31 - 1, the first that is at least half of the largest.

    Args:
        image (`PIL.Image.Image`):
            The image, in any mode.

    Returns:
        `PIL.Image.Image`: the RGB image; the very same object if nothing had to be changed.
    """
    color, alpha = _color_and_alpha(image)
    transform = _to_srgb(image.info.get("icc_profile"), color.mode)
    if transform is not None:
        color = transform.apply(color)
    elif color.mode != "RGB":
        color = color.convert("RGB")
    if alpha is None:
        return color
    picture = PIL.Image.new("RGB", color.size, BACKGROUND)
    picture.paste(color, mask=alpha)
    return picture


def _color_and_alpha(image: PIL.Image.Image) -> tuple[PIL.Image.Image, PIL.Image.Image | None]:
    """The colours in the mode that a profile is for (L, RGB, CMYK or LAB), and how opaque they are (L), if not fully."""
    mode, transparency = image.mode, image.info.get("transparency")
    if mode.startswith("I") or mode == "F":
        alpha = PIL.Image.fromarray(255 * (np.asarray(image) != transparency).astype(np.uint8))
        return _eight_bits(image), None if transparency is None else alpha
    if mode == "1" and transparency is not None:
        image = image.convert("L")
        image.info["transparency"] = 255 * transparency
    elif (
        mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255
    ):  # of 16 bits, unlike the pixels
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    grey = mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = (image.convert("LA") if mode == "La" else image).convert("RGBA")
        return image.convert("L" if grey else "RGB"), image.getchannel("A")
    return (image if mode in ("L", "RGB", "CMYK", "LAB") else image.convert("L" if grey else "RGB")), None


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scales an image of integers or floating point numbers to 8 bits."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    whites = {"I": WHITES[1:], "F": WHITES}.get(image.mode, (65535,))
    white = next((white for white in whites if values.max() <= 2 * white), whites[-1])
    return PIL.Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes | None, mode: str) -> PIL.ImageCms.ImageCmsTransform | None:
    """The transform of a colour profile to sRGB; `None` if there is none, or it is sRGB, broken or of another mode."""
    if not profile:
        return None
    try:
        source = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in PIL.ImageCms.getProfileDescription(source).lower():
            return None
        return PIL.ImageCms.buildTransform(source, PIL.ImageCms.createProfile("sRGB"), mode, "RGB")
    except (PIL.ImageCms.PyCMSError, OSError):
        return None
