# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.cli.processes import run_distributed
from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer


def train(script: str, processes: int, flags: list, output_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Three steps of 8 rows as a LoRA: its weights, and the log."""
    settings = {
        "output_dir": output_dir,
        "use_peft": True,
        "lora_r": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 1,
        "max_grad_norm": 0,
        "beta": 20,
        "per_device_train_batch_size": 4 // processes,
        "gradient_accumulation_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    flags = [*flags, *(part for name, value in settings.items() for part in (f"--{name}", value))]
    for ended in run_distributed(["-m", f"trl_diffusion.scripts.{script}", *flags], processes):
        assert ended.returncode == 0, ended.stderr
    state = json.loads((output_dir / "checkpoint-3" / "trainer_state.json").read_text())
    return load_file(output_dir / "pytorch_lora_weights.safetensors"), state["log_history"]


def make_expert(folder: Path) -> list:
    """The flags of an expert of the tiny pipeline."""
    (folder / "criteria.yaml").write_text(tiny.CRITERIA)
    args = AttributeSFTConfig(
        str(folder / "expert"),
        criteria=str(folder / "criteria.yaml"),
        learning_rate=0.05,
        max_steps=3,
        report_to="none",
        disable_tqdm=True,
    )
    expert = AttributeSFTTrainer(tiny.sd_pipeline(), args, train_dataset=tiny.paintings())
    expert.train()
    expert.save_model()
    return ["--expert", folder / "expert", "--criteria", folder / "criteria.yaml"]


@pytest.mark.parametrize(
    ("script", "family"),
    [
        ("instance_dpo", "sd"),
        pytest.param("instance_dpo", "sd3", marks=pytest.mark.slow),
        ("complex_po", "sd"),
    ],
)
def test_two_processes_equal_one(tmp_path, script, family):
    """Two processes with a batch of 2 each train what one with a batch of 4 does, and log the same metrics."""
    pipeline = tiny.PIPELINES[family]()
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    flags = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data"]
    flags += [part for name, value in tiny.settings(pipeline).items() for part in (f"--{name}", value)]
    if script == "complex_po":
        flags += make_expert(tmp_path)
    dataset = tiny.pairs() if script == "instance_dpo" else tiny.paintings()
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    ends, logs = zip(
        *(train(script, processes, flags, tmp_path / f"processes-{processes}") for processes in (1, 2)), strict=True
    )
    assert max((ends[0][name] - ends[1][name]).abs().max() for name in ends[0]) <= 1e-5
    assert max(value.abs().max() for name, value in ends[0].items() if "lora_B" in name or "lora.up" in name) > 1e-3
    for one, two in zip(*logs, strict=True):
        for name in {"loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "errors/chosen"} & set(one):
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5)
