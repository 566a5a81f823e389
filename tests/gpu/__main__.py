# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Is this library right, quiet and fast on a GPU? One command, which stops in time:

    python -m tests.gpu --output DIR [--budget 480]                 on a GPU
    python -m tests.gpu --output DIR --device cpu --tiny            walks through all of it without one

Run it from the repository's root; the package need not be installed. The stages, in the order of their worth:

    right     every trainer and family, tiny: three steps on the GPU are those on the CPU
    quiet     host waits and blocking copies between optimizer steps
    quantized bases of 4 and 8 bits: loading, memory beside what is computed, first losses, resuming
    fast      time, memory and share of the peak of steps at true size, beside their floor and the published scripts
    scoring   images a second of the scorers, and what a 7B vision-language model answers a second

Each is a process of its own with a time limit, its share of what is left. `DIR` gets one JSON file a stage, complete after
each case, so that what was measured outlives a failure; `log.txt`; and `table.md`, which is printed at the end.
"""

import argparse
import compileall
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).parents[2]
SHORTEST = 10.0  # seconds that a stage needs to import what it uses


@dataclass(frozen=True)
class Stage:
    """A module that is run, its share of the budget, and variables of its environment."""

    name: str
    module: str
    share: float
    environment: dict[str, str] = field(default_factory=dict)


STAGES = [
    # A comparison with the CPU is one of float32, not of TF32; and cuBLAS gives equal sums to equal inputs
    Stage("right", "tests.gpu.right", 25, {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    Stage("quiet", "tests.gpu.quiet", 15),
    Stage("quantized", "tests.gpu.quantized", 15, {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    Stage("fast", "tests.gpu.fast", 45),
    Stage("scoring", "tests.gpu.scoring", 15),
]


def installation(folder: Path) -> None:
    """Writes what the package asks of its installation, its version, for a checkout that is not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"trl_diffusion-{project['version']}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )


def environment(folder: Path) -> dict[str, str]:
    """The environment of the stages: modules are found here, and nothing is fetched."""
    path = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *path, str(folder)]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_stage(stage: Stage, arguments: list[str], limit: float, log: Path, variables: dict[str, str]) -> dict:
    """
    Runs a stage, and ends it with all its processes when its time is over.

    Returns:
        `dict`: `exit`, the exit code or `"time-out"`, and `seconds`.
    """
    start = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n===== {stage.name}, at most {limit:.0f} s =====\n")
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", stage.module, *arguments, "--seconds", str(limit)],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=variables | stage.environment,
            start_new_session=True,  # so that its own processes end with it
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = "time-out"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    return {"stage": stage.name, "exit": code, "seconds": round(time.monotonic() - start, 1)}


def walk(stages: list[Stage], output: Path, budget: float, device: str, tiny: bool) -> list[dict]:
    """
    Runs the stages one after another, each with its share of the time that is left.

    Returns:
        `list[dict]`: `stage`, `exit`, `seconds`, and what the stage's JSON file says: its `figures`.
    """
    output.mkdir(parents=True, exist_ok=True)
    log, start, results = output / "log.txt", time.monotonic(), []
    log.write_text("")
    with tempfile.TemporaryDirectory() as name:
        installation(Path(name))
        for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
            if folder and Path(folder).resolve() != ROOT:
                compileall.compile_dir(folder, quiet=2, workers=0)  # at once, and not in the first stage
        variables = environment(Path(name))
        for index, stage in enumerate(stages):
            left = budget - (time.monotonic() - start)
            limit = left * stage.share / sum(later.share for later in stages[index:])
            file = output / f"{stage.name}.json"
            file.unlink(missing_ok=True)  # of an earlier run
            if limit < SHORTEST:
                result = {"stage": stage.name, "exit": "no time left", "seconds": 0.0}
            else:
                arguments = ["--output", str(file), "--device", device, *(["--tiny"] if tiny else [])]
                result = run_stage(stage, arguments, limit, log, variables)
            result["figures"] = json.loads(file.read_text())["figures"] if file.exists() else []
            results.append(result)
            (output / "table.md").write_text(table(results, device))
            print(f"{stage.name}: exit {result['exit']} after {result['seconds']} s", flush=True)
    return results


def table(results: list[dict], device: str) -> str:
    """The results as Markdown: the stages, then their figures beside their aims."""
    lines = ["| stage | exit | seconds |", "|---|---|---|"]
    lines += [f"| {result['stage']} | {result['exit']} | {result['seconds']} |" for result in results]
    lines += ["", "| stage | figure | | aim | reached |", "|---|---|---|---|---|"]
    for result in results:
        for figure in result["figures"]:
            aim, reached = figure["aim"] or "-", {True: "yes", False: "no", None: "-"}[figure["reached"]]
            if figure["aim"] and device == "cpu":
                reached = "not applicable"  # aims are those of a GPU
            lines.append(f"| {result['stage']} | {figure['what']} | {figure['figure']} | {aim} | {reached} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder for the files, at most 6.")
    parser.add_argument("--budget", type=float, default=480, help="Seconds for all stages together.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="Where to run.")
    parser.add_argument("--tiny", action="store_true", help="Tiny models and few cases in every stage.")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="Which stages to run.")
    args = parser.parse_args()
    stages = [stage for stage in STAGES if stage.name in args.stages]
    results = walk(stages, args.output.resolve(), args.budget, args.device, args.tiny)
    print(table(results, args.device))
    if any(result["exit"] != 0 for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
