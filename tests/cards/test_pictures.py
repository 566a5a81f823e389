# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The pictures of a card, from images and logs alone."""

import builtins
import io
import logging
import math

import numpy as np
import PIL.ImageFont
import pytest
from matplotlib.figure import Figure
from PIL import Image

from trl_diffusion.cards.pictures import curves_of, draw_curves, draw_panel, draw_teaser, encoded, wrapped


LOSS, REWARDS = {"loss": "loss"}, {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """What compresses worst."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def size_of(picture: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture)).size


# ----- images -----


def test_tiny_images_keep_their_pixels():
    """Each pixel becomes a square of several, without loss."""
    image = noise((32, 16))
    content, suffix = encoded(image, 10)
    decoded = np.asarray(Image.open(io.BytesIO(content)))
    assert suffix == ".png" and decoded.shape == (128, 256, 3)
    assert np.array_equal(decoded, np.asarray(image).repeat(8, axis=0).repeat(8, axis=1))


@pytest.mark.parametrize("max_bytes", [400_000, 60_000])
def test_files_are_as_small_as_they_must_be(max_bytes):
    """Even noise fits, with its shape; what fits at once keeps its size."""
    content, suffix = encoded(noise((1024, 768)), max_bytes)
    width, height = size_of(content)
    assert suffix == ".webp" and len(content) <= max_bytes
    assert abs(width / height - 4 / 3) < 0.01 and width < 1024
    assert size_of(encoded(Image.new("RGB", (1024, 768), "red"), max_bytes)[0]) == (1024, 768)


def test_no_file_is_smaller_than_it_can_be_seen():
    assert max(size_of(encoded(noise((600, 600)), 1)[0])) == 256


@pytest.mark.parametrize("number", [1, 2, 3])
def test_teaser_shows_each_image(number):
    """Base and policy side by side for one prompt, else above each other, each with its own colour where it belongs."""
    base = [Image.new("RGB", (64, 64), (10 * n, 0, 200)) for n in range(number)]
    policy = [Image.new("RGB", (64, 64), (10 * n, 200, 0)) for n in range(number)]
    teaser = draw_teaser(base, policy, ["a cat on a mat " * 9] * number, ("base", "after 3 steps"))
    pixels = np.asarray(teaser)
    assert 880 <= teaser.width <= 900
    across = max(2, number)
    size = (900 - 10 * (across + 1)) // across
    for n in range(number):
        x = 10 + n * (size + 10) + size // 2
        column = pixels[:, x]
        assert (column == (10 * n, 0, 200)).all(axis=1).sum() == size
        if number == 1:
            column = pixels[:, x + size + 10]
        assert (column == (10 * n, 200, 0)).all(axis=1).sum() == size


def test_teaser_of_images_that_are_not_square():
    """Their shape is kept."""
    images = [Image.new("RGB", (64, 32), "red")]
    red = (np.asarray(draw_teaser(images, images, ["a"], ("base", "policy"))) == (255, 0, 0)).all(axis=2)
    rows, columns = red.any(axis=1).sum(), red.any(axis=0).sum()
    assert (rows, columns) == (218, 870)  # twice 435 x 217.5


@pytest.mark.parametrize("text", ["", "word " * 60, "x" * 400, "a\n\n\tb", "\N{PILE OF POO}" * 90, "a " + "y" * 300])
def test_wrapped_text_fits(text):
    """Whatever a prompt is, no line is wider than the space, and there are no more lines than asked for."""
    font = PIL.ImageFont.load_default(17)
    lines = wrapped(text, font, 200, 3)
    assert 1 <= len(lines) <= 3 and all(font.getlength(line) <= 200 for line in lines)
    assert lines[-1].endswith("...") == (len(text.split()) > 20 or len(text) > 80)


# ----- curves -----


def test_curves_are_what_was_logged():
    """Steps in order with their last value, without what is not finite, training before evaluations."""
    nan = float("nan")
    history = [
        {"step": 1, "loss": 0.7, "rewards/chosen": 0.0},
        {"step": 2, "loss": nan, "eval_loss": 0.8, "train_loss": 9.0, "eval_a_loss": 0.1, "eval_b_c_loss": 0.2},
        {"step": 3, "loss": 0.5, "learning_rate": 1.0, "eval_rewards/chosen": 0.3},
        {"step": 2, "loss": 0.6},  # of a run that was resumed
        {"step": 3, "loss": 0.4},
        {"step": 4, "loss": math.inf},
        {"step": 4, "train_runtime": 1.0},
    ]
    assert list(curves_of(history, LOSS).items()) == [
        (("loss", "training"), {1: 0.7, 2: 0.6, 3: 0.4}),
        (("loss", "evaluation"), {2: 0.8}),
        (("loss", "evaluation on a"), {2: 0.1}),
        (("loss", "evaluation on b_c"), {2: 0.2}),
    ]
    assert curves_of(history, REWARDS) == {("chosen", "training"): {1: 0.0}, ("chosen", "evaluation"): {3: 0.3}}


def panel(history: list[dict]):
    axes = Figure().subplots()
    draw_panel(axes, "loss", curves_of(history, LOSS))
    return axes


def test_ln_2_is_marked_where_the_loss_starts_there():
    """A preference's loss starts at ln 2, that of a fine-tuning does not."""
    assert [text.get_text() for text in panel([{"step": 1, "loss": 0.6931}]).texts] == ["ln 2"]
    assert len(panel([{"step": 1, "loss": 0.12}, {"step": 2, "loss": math.log(2)}]).texts) == 0


def test_a_panel_draws_the_points():
    """The line of the training has the logged points, an evaluation is dashed, and a legend tells them apart."""
    axes = panel([{"step": step, "loss": step / 10, "eval_loss": step / 5} for step in (1, 2, 3)])
    training, evaluation = axes.lines[:2]
    assert training.get_xydata().tolist() == [[1, 0.1], [2, 0.2], [3, 0.3]]
    assert evaluation.get_xydata().tolist() == [[1, 0.2], [2, 0.4], [3, 0.6]] and evaluation.get_linestyle() == "--"
    assert training.get_color() != evaluation.get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "evaluation"]
    assert panel([{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.1}]).get_legend() is None


def test_a_single_point_is_seen():
    axes = panel([{"step": 10, "loss": 0.3}])
    assert axes.lines[0].get_marker() == "o"
    assert [tick for tick in axes.get_xticks() if 9 < tick < 11] == [10]


@pytest.mark.parametrize("loss", [0.3, float("nan")])
@pytest.mark.parametrize("dataset", ["$", "a$b$c", r"\frac{", "<b>"])
def test_any_history_is_drawn(loss, dataset):
    """A name of a dataset is no formula."""
    history = [{"step": 1, "loss": loss, f"eval_{dataset}_loss": 0.3}]
    assert size_of(draw_curves(history))[0] == 1440


def test_nothing_logged_is_no_picture():
    assert draw_curves([]) is None and draw_curves([{"step": 1, "loss": float("nan"), "epoch": 1}]) is None


def test_curves_need_matplotlib(monkeypatch, caplog):
    """Without it a warning tells what to install, and there is no picture."""
    genuine = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with caplog.at_level(logging.WARNING):
        assert draw_curves([{"step": 1, "loss": 0.3}]) is None
    assert 'pip install "trl-diffusion[evaluation]"' in caplog.text
