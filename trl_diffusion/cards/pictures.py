# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The pictures of a card: samples as files of the Web, base and policy side by side, what was logged over the steps."""

import io
import logging
import math
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
    ("loss", {"loss": "loss"}),
    ("rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"}),
    ("accuracy of the rewards", {"rewards/accuracies": "accuracy"}),
    ("norm of the gradient", {"grad_norm": "norm"}),
)
TRAINING = "training"
MARKERS = ("o", "s", "^", "D", "v")  # of evaluations on several datasets

Curves = dict[tuple[str, str], dict[int, float]]  # by metric and by what it was measured on


# ----- samples -----


def encoded(image: PIL.Image.Image, max_bytes: int) -> tuple[bytes, str]:
    """
    An image as a file for a page.

    Args:
        image (`PIL.Image.Image`):
            The image.
        max_bytes (`int`):
            How large the file may be. Else the image is made smaller, down to 256 pixels.

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
        image.save(buffer, "WEBP", quality=90, method=2)
        share = max_bytes / len(buffer.getvalue())
        if share >= 1 or max(image.size) <= TINY:
            return buffer.getvalue(), ".webp"
        scale = max(0.9 * math.sqrt(share), TINY / max(image.size))
        image = image.resize([max(1, round(side * scale)) for side in image.size], PIL.Image.Resampling.LANCZOS)


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
                draw.text((left, top + 3), wrapped(label, bold, size, 1)[0], INK, bold)
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

    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(WIDTH / 100, 2.6 * down + 0.2), layout="constrained", dpi=160)
    grid = figure.subplots(down, across, squeeze=False).flatten().tolist()
    for empty in grid[len(panels) :]:
        empty.set_axis_off()
    for number, ((title, curves), axes) in enumerate(zip(panels, grid)):
        draw_panel(axes, title, curves)
        if number + across >= len(panels):
            axes.set_xlabel("optimizer steps", color=INK, fontsize=9)
    return png(figure)


def curves_of(log_history: list[dict[str, Any]], metrics: dict[str, str]) -> Curves:
    """
    The curves of a panel.

    Args:
        log_history (`list[dict]`):
            The history.
        metrics (`dict[str, str]`):
            Names of the metrics, and what they are called.

    Returns:
        `dict[tuple[str, str], dict[int, float]]`: the finite values by step, by what the metric is called and by `"training"` or
        `"evaluation"`, with the name of the dataset where there are several. A step that was logged twice has its last value.
    """
    curves: Curves = {}
    for entry in log_history:
        for metric, name in metrics.items():
            for key, value in entry.items():
                on = measured_on(key, metric)
                if on is not None and isinstance(value, int | float) and math.isfinite(value):
                    curves.setdefault((name, on), {})[entry["step"]] = value
    order = sorted(curves, key=lambda key: (key[1] != TRAINING, key[1], list(metrics.values()).index(key[0])))
    return {key: dict(sorted(curves[key].items())) for key in order}


def measured_on(key: str, metric: str) -> str | None:
    """What a key of the history says that a metric was measured on; `None` if it is of something else."""
    if key == metric:
        return TRAINING
    if not (key.startswith("eval_") and key.endswith(f"_{metric}")):
        return None
    dataset = key.removeprefix("eval_").removesuffix(metric).rstrip("_")
    dataset = dataset.replace("$", r"\$")  # which would start a formula in matplotlib
    return f"evaluation on {dataset}" if dataset else "evaluation"


def draw_panel(axes: "Axes", title: str, curves: Curves) -> None:
    """One panel of `draw_curves`: a colour for each metric, or else for what it was measured on; an evaluation is dashed."""
    names, sources = list(dict.fromkeys(name for name, _ in curves)), list(dict.fromkeys(on for _, on in curves))
    marks = dict(zip([on for on in sources if on != TRAINING], MARKERS * len(sources)))
    for (name, on), curve in curves.items():
        place = names.index(name) if len(names) > 1 else sources.index(on)
        style = {"linestyle": "--", "marker": marks[on]} if on in marks else {}
        if len(curve) == 1:  # a line of one point cannot be seen
            style.setdefault("marker", "o")
        axes.plot(list(curve), list(curve.values()), color=COLORS[place % len(COLORS)], **LINE, **style)
    first = next(iter(curves.get(("loss", TRAINING), {}).values()), None)
    if first is not None and abs(first - LN_2) < 0.02:
        axes.axhline(LN_2, **REFERENCE)
        axes.annotate("ln 2", (1, LN_2), xycoords=("axes fraction", "data"), **NOTE)
    if title == "accuracy of the rewards":
        axes.axhline(0.5, **REFERENCE)
    axes.set_title(title, color=INK, fontsize=11, loc="left")
    draw_legend(axes, names, sources, marks)
    axes.tick_params(labelsize=8.5, colors=INK, length=0)
    axes.ticklabel_format(useOffset=False)
    axes.locator_params(nbins=5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    steps = {step for curve in curves.values() for step in curve}
    if len(steps) == 1:
        axes.set_xlim(min(steps) - 1, min(steps) + 1)
    axes.grid(color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def draw_legend(axes: "Axes", names: list[str], sources: list[str], marks: dict[str, str]) -> None:
    """What the colours and the dashes of a panel are, where there is more than one curve."""
    if len(names) == len(sources) == 1:
        return
    if len(names) > 1:
        for place, name in enumerate(names):
            axes.plot([], [], color=COLORS[place], label=name, **LINE)
    for place, on in enumerate(sources):
        style = {"linestyle": "--", "marker": marks[on]} if on in marks else {}
        if len(names) == 1:
            axes.plot([], [], color=COLORS[place % len(COLORS)], label=on, **LINE, **style)
        elif on in marks:
            axes.plot([], [], color=GREY, label=on, **LINE, **style)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)


LINE = {"linewidth": 1.4, "markersize": 3.5}
REFERENCE = {"color": GREY, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 0.5}
NOTE = {"xytext": (3, 0), "textcoords": "offset points", "ha": "left", "va": "center", "fontsize": 8, "color": GREY}


def png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
