# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import io
import math
import re
import sys

import numpy as np
import PIL.Image
import pytest
from transformers import TrainerState

from tests import tiny
from tests.evaluation.loras import save_lora
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, sample_images
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.notebook import Picture, show_curves, show_masks, show_pair, show_samples
from trl_diffusion.notebook.samples import adapter_layers
from trl_diffusion.visualization import BOX_COLORS, image_grid, instance_pictures


PROMPTS = ["a red circle", "a cat"]
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0}


def pixels(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def row(**changed) -> dict:
    """A pair of a black image and a white one, 64 x 32 pixels, with one instance in the left half of both."""
    instance = {"label": "dog", "chosen_box": [0, 0, 32, 32], "rejected_box": [0, 0, 32, 32], "preference": "rejected"}
    black, white = (PIL.Image.new("RGB", (64, 32), color) for color in ("black", "white"))
    return {"id": "1", "prompt": "a dog", "chosen": black, "rejected": white, "instances": [instance]} | changed


# ----- pictures -----


def test_a_picture_shows_its_pixels_and_is_saved(tmp_path):
    """What a notebook gets, and what is written, is the image without loss."""
    picture = Picture(tiny.image(0, 40, 32))
    picture.save(tmp_path / "new" / "picture.png")
    for shown in (io.BytesIO(picture._repr_png_()), tmp_path / "new" / "picture.png"):
        assert (pixels(PIL.Image.open(shown)) == pixels(picture.image)).all()
    assert repr(picture) == "Picture, 40 x 32 pixels"
    with pytest.raises(ValueError, match="picture.nothing"):
        picture.save(tmp_path / "picture.nothing")


# ----- pairs -----


def test_a_pair_with_its_verdicts():
    """The box is drawn in the colour of its verdict where it is in the image, and the page names the verdict."""
    pair = show_pair(row())
    assert pair.verdicts == [("dog", "rejected")] and pair.prompt == "a dog"
    # Each image is 256 x 128, in a square of 256 at (8, 32): from y = 32 + 64. The right edge of the box is at x = 8 + 128 - 1.
    for left in (8, 272):
        assert tuple(pixels(pair.image)[96 + 64, left + 127]) == BOX_COLORS["rejected"]
        assert tuple(pixels(pair.image)[96 + 64, left + 140]) != BOX_COLORS["rejected"]
    page = pair._repr_html_()
    assert re.findall(r"<td[^>]*>(.*?)</td>", page) == ["dog", "rejected", "contradicts"]
    assert pair._repr_png_() is None


def test_boxes_of_a_turned_image():
    """An image that its EXIF entry turns is shown upright, and its box with it: a box at the left of the file is then at the top."""
    image = PIL.Image.new("RGB", (64, 32), "black")
    image.getexif()[PIL.ExifTags.Base.Orientation] = 6  # the file's left side is the top
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=image.getexif())
    chosen = {"bytes": buffer.getvalue(), "path": None}
    shown = pixels(show_pair(row(chosen=chosen)).image)
    # 128 x 256, in the middle of its square: from x = 8 + 64. The box is the upper half: its lower edge is at y = 32 + 128 - 1.
    assert tuple(shown[32 + 127, 8 + 128]) == BOX_COLORS["rejected"]
    assert tuple(shown[32 + 200, 8 + 128]) == (0, 0, 0)


def test_hostile_text_of_a_pair_is_escaped():
    """What a prompt or a label says stays text: no element and no attribute of the page comes from it."""
    hostile = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    instances = row()["instances"]
    page = show_pair(row(prompt=hostile, instances=[instances[0] | {"label": hostile}]))._repr_html_()
    assert page.count("<img") == 1 and "<script" not in page and page.count('"') == 4
    assert page.count("&lt;script&gt;") == 2


def test_a_pair_without_instances():
    """It is shown without a table."""
    for instances in (None, []):
        pair = show_pair(row(instances=instances))
        assert pair.verdicts == [] and "<table" not in pair._repr_html_() and "No instances" in pair._repr_html_()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": None}, "`prompt` of the row with id '1' must be a string"),
        ({"chosen": {"bytes": b"no image", "path": None}}, "column `chosen` of the row with id '1'"),
        ({"instances": [row()["instances"][0] | {"preference": "better"}]}, r"instances\[0\].preference"),
        ({"instances": [row()["instances"][0] | {"chosen_box": [0, 0, 640, 32]}]}, r"instances\[0\].chosen_box"),
    ],
)
def test_a_broken_pair_is_refused(changed, message):
    """By its row and column."""
    with pytest.raises(ValueError, match=message):
        show_pair(row(**changed))


def test_masks_are_those_of_the_training():
    """Of a dataset, of a stream and of rows: each picture is the one of `instance_pictures`, the first rows in their order."""
    dataset = tiny.pairs(4)
    rows = list(dataset.take(2))
    collate = InstancePairCollator(32)
    drawn = [instance_pictures(collate([each]), each, 4, -0.5, "covering") for each in rows]
    expected = pixels(image_grid(drawn, ["chosen", "rejected"], [each["prompt"] for each in rows], 256))
    for data in (dataset, dataset.to_iterable_dataset(), rows):
        shown = show_masks(data, 2, resolution=32, vae_scale_factor=4, w_neg=-0.5, mask_overlap="covering")
        assert (pixels(shown.image) == expected).all()


def test_masks_of_fewer_rows_than_asked_for():
    """All rows are shown."""
    for data in (tiny.pairs(2), tiny.pairs(2).to_iterable_dataset(), list(tiny.pairs(2))):
        assert show_masks(data, resolution=32, vae_scale_factor=4).image.height == 32 + 2 * (256 + 24 + 8)


def test_masks_of_nothing_are_refused():
    """No rows, and a dataset without instances."""
    with pytest.raises(ValueError, match="`num_rows` must be at least 1"):
        show_masks(tiny.pairs(2), 0)
    with pytest.raises(ValueError, match="`data` has no rows"):
        show_masks([])
    with pytest.raises(ValueError, match="instances"):
        show_masks(tiny.pairs(2, with_instances=False))


# ----- samples -----


def test_samples_are_those_of_sample_images():
    """Each column holds what `sample_images` draws with the same seed, so all start from the same noise; images stay what they are."""
    pipelines = {f"seed {seed}": tiny.sd_pipeline(seed=seed) for seed in (0, 1)}
    expected = {label: sample_images(each, PROMPTS, seed=3, **SETTINGS) for label, each in pipelines.items()}
    shown = show_samples(pipelines | {"again": expected["seed 0"]}, PROMPTS, seed=3, **SETTINGS)
    assert list(shown.images) == ["seed 0", "seed 1", "again"]
    for label, images in (expected | {"again": expected["seed 0"]}).items():
        assert all((pixels(a) == pixels(b)).all() for a, b in zip(shown.images[label], images, strict=True))
    assert not (pixels(shown.images["seed 0"][0]) == pixels(shown.images["seed 1"][0])).all()
    rows = [list(each) for each in zip(*shown.images.values())]
    assert (pixels(shown.image) == pixels(image_grid(rows, list(shown.images), PROMPTS, 256))).all()


def test_a_pipeline_with_adapters(tmp_path):
    """
    A column without and one with each LoRA, as pipelines that have only it draw. Afterwards the same adapters are active, with the
    same strength, as before.
    """
    for seed, name in enumerate(("first", "second")):
        save_lora(tiny.sd_pipeline(), tmp_path / name, seed=seed)
    expected = {"base": sample_images(tiny.sd_pipeline(), PROMPTS, **SETTINGS)}
    pipeline = tiny.sd_pipeline()
    for name in ("first", "second"):
        pipeline.load_lora_weights(str(tmp_path / name), adapter_name=name)
        alone = tiny.sd_pipeline()
        alone.load_lora_weights(str(tmp_path / name))
        expected[name] = sample_images(alone, PROMPTS, **SETTINGS)
    pipeline.set_adapters(["second"])

    def state() -> list:
        return [
            (layer._disable_adapters, list(layer.active_adapters), dict(layer.scaling))
            for layer in adapter_layers(pipeline)
        ]

    before = state()
    shown = show_samples(pipeline, PROMPTS, **SETTINGS)
    assert state() == before and len(before) > 2
    assert list(shown.images) == ["base", "first", "second"]
    for name, images in expected.items():
        assert all((pixels(a) == pixels(b)).all() for a, b in zip(shown.images[name], images, strict=True))
    assert not (pixels(expected["first"][0]) == pixels(expected["second"][0])).all()
    pipeline.disable_lora()
    show_samples(pipeline, PROMPTS[:1], **SETTINGS)
    assert all(disabled for disabled, _, _ in state())


def test_samples_of_nothing_are_refused():
    """No model, no prompt, and images that are not one for each prompt."""
    image = tiny.image(0, 32, 32)
    with pytest.raises(ValueError, match="`models` is empty"):
        show_samples({}, PROMPTS)
    with pytest.raises(ValueError, match="`prompts` is empty"):
        show_samples({"base": []}, [])
    with pytest.raises(ValueError, match="'base' has 1 images for 2 prompts"):
        show_samples({"base": [image]}, PROMPTS)


def test_a_lora_that_is_called_as_the_base_is_refused(tmp_path):
    """It would take the column without a LoRA."""
    save_lora(tiny.sd_pipeline(), tmp_path)
    pipeline = tiny.sd_pipeline()
    pipeline.load_lora_weights(str(tmp_path), adapter_name="base")
    with pytest.raises(ValueError, match="A LoRA is called 'base'"):
        show_samples(pipeline, PROMPTS)


# ----- curves -----

HISTORY = [
    {"step": 5, "loss": math.log(2), "rewards/margins": 0.0, "rewards/chosen": 0.1, "rewards/rejected": 0.1},
    {"step": 10, "loss": 0.5, "rewards/margins": 1.5, "rewards/chosen": 1.0, "rewards/rejected": -0.5},
    {"step": 10, "eval_loss": 0.6, "eval_rewards/margins": 1.0},
    {"step": 10, "train_runtime": 3.0, "train_loss": 0.6},
]


def test_curves_hold_the_logged_values():
    """Of one run, each panel has exactly what was logged, by step, apart for training and evaluation."""
    shown = show_curves(HISTORY)
    assert shown.panels == {
        "loss": {("loss", "training"): {5: math.log(2), 10: 0.5}, ("loss", "evaluation"): {10: 0.6}},
        "rewards": {
            ("chosen", "training"): {5: 0.1, 10: 1.0},
            ("rejected", "training"): {5: 0.1, 10: -0.5},
            ("margin", "training"): {5: 0.0, 10: 1.5},
            ("margin", "evaluation"): {10: 1.0},
        },
    }
    assert shown.image.width > 800 and len(np.unique(pixels(shown.image))) > 10


def test_curves_of_several_runs():
    """Each metric has a curve of each run that logged it, under the name of the run."""
    other = [{"step": 7, "loss": 0.25, "grad_norm": 2.0}]
    shown = show_curves({"IAPO": HISTORY, "$": other})
    assert shown.panels == {
        "loss": {
            ("IAPO", "training"): {5: math.log(2), 10: 0.5},
            ("IAPO", "evaluation"): {10: 0.6},
            (r"\$", "training"): {7: 0.25},
        },
        "margin of the rewards": {("IAPO", "training"): {5: 0.0, 10: 1.5}, ("IAPO", "evaluation"): {10: 1.0}},
        "norm of the gradient": {(r"\$", "training"): {7: 2.0}},
    }


def test_curves_of_a_trainer_and_of_its_folder(tmp_path):
    """A trainer, its history and its output directory, from which the newest checkpoint is read, have the same curves."""
    args = InstanceDPOConfig(
        str(tmp_path / "out"),
        max_steps=3,
        save_steps=1,
        logging_steps=1,
        report_to="none",
        per_device_train_batch_size=2,
    )
    trainer = InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(4))
    trainer.train()
    panels = show_curves(trainer).panels
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert panels["loss"] == {("loss", "training"): logged} and sorted(logged) == [1, 2, 3]
    assert show_curves(trainer.state.log_history).panels == panels
    for folder in (tmp_path / "out", str(tmp_path / "out")):
        assert show_curves(folder).panels == panels
    state = TrainerState(global_step=2, log_history=[{"step": 2, "loss": 9.0}])  # older than the newest checkpoint
    state.save_to_json(str(tmp_path / "out" / "trainer_state.json"))
    assert show_curves(tmp_path / "out").panels == panels


def test_curves_of_nothing_are_refused(tmp_path, monkeypatch):
    """A folder without a training, a training that logged nothing, more runs than colours, and a Python without matplotlib."""
    with pytest.raises(ValueError, match="holds no trainer_state.json"):
        show_curves(tmp_path)
    with pytest.raises(ValueError, match="Nothing was logged"):
        show_curves([])
    with pytest.raises(ValueError, match="7 runs cannot be told apart"):
        show_curves({str(number): HISTORY for number in range(7)})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r'pip install "trl-diffusion\[evaluation\]"'):
        show_curves(HISTORY)
