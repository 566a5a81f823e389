# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The pictures that a training leaves for its card: of this run, of this step, and no others."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback

from tests import tiny
from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer, InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.cards.facts import Sample
from trl_diffusion.masks import instance_masks
from trl_diffusion.sampling import NotFiniteError
from trl_diffusion.trainer.card_pictures import (
    CardPictures,
    rows_with_conflict,
    save_samples,
    small_png,
    write_card_pictures,
)
from trl_diffusion.visualization import image_grid, mask_overlay


PROMPTS = ["a red circle", "a cat"]


def make_trainer(tmp_path: Path, rows: Dataset | None = None, eval_dataset=None, **settings) -> InstanceDPOTrainer:
    settings = {"sample_prompts": PROMPTS, "sample_steps": 2, "num_inference_steps": 1} | settings
    args = InstanceDPOConfig(str(tmp_path), **tiny.FAST | {"learning_rate": 0.05} | settings)
    return InstanceDPOTrainer(
        tiny.sd_pipeline(),
        args=args,
        train_dataset=rows or tiny.pairs(4),
        eval_dataset=eval_dataset,
        peft_config=tiny.lora(),
    )


def pictures_of(trainer) -> CardPictures:
    return write_card_pictures(trainer.args.output_dir, trainer.state.log_history, trainer.state.global_step)


def enlarged(image: Image.Image) -> np.ndarray:
    return np.asarray(image).repeat(8, axis=0).repeat(8, axis=1)


def files(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "images").glob("*")}


def photo(size: int, seed: int) -> Image.Image:
    """Waves with some grain."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(9 * (x * draw.normal() + y * draw.normal())) + 0.1 * draw.normal(size=x.shape) for _ in range(3)]
    return Image.fromarray(((np.stack(waves, -1) * 0.4 + 0.5).clip(0, 1) * 255).astype(np.uint8))


# ----- samples -----


def test_samples_of_a_training(tmp_path):
    """The files are what base and policy draw at the end, pixel by pixel, and the curves are those of the log."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    pictures = pictures_of(trainer)
    assert pictures == CardPictures(
        [Sample(prompt, f"images/sample-{n}.png", f"images/sample-{n}-base.png") for n, prompt in enumerate(PROMPTS)],
        pictures.teaser,
        "images/curves.png",
        None,
    )
    policy, base = trainer.sample(PROMPTS), trainer.sample(PROMPTS, with_reference=True)
    for sample, image, base_image in zip(pictures.samples, policy, base, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / sample.image)), enlarged(image))
        assert np.array_equal(np.asarray(Image.open(tmp_path / sample.base_image)), enlarged(base_image))
    assert Image.open(tmp_path / pictures.teaser).width <= 900
    assert json.loads((tmp_path / "images" / "samples.json").read_text())["step"] == 3


def test_a_resumed_run_has_its_own_prompts(tmp_path):
    """Fewer and other prompts take the place of the earlier ones; without any, nothing of them is left."""
    make_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, sample_prompts=["a dog"], **settings)
    trainer.train(resume_from_checkpoint=True)
    assert [sample.prompt for sample in pictures_of(trainer).samples] == ["a dog"]
    assert files(tmp_path) == {"sample-0.png", "sample-0-base.png", "teaser.png", "samples.json", "curves.png"}
    trainer = make_trainer(tmp_path, sample_prompts=None, **settings | {"max_steps": 5})
    trainer.train(resume_from_checkpoint=True)
    assert pictures_of(trainer).samples == [] and pictures_of(trainer).teaser is None
    assert files(tmp_path) == {"curves.png"}


def test_another_run_in_the_folder_has_none_of_the_first(tmp_path):
    """What a run has left is not shown before the next one has drawn, and deleted when it begins; other files stay."""
    make_trainer(tmp_path, mask_examples=1).train()
    (tmp_path / "images" / "mine.png").write_bytes(b"")
    criteria = tmp_path / "criteria.yaml"
    criteria.write_text(tiny.CRITERIA)
    args = AttributeSFTConfig(str(tmp_path), criteria=str(criteria), **tiny.FAST)
    trainer = AttributeSFTTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.paintings(4))
    assert pictures_of(trainer) == CardPictures([], None, None, None)
    trainer.train()
    assert pictures_of(trainer) == CardPictures([], None, "images/curves.png", None)
    assert files(tmp_path) == {"curves.png", "mine.png"}


def test_a_failed_sampling_leaves_no_older_pictures(tmp_path, monkeypatch):
    """Images of an earlier step do not pretend to be of this one."""
    trainer = make_trainer(tmp_path)
    genuine = trainer.samples.draw

    def draw(*args):
        if trainer.state.global_step == 3:
            raise NotFiniteError("not finite")
        return genuine(*args)

    monkeypatch.setattr(trainer.samples, "draw", draw)
    trainer.train()
    assert pictures_of(trainer).samples == [] and files(tmp_path) == {"curves.png"}
    assert (tmp_path / "samples" / "step-000002.png").exists()


class Losses(TrainerCallback):
    """Replaces the losses of the evaluations, before the best checkpoint is chosen by them."""

    def __init__(self, *losses: float):
        self.losses = iter(losses)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = next(self.losses)


def test_the_best_weights_have_their_own_samples(tmp_path):
    """Where the best checkpoint is loaded at the end, the samples are its."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, eval_dataset=tiny.pairs(2), load_best_model_at_end=True, **settings)
    trainer.add_callback(Losses(1.0, 3.0, 2.0))
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.global_step == 3
    assert json.loads((tmp_path / "images" / "samples.json").read_text())["step"] == 1
    image = np.asarray(Image.open(tmp_path / "images" / "sample-1.png"))
    assert np.array_equal(image, enlarged(trainer.sample(PROMPTS)[1]))


def test_samples_of_another_model_say_so(tmp_path):
    """The record and the teaser name the model that has drawn."""
    images = [photo(300, n) for n in range(2)]
    save_samples(tmp_path, PROMPTS, images, images, 5, "/home/somebody/models/turbo")
    record = (tmp_path / "images" / "samples.json").read_text()
    assert json.loads(record)["model"] == "turbo" and "somebody" not in record
    other = (tmp_path / "images" / "teaser.webp").read_bytes()
    save_samples(tmp_path, PROMPTS, images, images, 5)
    assert json.loads((tmp_path / "images" / "samples.json").read_text())["model"] is None
    assert (tmp_path / "images" / "teaser.webp").read_bytes() != other


@pytest.mark.parametrize("number", [1, 10])
def test_pictures_are_below_two_megabytes(tmp_path, number):
    """At 1024 px, with as many prompts as anybody samples, the samples and the teaser leave room for masks and curves."""
    images = [photo(1024, n) for n in range(2)]
    policy, base = [images[n % 2] for n in range(number)], [images[1 - n % 2] for n in range(number)]
    save_samples(tmp_path, [f"prompt {n}" for n in range(number)], base, policy, 1)
    pictures = write_card_pictures(tmp_path, [{"step": 1, "loss": 0.5}])
    assert len(pictures.samples) == min(number, 8)
    assert sum(path.stat().st_size for path in (tmp_path / "images").iterdir()) < 1_500_000
    assert len(small_png(image_grid([images] * 8, ["a", "b"], size=438), 400_000)) <= 400_000


def test_hostile_prompts_come_back(tmp_path):
    prompts = ['"}]', "../../x\n\n# a", "\N{PILE OF POO}" * 50, ""]
    images = [photo(64, n) for n in range(4)]
    save_samples(tmp_path, prompts, images, images, 0)
    assert [sample.prompt for sample in write_card_pictures(tmp_path, []).samples] == prompts
    assert len(files(tmp_path)) == 10
    (tmp_path / "images" / "sample-2.png").unlink()  # a picture that the user does not want
    assert write_card_pictures(tmp_path, []).samples == []


# ----- masks -----


def with_conflicts(conflicts: list[str]) -> Dataset:
    """Pairs with one instance each that has this preference."""
    rows = tiny.pairs(len(conflicts))
    instances = [
        [{"label": "cat", "preference": which, "chosen_box": [0, 0, 16, 16], "rejected_box": [8, 8, 24, 24]}]
        for which in conflicts
    ]
    kept = rows.remove_columns("instances")
    return Dataset.from_list(
        [row | {"instances": each} for row, each in zip(kept, instances, strict=True)],
        features=rows.features,
    )


def test_masks_are_drawn_as_they_are_trained(tmp_path):
    """The first rows that have a conflict, flipped and cropped as in training, on the latent grid, at the weights of the run."""
    rows = with_conflicts(["chosen", "rejected", "tie", "rejected", "rejected"])
    settings = {"mask_examples": 2, "random_flip": True, "w_neg": -0.5, "mask_overlap": "covering"}
    trainer = make_trainer(tmp_path, rows, sample_prompts=None, **settings)
    trainer.train()
    assert pictures_of(trainer).masks == "images/masks.png"
    expected = []
    for row in (rows[1], rows[3]):
        batch = trainer.data_collator([next(each for each in trainer.rows if each["id"] == row["id"])])
        masks = {
            column: instance_masks(
                batch[f"{column}_boxes"], batch["judged"], batch["conflicts"], *(8, 8), -0.5, "covering"
            )[0]
            for column in ("chosen", "rejected")
        }
        expected.append(
            [
                mask_overlay(
                    batch[f"{column}_pixel_values"][0],
                    masks[column],
                    batch[f"{column}_boxes"][0],
                    ["cat"],
                    ["rejected"],
                )
                for column in ("chosen", "rejected")
            ]
        )
    grid = image_grid(expected, ["chosen", "rejected"], [rows[1]["prompt"], rows[3]["prompt"]], size=438)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "masks.png").convert("RGB")), np.asarray(grid))


@pytest.mark.parametrize("precompute", [False, True])
def test_masks_are_shown_only_where_they_are_asked_for(tmp_path, precompute):
    """Training images are not published by default, nor because an earlier run in this folder was allowed to."""
    rows = with_conflicts(["rejected"] * 4)
    settings = {"sample_prompts": None, "precompute": precompute, "precompute_dir": str(tmp_path / "cache")}
    for number, shown in ((1, "images/masks.png"), (0, None)):
        trainer = make_trainer(tmp_path / "out", rows, mask_examples=number, **settings)
        trainer.train()
        assert pictures_of(trainer).masks == shown
        assert ("masks.png" in files(tmp_path / "out")) == (number == 1)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("number", [1, 2, 9])
def test_rows_with_a_conflict(is_stream, number):
    """The first ones in their order; fewer where there are no more."""
    rows = with_conflicts(["chosen", "rejected", "tie", "rejected"])
    found = list(rows_with_conflict(rows.to_iterable_dataset() if is_stream else rows, number))
    assert [row["prompt"] for row in found] == [rows[1]["prompt"], rows[3]["prompt"]][:number]
    assert list(rows_with_conflict(rows.remove_columns("instances"), number)) == []


def test_data_without_conflicts_has_no_picture(tmp_path):
    trainer = make_trainer(tmp_path, with_conflicts(["chosen", "tie"]), sample_prompts=None, mask_examples=3)
    trainer.train()
    assert pictures_of(trainer).masks is None


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="mask_examples"):
        InstanceDPOConfig("out", report_to="none", mask_examples=-1)
