# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints of all weights: each a whole pipeline, the frozen components once on the disk."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from tests import tiny
from tests.tiny import FAST, max_difference, weights
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.trainer import checkpoints


FROZEN = ("vae", "text_encoder")


def make_trainer(folder: Path, **kwargs) -> InstanceDPOTrainer:
    settings = {**FAST, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 1, "use_cpu": True, **kwargs}
    return InstanceDPOTrainer(
        tiny.sd_pipeline(), args=InstanceDPOConfig(str(folder), **settings), train_dataset=tiny.pairs()
    )


def bytes_of(folders: list[Path]) -> int:
    """What the weights of the frozen components take on the disk: a file with several names once."""
    files = [file.stat() for folder in folders for name in FROZEN for file in (folder / name).glob("*.safetensors")]
    return sum({(file.st_dev, file.st_ino): file.st_size for file in files}.values())


@pytest.mark.parametrize("has_links", [True, False])
def test_checkpoints_are_whole_and_share_what_is_frozen(tmp_path, monkeypatch, has_links):
    """Three checkpoints take the frozen components' bytes once (without links three times); each loads after the first is gone."""
    if not has_links:

        def refuse(*args):
            raise OSError("no links here")

        monkeypatch.setattr(checkpoints.os, "link", refuse)
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.train()
    trainer.save_model()
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
    assert bytes_of(folders) == (1 if has_links else 3) * bytes_of(folders[:1]) > 0
    assert bytes_of([tmp_path, *folders]) == bytes_of([tmp_path]) + bytes_of(folders)
    names = [{str(file.relative_to(folder)) for file in folder.rglob("*")} for folder in folders]
    assert names[0] == names[1] == names[2]

    shutil.rmtree(folders[0])
    base, *later = (DiffusionPipeline.from_pretrained(folder) for folder in (tmp_path, *folders[1:]))
    for name in FROZEN:
        for pipeline in later:
            assert max_difference(weights(getattr(pipeline, name)), weights(getattr(base, name))) == 0
    assert max_difference(weights(later[0].unet), weights(base.unet)) > 0
    assert max_difference(weights(later[1].unet), weights(base.unet)) == 0


def test_writing_one_again_leaves_the_others(tmp_path):
    """Another model's run in the same folder replaces the checkpoints that it writes, and no file of those that it does not."""
    first = make_trainer(tmp_path, max_steps=2)
    first.train()
    second = make_trainer(tmp_path, max_steps=1)
    with torch.no_grad():
        for parameter in second.backbone.pipeline.vae.parameters():
            parameter.add_(1.0)
    second.train()
    for _ in range(2):
        new, old = (DiffusionPipeline.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (1, 2))
        assert max_difference(weights(old.vae), weights(first.backbone.pipeline.vae)) == 0
        assert max_difference(weights(new.vae), weights(second.backbone.pipeline.vae)) == 0
        second.save_model(str(tmp_path / "checkpoint-1"))  # again over its own
