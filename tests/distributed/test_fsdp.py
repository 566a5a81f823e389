# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Weights that are cut over two processes by FSDP2, on CPUs: `fsdp_runs.py` says how."""

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from tests import tiny
from tests.cli.processes import run_distributed
from tests.distributed.fsdp_runs import CASES, DETAILS, run_cases, run_details, train
from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer


NOT_COMPARED = ("_runtime", "_per_second", "rewards/accuracies")
FAST = ("iapo-sd", "cpo-sd-lora")  # of all weights with a reference of their own, and of adapters that share a forward


def prepare(folder: Path, names: list[str]) -> None:
    """Criteria, and an expert for each family that CPO trains."""
    (folder / "criteria.yaml").write_text(tiny.CRITERIA)
    for family in {CASES[name].family for name in names if CASES[name].method == "cpo"}:
        pipeline = tiny.PIPELINES[family]()
        settings = {**tiny.FAST, **tiny.settings(pipeline), "learning_rate": 0.05, "use_cpu": True}
        args = AttributeSFTConfig(str(folder / family), criteria=str(folder / "criteria.yaml"), **settings)
        expert = AttributeSFTTrainer(pipeline, args, train_dataset=tiny.paintings(), peft_config=tiny.lora(8, 16))
        expert.train()
        expert.save_model()


def two(mode: str, folder: Path, names: list[str]) -> list[dict[Any, Any]]:
    """What two processes end on."""
    for ended in run_distributed(["-m", "tests.distributed.fsdp_runs", mode, folder, *names]):
        assert ended.returncode == 0, ended.stderr
    return [torch.load(folder / f"{mode}-{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    """The same weights and logs, but for how long it took, and for which of two rewards is greater, where they are both rounded zeros."""
    assert tiny.max_difference(one["weights"], other["weights"]) <= tolerance
    for first, second in zip(one["logs"], other["logs"], strict=True):
        for name in first.keys():
            if not name.endswith(NOT_COMPARED):
                expected = pytest.approx(second[name], abs=max(tolerance, 1e-5), rel=max(5 * tolerance, 1e-4))
                assert first[name] == expected, name


def files_of(folder: Path) -> set[str]:
    """The files of a training but for the states of random numbers, of which each process has its own."""
    return {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "rng_state" not in path.name
    }


def saved_weights(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The denoiser's weights after plain diffusers has loaded what was saved, by the names that the policy gives them."""
    case = CASES[name]
    if not case.is_lora:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        return getattr(pipeline, "unet" if case.family in tiny.UNETS else "transformer").state_dict()
    pipeline = tiny.PIPELINES[case.family]()
    pipeline.load_lora_weights(folder, adapter_name="default")
    loaded = getattr(pipeline, "unet" if case.family in tiny.UNETS else "transformer").state_dict()
    return {f"base_model.model.{key}": value for key, value in loaded.items() if "lora_" in key}


def check(name: str, folder: Path, one: dict, sharded: list[dict], tolerance: float) -> None:
    """One case: that of one process, and what is saved, drawn and held in memory."""
    end, own = sharded[0][name], folder / "fsdp" / name
    assert_same(one[name], end, tolerance)
    assert tiny.max_difference(end["weights"], sharded[1][name]["weights"]) == 0
    assert tiny.max_difference(end["weights"], sharded[0][name, "resumed"]["weights"]) == 0

    assert files_of(own) == files_of(folder / "one" / name)
    saved = saved_weights(name, own)
    assert saved and all(torch.equal(value, end["weights"][key]) for key, value in saved.items())
    assert {key for key in end["weights"] if "lora_" in key and ".default." in key} <= saved.keys()

    drawn = sorted((own / "samples").iterdir())
    assert len(drawn) == 2
    if tolerance <= 1e-6:
        assert all(filecmp.cmp(path, folder / "one" / name / "samples" / path.name, shallow=False) for path in drawn)

    for local, whole in sharded[0][name]["bytes"] + sharded[1][name]["bytes"]:
        assert 0.45 < local / whole < 0.55


def test_two_processes_with_half_the_weights_each_are_one(tmp_path):
    """
    Sharded two processes = one process, in weights, logs and samples; resumed = uninterrupted; what is saved is what plain diffusers
    loads, with difference 0; each process holds half of policy and reference.
    """
    prepare(tmp_path, FAST)
    one, sharded = run_cases("one", tmp_path, FAST), two("fsdp", tmp_path, FAST)
    for name in FAST:
        check(name, tmp_path, one, sharded, tolerance=1e-6)


@pytest.mark.slow
def test_every_trainer_sharded_is_ddp_is_one(tmp_path):
    """The same of each trainer, a LoRA and all weights, a UNet and a transformer, in float32 and bf16; a run is resumed without shards too."""
    names = [name for name in CASES if name not in FAST]
    prepare(tmp_path, names)
    one, ddp, sharded = run_cases("one", tmp_path, names), two("ddp", tmp_path, names), two("fsdp", tmp_path, names)
    for name in names:
        check(name, tmp_path, one, sharded, tolerance=1e-2 if CASES[name].bf16 else 1e-6)
        assert_same(ddp[0][name], sharded[0][name], 1e-2 if CASES[name].bf16 else 1e-6)


@pytest.mark.slow
def test_what_else_a_sharded_run_does(tmp_path):
    """
    Equal to one process: evaluated before the training, the best checkpoint at the end, precomputed predictions of the reference, a sample
    model, AdamW; and a checkpoint that the other one wrote, resumed.
    """
    prepare(tmp_path, [])
    tiny.sd_pipeline(seed=1).save_pretrained(tmp_path / "other")
    one, sharded = run_details("one", tmp_path), two("details", tmp_path, [])[0]
    case, settings = DETAILS["adamw"]
    saved = tmp_path / "details" / "adamw" / "checkpoint-2"
    one["resumed"] = train(case, tmp_path / "one" / "resumed", tmp_path, saved, **settings)
    assert one.keys() == sharded.keys() == {*DETAILS, "resumed", "evaluated before"}
    assert sharded.pop("evaluated before") == pytest.approx(one.pop("evaluated before"), abs=1e-6)
    for name in one:
        assert_same(one[name], sharded[name], 1e-6)
    assert json.loads((tmp_path / "details" / "best" / "images" / "samples.json").read_text())


@pytest.mark.slow
def test_every_family_is_cut_right(tmp_path):
    """
    Of each flow transformer, all weights in float32 and a LoRA in float32 on a base in bfloat16: a sharded forward gives what it gave
    before, to the digit, and its gradient but for the order of sums.
    """
    for ended in run_distributed(["-m", "tests.distributed.fsdp_families", tmp_path]):
        assert ended.returncode == 0, ended.stderr
