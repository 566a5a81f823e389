# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The GPU suite, without a GPU."""

import argparse
import json
import os
import subprocess
import time
import tomllib
import venv
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from tests.gpu import __main__ as suite
from tests.gpu import fast, flops, quiet, right
from tests.gpu.__main__ import Stage
from tests.gpu.record import Record


ROOT = Path(__file__).parents[1]
WRITES = """
import json, sys
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output") + 1])
figure = {"what": "a figure", "figure": "7", "aim": "<= 8", "reached": True}
output.write_text(json.dumps({"figures": [figure]}))
"""
SLEEPS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
output.with_name("child").write_text(str(child.pid))
time.sleep(600)
"""


def test_a_stage_that_fails_or_outruns_its_limit_stops_no_other(tmp_path, monkeypatch):
    """What a stage wrote before its end stays, its processes end with it, and the next stages have their time."""
    sources = {"fails": "raise SystemExit(3)", "sleeps": WRITES + SLEEPS, "works": WRITES}
    modules, output = tmp_path / "modules", tmp_path / "output"
    modules.mkdir()
    for name, source in sources.items():
        (modules / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    monkeypatch.setattr(suite, "SHORTEST", 1.0)
    start = time.monotonic()
    stages = [Stage("fails", "fails", 1), Stage("sleeps", "sleeps", 1), Stage("works", "works", 8)]
    results = suite.walk(stages, output, budget=40, device="cuda", tiny=False)
    assert time.monotonic() - start < 40
    assert [result["exit"] for result in results] == [3, "time-out", 0]
    child = int((output / "child").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "a process outlived its stage"
    table = (output / "table.md").read_text()
    assert "| fails | 3 |" in table and "| sleeps | time-out |" in table
    assert "| sleeps | a figure | 7 | <= 8 | yes |" in table and "| works | a figure | 7 | <= 8 | yes |" in table
    assert "a figure | 7 | <= 8 | not applicable |" in suite.table(results, "cpu")
    assert {file.name for file in output.iterdir()} - {"child"} == {"sleeps.json", "works.json", "log.txt", "table.md"}


def test_no_stage_begins_without_time(tmp_path):
    """A budget that is used up leaves stages out, and says so."""
    results = suite.walk(suite.STAGES, tmp_path, budget=1, device="cpu", tiny=True)
    assert [(result["stage"], result["exit"]) for result in results] == [
        (name, "no time left") for name in ("right", "quiet", "quantized", "fast", "scoring")
    ]


def test_waits_are_counted_with_their_lines():
    """Reading numbers, masks as indices and `nonzero` count; a step of arithmetic and of plain indices does not."""
    counted = quiet.WaitingOperations()
    values = torch.arange(4.0)
    with counted:
        (values * 2)[torch.tensor([1, 2])].sum()
    assert not counted.lines
    with counted:
        values[1].item()
        values[values > 1]
        values[values > 1] = 0
        values.nonzero()
        torch.tensor([1.0], device="cpu")
        values.tolist()
    assert sum(counted.lines.values()) == 6 and all("test_gpu_suite.py" in line for line in counted.lines)


def test_warnings_of_waits_are_counted(monkeypatch):
    """PyTorch's warnings count with their line, each time; others do not, and what shows them is put back."""
    modes, shown = [], warnings.showwarning
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    counted = quiet.SyncWarnings()
    with counted:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert list(counted.lines.values()) == [2] and modes == ["warn", "default"] and warnings.showwarning is shown


def test_a_step_is_profiled_in_its_two_windows(monkeypatch):
    """On a GPU the windows of a training lie in the profile, one after the other, with the operators of the step."""
    profiled, make_trainer = [], quiet.make_trainer
    counts = lambda events, window: profiled.append((window, events)) or {}  # noqa: E731
    on_cpu = lambda *case, **kwargs: make_trainer(*case[:3], "fp32", "cpu", *case[5:], **kwargs)  # noqa: E731
    monkeypatch.setattr(quiet, "profiled_counts", counts)
    monkeypatch.setattr(quiet, "make_trainer", on_cpu)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    result = quiet.count("sft", "sd", True, [], "cuda")
    assert [window for window, _ in profiled] == list(quiet.WINDOWS) == list(result)
    events = profiled[0][1]
    first, second = (
        next(event for event in events if event.get("cat") == "user_annotation" and event["name"] == window)
        for window in quiet.WINDOWS
    )
    assert first["ts"] + first["dur"] <= second["ts"]
    forwards = [event for event in events if event["name"] == "aten::conv2d" and event["ts"] < second["ts"]]
    assert len(forwards) > quiet.MICRO_BATCHES


def test_a_case_that_fails_is_a_row(tmp_path):
    """The file is complete after each case: what did not fit into memory is no error, and what was left out is said."""
    args = argparse.Namespace(output=tmp_path / "x.json", device="cpu", tiny=True, seconds=100)
    record = Record(args, lambda rows: [])

    def fail(error: Exception):
        raise error

    record.run({"case": 1}, lambda: {"value": 7})
    record.run({"case": 2}, lambda: fail(torch.OutOfMemoryError("20 GiB")))
    record.run({"case": 3}, lambda: fail(ValueError("wrong")), needs=1)
    assert json.loads(args.output.read_text())["figures"][0]["figure"] == "1 of 3"
    record.run({"case": 4}, lambda: {"value": 8}, needs=1000)
    found = json.loads(args.output.read_text())
    assert [row.get("value", row.get("error")) for row in found["rows"]] == [
        *(7, "OutOfMemoryError: 20 GiB", "ValueError: wrong")
    ]
    assert [row.get("out_of_memory", False) for row in found["rows"]] == [False, True, False]
    assert found["skipped"][0]["case"] == 4 and found["setting"]["tiny"] is True


def test_the_profile_is_counted_within_a_window():
    """Waits and copies from or to memory that is not pinned count where they were called, those of pinned memory never."""

    def call(name: str, ts: int, number: int, copy: str | None = None) -> list[dict]:
        runtime = {"cat": "cuda_runtime", "name": name, "ts": ts, "args": {"correlation": number}}
        done = {"cat": "gpu_memcpy", "name": copy, "ts": ts + 90, "args": {"correlation": number}}
        return [runtime, done] if copy else [runtime]

    events = [
        {"cat": "user_annotation", "name": "micro-batches", "ts": 10, "dur": 20},
        {"cat": "gpu_user_annotation", "name": "micro-batches", "ts": 40, "dur": 20},
        *call("cudaStreamSynchronize", 5, 1),
        *call("cudaStreamSynchronize", 15, 2),
        *call("cudaMemcpyAsync", 16, 3, "Memcpy HtoD (Pageable -> Device)"),
        *call("cudaMemcpyAsync", 17, 4, "Memcpy HtoD (Pinned -> Device)"),
        *call("cudaMemcpyAsync", 35, 5, "Memcpy DtoH (Device -> Pageable)"),
        *call("cudaLaunchKernel", 18, 6),
    ]
    counts = quiet.profiled_counts(events, "micro-batches")
    assert counts == {"cudaStreamSynchronize": 1, "Memcpy HtoD (Pageable -> Device)": 1}


def test_arms_are_what_they_compute():
    """A cached reference saves a forward; diffusers' script has no reference; shares are known where the GPU is."""
    counts = flops.COUNTED["sdxl"]
    assert flops.arm_tflop("lora_ref_cached", counts) == flops.arm_tflop("diffusers_lora", counts) == counts["lora"]
    assert flops.arm_tflop("lora_live", counts) == counts["lora"] + counts["forward"]
    assert flops.arm_tflop("diffusion_dpo", counts) == flops.arm_tflop("full_cached", counts)
    assert flops.arm_tflop("inpo", counts) is flops.arm_tflop("inversion_policy_cached", counts) is None
    # 989 TFLOP a second: half of a second's in a second is half
    assert flops.share_of_peak(494.5, 1.0, "NVIDIA H100 80GB HBM3") == 0.5
    assert flops.share_of_peak(494.5, 1.0, "NVIDIA H100 PCIe") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", flops.SHAPES)
def test_what_was_counted_is_counted_again(name):
    """The recorded TFLOP are those of the models."""
    counted = flops.count_model(name)
    assert counted == pytest.approx(flops.COUNTED[name], rel=1e-6)


def row(**changes) -> dict:
    return {
        **{"model": "sdxl", "batch_size": 4, "is_checkpointed": True, "arm": "lora_cached", "ratio_to_floor": 1.04},
        **{"ratio_to_yardstick": 2.0, "share_of_peak": 0.41, "tflop_per_second": 400.0, "peak_memory_gib": 20.0},
        **changes,
    }


def test_aims_are_judged():
    """Each aim is reached by figures at it and missed by figures beyond it."""
    good = [
        row(),
        row(batch_size=1, peak_memory_gib=11.1, share_of_peak=0.9),  # 11.9 GB; two samples do not count for the share
        row(arm="diffusers_lora", ratio_to_yardstick=3.7, ratio_to_floor=9.0),
        row(model="sd15", share_of_peak=0.25),
        row(batch_size=8, error="OutOfMemoryError", out_of_memory=True),
    ]
    found = {figure["what"]: figure for figure in fast.figures(good)}
    reached = {what: figure["reached"] for what, figure in found.items()}
    assert reached == {
        "cached step / floor": True,
        "sdxl, LoRA: share of the bf16 peak": True,
        "sd15, LoRA: share of the bf16 peak": True,
        "SDXL, LoRA, 1024 px: peak memory of a step": True,
        "time of diffusers' LoRA script / ours": True,
        "did not fit into memory": None,
    }
    assert "41.0%" in found["sdxl, LoRA: share of the bf16 peak"]["figure"]
    assert "1.85" in found["time of diffusers' LoRA script / ours"]["figure"]
    bad = [
        row(ratio_to_floor=1.06, share_of_peak=0.39),
        row(arm="diffusers_lora", ratio_to_yardstick=3.5),
        row(model="sd15", share_of_peak=None),
    ]
    missed = {figure["what"]: figure["reached"] for figure in fast.figures(bad)}
    assert missed.pop("sd15, LoRA: share of the bf16 peak") is None  # an unknown GPU
    assert missed and not any(missed.values())
    assert fast.did_not_fit(row(batch_size=16), good) and not fast.did_not_fit(row(batch_size=4), good)


def test_half_precision_and_black_pictures_are_judged():
    """A loss beyond its precision's tolerance is a failure, and so is a picture of one colour."""
    rows = [
        {"what": "compare", "precision": precision, "difference": difference, "is_equal": difference <= tolerance}
        | {"first_loss_is_ln_2": True, "sample_is_picture": True}
        for precision, difference, tolerance in (("fp32", 9e-5, 1e-4), ("bf16", 0.06, 0.05))
    ]
    reached = {figure["what"][:4]: figure["reached"] for figure in right.figures(rows)}
    assert reached["fp32"] is True and reached["bf16"] is False
    assert not right.is_picture(torch.full((8, 8, 3), 7).numpy()) and right.is_picture(torch.eye(8).numpy() * 255)


@pytest.mark.parametrize("objective", right.OTHERS)
def test_the_suite_trains_the_other_objectives(objective):
    """A device that is the CPU gives the CPU's losses, from the loss of the reference on, and no micro-batch waits."""
    compared = right.compare(objective, "sd", True, "fp32", None, "cpu")
    assert compared["difference"] == 0 and compared["first_loss_is_ln_2"] and compared["sample_is_picture"]
    assert quiet.count(objective, "sd", True, [], "cpu")["micro-batches"]["waits"] == 0


def needed(names: list[str]) -> set[str]:
    """The installed packages that these need, the names in their requirements, without any extras."""
    found: set[str] = set()
    while names:
        requirement = Requirement(names.pop())
        name = requirement.name.lower().replace("_", "-")
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            names += metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
    return found


def bare_python(folder: Path) -> Path:
    """A Python that has what the package needs, and neither its extras nor the package."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in needed(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_the_suite_walks_through_without_a_gpu(tmp_path):
    """
    In a checkout that is not installed, beside the packages that the package needs and no others, every stage ends well, and its
    rows say what they should.
    """
    python, output = bare_python(tmp_path / "venv"), tmp_path / "output"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for module in ("pytest", "bitsandbytes", "torchmetrics", "matplotlib", "ray"):  # else nothing is shown below
        assert subprocess.run([python, "-c", f"import {module}"], capture_output=True, env=variables).returncode == 1
    command = [python, "-m", "tests.gpu", "--output", output, "--device", "cpu", "--tiny", "--budget", "900"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert result.returncode == 0, result.stdout + result.stderr + (output / "log.txt").read_text()[-5000:]
    stages = {
        name: json.loads((output / f"{name}.json").read_text())
        for name in ("right", "quiet", "quantized", "fast", "scoring")
    }
    assert {file.name for file in output.iterdir()} == {*(f"{name}.json" for name in stages), "log.txt", "table.md"}
    table = (output / "table.md").read_text()
    assert table in result.stdout and all(f"| {name} | 0 |" in table for name in stages)
    assert not [row for stage in stages.values() for row in stage["rows"] if "error" in row]
    assert all(row["is_equal"] for row in stages["right"]["rows"])
    assert [row["difference"] for row in stages["right"]["rows"] if row.get("precision") == "fp32"] == [0, 0, 0, 0]
    assert all("skipped" in case for case in stages["right"]["skipped"]) and stages["right"]["skipped"]
    # The check before the optimizer's step reads one number
    assert [row["optimizer step"]["waits"] for row in stages["quiet"]["rows"]] == [1, 1]
    assert [row["arm"] for row in stages["fast"]["rows"]] == ["lora_cached", "diffusers_lora", "lora_live"]
    assert stages["scoring"]["rows"][-1]["pairs_per_second"] > 0
    assert (output / "log.txt").read_text().count("=====") == 2 * len(stages)
