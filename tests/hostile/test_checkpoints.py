# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A checkpoint of somebody else: whatever its pickles and states hold, resuming runs no code."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests import tiny
from tests.hostile.limits import outcome
from tests.hostile.lora_cases import DEEP, Bomb
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer


PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin", "adapter_model.bin",
           "pytorch_model.bin", "optimizer.bin", "diffusion_pytorch_model.bin")  # fmt: skip


def train(folder: Path, steps: int, resume: Path | None = None) -> None:
    args = InstanceDPOConfig(output_dir=str(folder), max_steps=steps, save_steps=1, report_to="none", use_cpu=True,
                             per_device_train_batch_size=1, disable_tqdm=True)  # fmt: skip
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])
    InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(2), peft_config=lora).train(
        resume_from_checkpoint=resume and str(resume)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(folder, 1)
    return folder


@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_of_a_checkpoint_runs_code(trained, tmp_path, name):
    """Those that are read are read as tensors, and the others are not read at all."""
    shutil.copytree(trained, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-1"
    torch.save({"state": Bomb(tmp_path / "touched")}, folder / name)
    ended = outcome(lambda: train(tmp_path / "run", 2, folder), seconds=120)
    assert ended.kind not in ("slow", "died")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{}", b"\xff", DEEP.encode(), b'{"global_step": 1e400}', b'{"log_history": 1}']
)
def test_no_state_of_a_checkpoint_hangs(trained, tmp_path, content):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").write_bytes(content)
    assert outcome(lambda: train(tmp_path / "run", 2, tmp_path / "run" / "checkpoint-1"), 120).kind not in (
        "slow",
        "died",
    )
