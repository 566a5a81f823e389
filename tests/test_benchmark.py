# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.benchmark import arms
from tests.benchmark.__main__ import comparisons, parse_args, summary
from tests.benchmark.arms import ARMS, FLOOR_ARMS, Benchmark


ROOT = Path(__file__).parents[1]


def run(module: str, *args: str) -> str:
    result = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_arm_is_broken(monkeypatch):
    """One step of one pair of each arm, on a toy model, asks the frozen models as often as its algorithm says."""
    monkeypatch.setattr(arms, "build_pipeline", lambda *args: tiny.sd_pipeline())
    args = parse_args(["--model", "tiny", "--device", "cpu", "--steps", "1", "--warmup", "0", "--lora_rank", "1"])
    benchmark = Benchmark(args)
    assert args.arms == ARMS
    results = {name: summary(name, benchmark.run(name), benchmark) for name in ARMS}
    # In the middle of the schedule: 6 steps of an inversion, of the published one too, and the reference where there is one
    inverting = {name: 7 for name in ARMS if name.startswith("inversion_") and ("policy" in name or "live" in name)}
    others = dict.fromkeys(ARMS, 0) | dict.fromkeys(
        [*FLOOR_ARMS, "full_live", "full_cached", "lora_live", "lora_cached", "diffusion_dpo"], 1
    )
    forwards = {name: result["no_grad_forwards_per_image"] for name, result in results.items()}
    assert forwards == others | inverting | {"inpo": 7}
    assert all(ratio > 0 for ratio in comparisons(results).values()) and len(comparisons(results)) == 16


def test_scripts_are_of_unets(capsys):
    """A model without a UNet has every arm but the scripts', and a script that is asked for is refused by name."""
    args = parse_args(["--model", "sd35_medium", "--device", "cpu"])
    assert set(ARMS) - set(args.arms) == {"diffusion_dpo", "inpo", "diffusers_lora"}
    with pytest.raises(SystemExit):
        parse_args(["--model", "sd35_medium", "--device", "cpu", "--arms", "floor", "inpo"])
    assert "`--model sd35_medium` has no arms inpo" in capsys.readouterr().err


@pytest.mark.slow
def test_every_arm_runs_on_the_tiny_model(tmp_path):
    """The command measures each arm, the forwards without gradient of each are what its algorithm needs, and JSON holds all."""
    out = run(
        "tests.benchmark", "--model", "tiny", "--device", "cpu", "--batch_size", "2", "--steps", "2",
        "--warmup", "0", "--output", str(tmp_path / "out.json"),
    )  # fmt: skip
    found = json.loads((tmp_path / "out.json").read_text())
    forwards = {result["arm"]: result["no_grad_forwards_per_image"] for result in found["results"]}
    # Timesteps 250 and 750: 3 and 8 steps of an inversion, 4 and 9 of the published one
    assert forwards == {
        "floor": 1, "floor_lora": 1, "full_live": 1, "full_cached": 1, "lora_live": 1, "lora_cached": 1,
        "full_ref_cached": 0, "lora_ref_cached": 0,
        "inversion_reference_live": 6.5, "inversion_reference_cached": 0, "inversion_reference_cached_lora": 0,
        "inversion_policy_live": 6.5, "inversion_policy_cached": 6.5, "inversion_policy_cached_lora": 6.5,
        "diffusion_dpo": 1, "inpo": 7.5, "diffusers_lora": 0,
    }  # fmt: skip
    assert all(f"| {arm} |" in out for arm in forwards)
    assert all(ratio > 0 for ratio in found["comparisons"].values()) and len(found["comparisons"]) == 16


@pytest.mark.slow
def test_the_computed_memory_counts_what_is_there(tmp_path):
    """On a small UNet the counted bytes are the sums of parameters and of tensors saved for the backward."""
    run("tests.benchmark.memory", "--output", str(tmp_path / "memory.json"))
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["check"]["weights_counted"] == found["check"]["weights_summed"] > 0
    assert found["check"]["activations_counted"] == found["check"]["activations_saved_for_backward"] > 0
    sdxl, sd15 = found["results"]
    # Four bytes a weight of the policy, and little more than two of the reference
    assert 6 * 859_520_964 / 2**30 < sd15["weights_gib"] < 6.05 * 859_520_964 / 2**30
    assert sdxl["total_gib"] < 16 and sd15["total_gib"] < 24
