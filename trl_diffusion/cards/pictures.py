# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The pictures of a card: samples as files of the Web, base and policy side by side, what was logged over the steps."""

import io
import logging
import math
import textwrap
from typing import TYPE_CHECKING, Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


logger = logging.getLogger(__name__)

WIDTH = 900  # pixels of a card's column
TINY = 256  # pixels below which an image is enlarged, and stored without loss
INK, FAINT = "#1c1e21", "#c9cbce"
# Distinguishable for the colour-blind (Okabe and Ito, 2008), as in evaluation/plots.py
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#767676"
LN_2 = math.log(2)  # the loss of a preference that is not yet learned
# The panels: title, and the metrics in it with their names there
PANELS = (
    ("loss", {"loss": "training"}),
    ("rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    ("margin of the rewards", {"rewards/margins": "training"}),
    ("accuracy of the rewards", {"rewards/accuracies": "training"}),
    ("norm of the gradient", {"grad_norm": "training"}),
)


# ----- samples -----


def encoded(image: PIL.Image.Image, max_bytes: int) -> tuple[bytes, str]:
    """
    An image as a file for a page.

    Args:
        image (`PIL.Image.Image`):
            The image.
        max_bytes (`int`):
            How large the file may be. A larger one is made of the image at three quarters of its size, and so on.

    Returns:
        `tuple[bytes, str]`: the file and its suffix: WebP, or PNG of an image that was tiny.
    """
    image = image.convert("RGB")
    if max(image.size) < TINY:
        buffer = io.BytesIO()
        enlarged(image, TINY).save(buffer, "PNG", optimize=True)
        return buffer.getvalue(), ".png"
    while True:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=90, method=4)
        if len(buffer.getvalue()) <= max_bytes or max(image.size) <= TINY:
            return buffer.getvalue(), ".webp"
        image = image.resize([max(1, side * 3 // 4) for side in image.size], PIL.Image.Resampling.LANCZOS)


def enlarged(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """A tiny image with each pixel as a square of several, at least `size` pixels along its longer side."""
    scale = math.ceil(size / max(image.size))
    return image.resize([side * scale for side in image.size], PIL.Image.Resampling.NEAREST)


def draw_teaser(
    base_images: list[PIL.Image.Image],
    images: list[PIL.Image.Image],
    prompts: list[str],
    labels: tuple[str, str],
    width: int = WIDTH,
) -> PIL.Image.Image:
    """
    Draws images of the base and of the policy from the same noise: one prompt as two images side by side, more as columns of two.

    Args:
        base_images (`list[PIL.Image.Image]` of length `n`), images (`list[PIL.Image.Image]` of length `n`):
            Images of the base and of the policy.
        prompts (`list[str]` of length `n`):
            The prompts.
        labels (`tuple[str, str]`):
            What the two are called.
        width (`int`, *optional*, defaults to `900`):
            Width of the picture in pixels.

    Returns:
        `PIL.Image.Image`: at most `width` pixels wide.
    """
    font, bold = PIL.ImageFont.load_default(17), PIL.ImageFont.load_default(19)
    gap, line, label_height = 10, 22, 30
    across = max(2, len(images))
    size = min((width - gap * (across + 1)) // across, 512)
    heights = [round(size * image.height / max(image.size)) for image in images]
    height = max(heights)
    columns = size if len(images) > 1 else 2 * size + gap
    texts = [wrapped(prompt, font, columns, 3) for prompt in prompts]
    text_height = line * max(len(text) for text in texts) + gap
    rows = 1 if len(images) == 1 else 2
    total = (gap + across * (size + gap), rows * (label_height + height + gap) + text_height)
    picture = PIL.Image.new("RGB", total, "white")
    draw = PIL.ImageDraw.Draw(picture)
    for row, (label, of_row) in enumerate(zip(labels, (base_images, images), strict=True)):
        for column, image in enumerate(of_row):
            place = (0, row) if rows == 1 else (row, column)
            left, top = gap + place[1] * (size + gap), place[0] * (label_height + height + gap)
            if column == 0:
                draw.text((left, top + 7), wrapped(label, bold, size, 1)[0], INK, bold)
            fitted = fit(image, size)
            offset = (size - fitted.width) // 2, (height - fitted.height) // 2
            picture.paste(fitted, (left + offset[0], top + label_height + offset[1]))
    top = total[1] - text_height + 2
    for column, text in enumerate(texts):
        for number, part in enumerate(text):
            draw.text((gap + column * (size + gap), top + number * line), part, INK, font)
    return picture


def fit(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """An image whose longer side is `size` pixels. A small one keeps its pixels visible."""
    scale = size / max(image.size)
    filter = PIL.Image.Resampling.NEAREST if scale > 1 else PIL.Image.Resampling.LANCZOS
    return image.convert("RGB").resize([max(1, round(side * scale)) for side in image.size], filter)


def wrapped(text: str, font: PIL.ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """A text as lines that are at most `width` pixels wide; what does not fit is cut off."""
    lines, line = [], ""
    for word in " ".join(text.split()).split(" "):
        while font.getlength(word) > width:  # no space in it
            cut = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width))
            lines, line, word = [*lines, *([line] if line else []), word[:cut]], "", word[cut:]
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
        else:
            lines, line = [*lines, line], word
    lines.append(line)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last + "..."]


# ----- curves -----


def draw_curves(log_history: list[dict[str, Any]]) -> bytes | None:
    """
    Draws what was logged over the optimizer steps: the loss, and of a preference the rewards, their margin and accuracy; the norm
    of the gradient; what was evaluated beside what was trained.

    Args:
        log_history (`list[dict]`):
            The history of a [`~transformers.TrainerState`].

    Returns:
        `bytes` or `None`: a PNG file, `None` where nothing was logged or matplotlib is missing, of which a warning tells.
    """
    panels = [(title, curves) for title, metrics in PANELS if (curves := curves_of(log_history, metrics))]
    if not panels:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(
            'The model card has no curves, because matplotlib is missing: run `pip install "trl-diffusion[evaluation]"`.'
        )
        return None

    across = min(len(panels), 3 if len(panels) != 4 else 2)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(WIDTH / 100, 2.5 * down + 0.1), layout="constrained", dpi=200)
    grid = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for empty in grid[len(panels) :]:
        empty.set_axis_off()
    for number, ((title, curves), axes) in enumerate(zip(panels, grid)):
        draw_panel(axes, title, curves)
        if number + across >= len(panels):
            axes.set_xlabel("optimizer steps", color=INK, fontsize=9)
    return png(figure)


def curves_of(log_history: list[dict[str, Any]], metrics: dict[str, str]) -> dict[str, dict[int, float]]:
    """
    The curves of a panel.

    Args:
        log_history (`list[dict]`):
            The history.
        metrics (`dict[str, str]`):
            Names of the metrics, and what they are called.

    Returns:
        `dict[str, dict[int, float]]`: by what it is called, the finite values by step; a step that was logged twice has its last
        value. An evaluation's curve is called after its dataset, where there are several.
    """
    curves: dict[str, dict[int, float]] = {}
    evaluated: dict[str, dict[int, float]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                continue
            for metric, name in metrics.items():
                if key == metric:
                    curves.setdefault(name, {})[entry["step"]] = value
                elif key.startswith("eval_") and key.endswith(f"_{metric}"):
                    dataset = key.removeprefix("eval").removesuffix(f"_{metric}").strip("_")
                    what = "" if name == "training" else f", {name}"
                    evaluated.setdefault(f"evaluation{f' on {dataset}' if dataset else ''}{what}", {})[
                        entry["step"]
                    ] = value
    return {name: dict(sorted(curve.items())) for name, curve in (curves | evaluated).items()}


def draw_panel(axes: "Axes", title: str, curves: dict[str, dict[int, float]]) -> None:
    """One panel of `draw_curves`. An evaluation is dashed."""
    for place, (name, curve) in enumerate(curves.items()):
        style = {"linestyle": "--", "marker": "o"} if name.startswith("evaluation") else {}
        if len(curve) == 1:  # a line of one point cannot be seen
            style["marker"] = "o"
        color = COLORS[place % len(COLORS)]
        axes.plot(list(curve), list(curve.values()), color=color, linewidth=1.4, markersize=3.5, label=name, **style)
    first = next(iter(curves.get("training", {}).values()), None)
    if title == "loss" and first is not None and abs(first - LN_2) < 0.02:
        axes.axhline(LN_2, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
        axes.annotate("ln 2", (1, LN_2), xycoords=("axes fraction", "data"), xytext=(-2, 2), **NOTE)
    if title == "accuracy of the rewards":
        axes.axhline(0.5, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
    axes.set_title(textwrap.shorten(title, 40), color=INK, fontsize=11, loc="left")
    if len(curves) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    axes.locator_params(nbins=5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


NOTE = {"textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": 8, "color": GREY}


def png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
