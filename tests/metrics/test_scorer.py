# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import io
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from trl_diffusion.metrics import METRICS, metric_path
from trl_diffusion.metrics.scorer import ImageMetric, Scorer, Scores, ScoringError, open_image


class Brightness(Scorer):
    """Scores the first pixel, times `unit`, and the length of the prompt. Black has no score."""

    name = "brightness"

    def __init__(self, unit: float = 1.0):
        super().__init__("cpu")
        self.unit = unit
        self.weights = {"eye": "1"}
        self.batches, self.threads = [], set()
        made.append(self)

    def prepare(self, image):
        self.threads.add(threading.current_thread())
        return image.convert("L").getpixel((0, 0))

    def score_batch(self, prepared, prompts):
        self.batches.append(len(prepared))
        return [
            self.unit * pixel / 255 + len(prompt) if pixel else ScoringError(f"it is black, {prompt}")
            for pixel, prompt in zip(prepared, prompts, strict=True)
        ]


class Darkness(Brightness):
    """A score without prompts, for which lower is better."""

    name = "darkness"
    needs_prompts = False
    higher_is_better = False

    def score_batch(self, prepared, prompts):
        assert prompts is None
        return [1 - pixel / 255 for pixel in prepared]


class BrightnessMetric(ImageMetric):
    """Brightness as a metric."""

    scorer_type = Brightness


class DarknessMetric(ImageMetric):
    """Darkness as a metric."""

    scorer_type = Darkness


made = []  # scorers


def gray(value: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (value,) * 3)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


VALUES = [255, 51, 102, 0, 204]
PROMPTS = ["", "a", "ab", "abc", ""]


class TestScores:
    def test_by_hand(self):
        """Mean and standard error are those of the images with a score: of 1, 2 and 6 they are 3 and sqrt(7 / 3)."""
        scores = Scores([1.0, None, 2.0, 6.0], {1: "no"})
        assert scores.scored == [1.0, 2.0, 6.0] and scores.mean == 3.0
        assert scores.standard_error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))

    def test_too_few(self):
        """One score has no error, and none has no mean."""
        assert (Scores([2.0]).mean, Scores([2.0]).standard_error) == (2.0, None)
        assert (Scores([None]).mean, Scores([None]).standard_error) == (None, None)


class TestScorer:
    @pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
    def test_scores_stand_where_their_images_do(self, batch_size):
        """For any batch size, images are scored with their own prompts, and errors have the image's index and a
        reason."""
        scorer = Brightness()
        scores = scorer.score([gray(value) for value in VALUES], PROMPTS, batch_size=batch_size)
        expected = [1.0, 1.2, 2.4, None, 0.8]
        assert [value and round(value, 6) for value in scores.values] == expected
        assert scores.errors == {3: "it is black, abc"}
        assert scores.mean == pytest.approx((1 + 1.2 + 2.4 + 0.8) / 4)
        assert sum(scorer.batches) == 5 and max(scorer.batches) == min(batch_size, 5)
        assert threading.main_thread() not in scorer.threads

    @pytest.mark.parametrize("batch_size", [0, -1])
    def test_batches_of_nothing_are_refused(self, batch_size):
        with pytest.raises(ValueError, match=f"batch size must be at least 1, got {batch_size}"):
            Brightness().score([gray(1)], ["a"], batch_size=batch_size)

    def test_the_next_batch_is_prepared_meanwhile(self):
        """While the model processes a batch, the images of the next one are prepared."""

        class Waits(Darkness):
            def __init__(self):
                super().__init__()
                self.prepared = threading.Semaphore(0)

            def prepare(self, image):
                self.prepared.release()
                return super().prepare(image)

            def score_batch(self, prepared, prompts):
                if len(self.batches) < 2:  # the first two of three batches have one after them
                    for _ in range(2 if self.batches else 4):
                        assert self.prepared.acquire(timeout=10)
                self.batches.append(len(prepared))
                return super().score_batch(prepared, prompts)

        assert len(Waits().score([gray(1)] * 6, batch_size=2).values) == 6

    def test_all_kinds_of_images(self, tmp_path):
        """An image in memory, its file, and their stored forms in `datasets` have the same score."""
        file = tmp_path / "image.png"
        gray(51).save(file)
        stored = Dataset.from_dict({"image": [gray(51), str(file)]}, Features({"image": ImageFeature(decode=False)}))
        kinds = [gray(51), file, str(file), {"path": str(file), "bytes": None}, {"bytes": png(gray(51)), "path": None}]
        assert Darkness().score([*kinds, *stored["image"]]).values == [0.8] * 7

    def test_bad_input(self):
        """No images or a wrong number of prompts raise a ValueError with the name of the score and the numbers."""
        with pytest.raises(ValueError, match="no images to compute `brightness`"):
            Brightness().score([], [])
        for prompts, said in ((["a"], "2 images and 1 prompts"), (None, "2 images and no prompts")):
            with pytest.raises(ValueError, match=f"`brightness` needs a prompt for each image.*{said}"):
                Brightness().score([gray(1), gray(2)], prompts)

    @pytest.mark.parametrize("content", [b"", b"no image", png(gray(1))[:40]], ids=["empty", "text", "half"])
    def test_a_broken_file_is_named(self, tmp_path, content):
        """An unreadable, missing or empty image raises a ValueError with the file, in any batch."""
        broken = tmp_path / "broken.png"
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=f"{broken} cannot be read as an image"):
            Darkness().score([gray(1), gray(2), broken], batch_size=1)
        with pytest.raises(ValueError, match="A stored image cannot be read"):
            open_image({"bytes": content, "path": None})
        for missing in (tmp_path / "missing.png", {"bytes": None, "path": str(tmp_path / "missing.png")}):
            with pytest.raises(ValueError, match="missing.png cannot be read"):
                open_image(missing)
        for nothing in (None, {"bytes": None, "path": None}):  # a row without an image
            with pytest.raises(ValueError, match="cannot be read"):
                open_image(nothing)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_score_that_is_no_number(self, tmp_path, value):
        """A score that is not finite raises a ValueError with the index and file of the image and the weights."""
        file = tmp_path / "image.png"
        gray(51).save(file)
        with pytest.raises(
            ValueError, match=rf"`brightness` of image 1 {file} is {value}: the weights eye are damaged"
        ):
            Brightness(unit=value).score([gray(0), file], ["", ""])


class TestMetric:
    def test_a_result(self, tmp_path):
        """It has the mean under the name of the metric, its standard error, scores, errors, direction and weights."""
        metric = BrightnessMetric(unit=2.0, cache_dir=str(tmp_path))
        result = metric.compute(images=[gray(value) for value in VALUES], prompts=PROMPTS, batch_size=2)
        assert result == {
            "brightness": pytest.approx((2 + 1.4 + 2.8 + 1.6) / 4),
            "standard_error": pytest.approx(np.std([2, 1.4, 2.8, 1.6], ddof=1) / 2),
            "scores": [pytest.approx(2), pytest.approx(1.4), pytest.approx(2.8), None, pytest.approx(1.6)],
            "errors": {3: "it is black, abc"},
            "higher_is_better": True,
            "weights": {"eye": "1"},
        }
        assert metric.scorer.batches == [2, 2, 1]

    def test_images_that_come_bit_by_bit(self, tmp_path):
        """Images can be added in batches before the computation, and the scorer is created once, when it is needed."""
        made.clear()
        metric = DarknessMetric(cache_dir=str(tmp_path))
        for values in ((255, 51), (102,)):
            metric.add_batch(images=[gray(value) for value in values])
        metric.add(images=gray(0))
        assert not made
        result = metric.compute()
        assert result["scores"] == pytest.approx([0, 0.8, 0.6, 1]) and result["higher_is_better"] is False
        assert metric.compute(images=[gray(0)])["darkness"] == 1
        assert len(made) == 1

    def test_what_evaluate_knows(self, tmp_path):
        """Prompts are required if the scorer needs them; the descriptions are the docstrings of scorer and metric."""
        metrics = [kind(cache_dir=str(tmp_path)) for kind in (BrightnessMetric, DarknessMetric)]
        assert [list(metric.features) for metric in metrics] == [["images", "prompts"], ["images"]]
        assert metrics[0].description.startswith("Scores the first pixel, times `unit`")
        assert metrics[0].inputs_description == "Brightness as a metric."

    def test_unknown_settings(self, tmp_path):
        """An unknown setting raises a ValueError with the valid ones."""
        with pytest.raises(ValueError, match="`brightness` has no setting units; its settings are unit"):
            BrightnessMetric(units=2.0, cache_dir=str(tmp_path))

    def test_paths(self):
        """The path is that of a module of this package; an unknown name raises a ValueError with all metrics."""
        assert Path(metric_path("pickscore")).is_file()
        with pytest.raises(ValueError, match=f"no metric 'pick_score'; there are {', '.join(METRICS)}"):
            metric_path("pick_score")
