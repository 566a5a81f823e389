# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What people do with every family beside plain training: images of many shapes, a LoRA that goes on, and the commands."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors import safe_open

from tests import tiny
from tests.cli import processes
from tests.families import FAMILIES, Family
from tests.families.test_laws import LORA, predictions, quiet_pipeline, training
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, instance_pair_features, sample_images, visualization
from trl_diffusion.backbones import load_backbone
from trl_diffusion.cli.main import main
from trl_diffusion.data.buckets import bucket_sizes
from trl_diffusion.evaluation.prompts import load_prompts
from trl_diffusion.lora_files import find_lora, load_lora


SCENES = ["a red circle", "a blue square and a red circle"]  # which the quickstart's oracle reads


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


# ---- Shapes ----


def pairs_of_shapes() -> Dataset:
    """Pairs that are tall, wide and square."""
    rows = []
    for index, size in enumerate([(32, 64), (64, 32), (48, 48)] * 2):
        images = {column: tiny.image(2 * index + place, *size) for place, column in enumerate(("chosen", "rejected"))}
        rows.append(tiny.pairs(6)[index] | images)
    return Dataset.from_list(rows, features=instance_pair_features())


def resolution_of_shapes(multiple: int) -> int:
    """The least resolution, from 32 pixels on, that has other buckets than the square."""
    resolution = max(32, multiple)
    while len(bucket_sizes(resolution, multiple)) == 1:
        resolution += multiple
    return resolution


def test_images_of_many_shapes(family, tmp_path):
    """
    In buckets, tall, wide and square latents are trained on, each with masks on its own grid, live as well as precomputed.
    """
    multiple = load_backbone(quiet_pipeline(family)).size_multiple
    resolution, losses = resolution_of_shapes(multiple), []
    buckets = bucket_sizes(resolution, multiple)
    settings = tiny.FAST | family.settings | {"resolution": resolution, "aspect_ratio_buckets": True}
    settings |= {"per_device_train_batch_size": 1, "max_steps": 6, "learning_rate": 1e-2}
    for precompute in ({}, {"precompute": True, "precompute_dir": str(tmp_path / "files")}):
        trainer = InstanceDPOTrainer(
            quiet_pipeline(family),
            args=InstanceDPOConfig(str(tmp_path / "output"), **settings | precompute),
            train_dataset=pairs_of_shapes(),
            peft_config=tiny.lora(**LORA),
        )
        shapes, own = set(), trainer.objective

        def note(model, noised, shapes=shapes, own=own):
            assert noised.batch["masks"].shape[1:] == noised.noisy_latents.shape[2:]
            shapes.add(tuple(noised.noisy_latents.shape[2:]))
            return own(model, noised)

        trainer.objective = note
        trainer.train()
        sizes = {tuple(side * trainer.backbone.vae_scale_factor for side in shape) for shape in shapes}
        assert sizes <= set(buckets) and {height > width for height, width in sizes} == {True, False}
        assert any(height < width for height, width in sizes) and any(height == width for height, width in sizes)
        losses.append(tiny.losses(trainer))
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-4) and losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert abs(losses[0][-1] - math.log(2)) > 1e-4


# ---- A LoRA that goes on ----


def test_a_lora_goes_on_where_it_ended(family, tmp_path):
    """
    A training that starts at a saved LoRA predicts exactly what the LoRA's own training did at its end, policy and reference; and so
    does the pipeline that `evaluate` loads it into.
    """
    first = training(family, tmp_path / "first", peft_config=tiny.lora(**LORA), learning_rate=0.05)
    before = predictions(first.backbone, first.policy)
    first.train()
    first.save_model()
    expected = predictions(first.backbone, first.policy)
    assert (expected - before).abs().max() > 1e-3
    second = training(family, tmp_path / "second", initial_lora=str(tmp_path / "first"))
    assert (predictions(second.backbone, second.policy) - expected).abs().max() == 0
    with second.reference.lend(second.policy) as reference:
        assert (predictions(second.backbone, reference) - expected).abs().max() == 0
    second.train()
    assert (predictions(second.backbone, second.policy) - expected).abs().max() > 0
    pipeline = quiet_pipeline(family)
    load_lora(pipeline, find_lora(tmp_path / "first"), "evaluated")
    assert (predictions(first.backbone, pipeline.transformer) - expected).abs().max() == 0


# ---- Commands ----


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A family, and a folder with its pipeline, pairs and prompts."""
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    family.make().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    tiny.pairs(4).to_parquet(folder / "data" / "train.parquet")
    (folder / "prompts.txt").write_text("\n".join(SCENES))
    return family, folder


def test_show_masks_draws_those_of_the_training(saved, tmp_path, monkeypatch):
    """The masks in the pictures are the ones that the trainer weighs the errors of the latents with."""
    family, folder = saved
    drawn = []
    monkeypatch.setattr(
        visualization, "mask_overlay", lambda pixels, mask, *rest: drawn.append(mask) or tiny.image(0, 32, 32)
    )
    args = InstanceDPOConfig(str(tmp_path), **tiny.FAST | family.settings | {"resolution": 32, "w_neg": 0.25})
    dataset = tiny.pairs(4).select(range(2))
    trainer = InstanceDPOTrainer(quiet_pipeline(family), args=args, train_dataset=dataset, peft_config=tiny.lora())
    factor = trainer.backbone.vae_scale_factor
    flags = ["--dataset_name", folder / "data", "--num_rows", 2, "--resolution", 32, "--vae_scale_factor", factor]
    flags += ["--w_neg", 0.25, "--output_dir", tmp_path / "masks"]
    assert main(["show-masks", *map(str, flags)]) == 0
    batch = trainer.data_collator(list(dataset))
    masks = trainer.prepare_batch(batch, tiny.latents(trainer, batch))["masks"]
    assert masks.shape == (4, 32 // factor, 32 // factor)
    assert torch.equal(torch.stack([drawn[place] for place in (0, 2, 1, 3)]), masks)
    assert masks.min() < 0.9 < 1 < masks.max()


def test_training_and_evaluating_by_commands(saved, tmp_path):
    """
    `instance-dpo --use_peft` trains the pipeline of a folder, and `evaluate` draws, at the size that is asked for, what diffusers draws
    with the folder and with the LoRA.
    """
    family, folder = saved
    settings = {"resolution": 32} | family.settings
    flags = ["--model_name_or_path", folder / "model", "--dataset_name", folder / "data", "--use_peft", "--lora_r", 4]
    flags += ["--learning_rate", 0.1, "--max_steps", 2, "--report_to", "none", "--use_cpu", "--num_processes", 1]
    flags += [part for name, value in settings.items() for part in (f"--{name}", value)]
    run("instance-dpo", *flags, "--output_dir", tmp_path / "lora")
    with safe_open(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert '"transformer.r": 4' in file.metadata()["lora_adapter_metadata"]
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "height=32, width=32" in card and "| optimizer steps | 2 |" in card and "torch.bfloat16" in card

    flags = ["--models", f"base={folder / 'model'}", f"lora={tmp_path / 'lora'}", "--base_model", folder / "model"]
    flags += ["--prompts", folder / "prompts.txt", "--num_inference_steps", 2, "--height", 32, "--width", 32]
    further = {name: value for name, value in family.settings.items() if name == "max_sequence_length"}
    flags += [part for name, value in further.items() for part in (f"--{name}", value)]
    flags += [
        "--metrics",
        "caption_match",
        "--vlm",
        "oracle",
        "--detector",
        "oracle",
        "--use_cpu",
        "--num_processes",
        1,
    ]
    run("evaluate", *flags, "--output_dir", tmp_path / "evaluation")
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert list(summary["models"]) == ["base", "lora"]
    prompts = load_prompts(folder / "prompts.txt").prompts
    files = {path.parts[-2:]: path for path in (tmp_path / "evaluation").rglob("*.png")}
    drawn = {name: images([files[name, f"{prompt.id}_0.png"] for prompt in prompts]) for name in ("base", "lora")}
    assert drawn["base"].shape == drawn["lora"].shape == (2, 32, 32, 3)
    assert abs(drawn["base"] - drawn["lora"]).max() > 4

    pipeline, keys = quiet_pipeline(family), [f"{prompt.id}/0" for prompt in prompts]
    sampling = load_backbone(pipeline).sampling_settings | further
    pipeline.load_lora_weights(tmp_path / "lora")
    expected = sample_images(pipeline, SCENES, num_inference_steps=2, height=32, width=32, keys=keys, **sampling)
    assert abs(images(expected) - drawn["lora"]).max() <= 1


def run(*args) -> None:
    result = processes.run(["-c", processes.COMMAND, *args])
    assert result.returncode == 0, result.stderr


def images(files: list) -> np.ndarray:
    return np.stack([np.asarray(file if isinstance(file, Image.Image) else Image.open(file), int) for file in files])
