# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Runs the tests with the oldest and with the newest versions that the package allows, each in an environment of its own.

```bash
python -m tests.versions oldest newest --folder ENVIRONMENTS --output docs/source/benchmarks/versions.json
python -m tests.versions newest --folder ENVIRONMENTS --python python3.13 --tests tests/golden tests/trainer
```

*Oldest* is the lower bound of each dependency in `pyproject.toml`, those of its tests included; *newest* is what pip takes without
`constraints.txt`. An environment that is there already is brought up to date. The result names the versions, and counts the tests.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement


ROOT = Path(__file__).parents[2]
STATED = ("torch", "diffusers", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub")
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|error)")
# The trainers, what their numbers are, and each door to another library
TESTS = (
    *("tests/golden", "tests/versions", "tests/trainer", "tests/families", "tests/hub", "tests/data", "tests/cli"),
    *(
        "tests/evaluation/test_generate.py",
        "tests/evaluation/test_models.py",
        "tests/annotation",
        "tests/test_lora_files.py",
    ),
)


def requirements(project: dict[str, Any]) -> list[Requirement]:
    """What the package and its tests depend on, without the package itself."""
    texts = project["dependencies"] + project["optional-dependencies"]["test"]
    return [requirement for text in texts if (requirement := Requirement(text)).name != project["name"]]


def lower_bounds(project: dict[str, Any]) -> list[str]:
    """A line for pip's constraints for each dependency that has a lower bound: exactly this version."""
    lines = []
    for requirement in requirements(project):
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        lines += [f"{requirement.name}=={bounds[0]}"] if bounds else []
    return sorted(set(lines))


def install(end: str, folder: Path, python: str) -> Path:
    """Makes or updates an environment. Returns its Python."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    own = folder / "bin" / "python"
    pip = [str(own), "-m", "pip", "install", "--quiet"]
    arguments = ["--upgrade", "--upgrade-strategy", "eager"]
    if end == "oldest":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        bounds = folder / "oldest.txt"
        bounds.write_text("\n".join(lower_bounds(project)) + "\n")
        arguments = ["--constraint", str(bounds)]
    subprocess.run([*pip, *arguments, "--editable", f"{ROOT}[test]"], check=True)
    return own


def run(end: str, own: Path, tests: list[str], workers: int) -> dict[str, Any]:
    """The versions of an environment, and how the tests end in it."""
    code = f"import json, platform; from importlib.metadata import version; names = {STATED!r}; "
    code += "print(json.dumps({'python': platform.python_version()} | {name: version(name) for name in names}))"
    versions = json.loads(subprocess.run([own, "-c", code], check=True, capture_output=True, text=True).stdout)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(own), "-m", "pytest", "-q", "-n", str(workers), "-p", "no:cacheprovider", "--tb=short", *tests]
    ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(ended.stdout, flush=True)
    lines = ended.stdout.strip().splitlines() or [""]
    counts = {name: int(number) for number, name in COUNTS.findall(lines[-1])}
    failures = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"end": end, "versions": versions, "tests": counts, "failures": failures, "status": ended.returncode}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.versions")
    parser.add_argument("ends", nargs="+", choices=["oldest", "newest"])
    parser.add_argument("--folder", type=Path, required=True, help="The environments go here.")
    parser.add_argument(
        "--python", default=sys.executable, help="The Python of the environments. Defaults to this one."
    )
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="Files and folders of tests.")
    parser.add_argument("--workers", type=int, default=2, help="Processes that run tests.")
    parser.add_argument("--output", type=Path, help="JSON file with the results, to which these are added.")
    args = parser.parse_args()
    results = []
    for end in args.ends:
        name = f"{end}-{Path(args.python).name}"
        results.append(run(end, install(end, args.folder.resolve() / name, args.python), args.tests, args.workers))
        if args.output:
            write(args.output, results[-1])
    for result in results:
        told = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        counted = ", ".join(f"{number} {name}" for name, number in result["tests"].items())
        print(f"{result['end']}: {told}: {counted}")
    sys.exit(any(result["status"] for result in results))


def write(file: Path, result: dict[str, Any]) -> None:
    """Adds a result to a file, in the place of one of the same end and Python."""
    kept = json.loads(file.read_text()) if file.exists() else []

    def environment(entry: dict[str, Any]) -> tuple[str, ...]:
        return entry["end"], *entry["versions"]["python"].split(".")[:2]

    kept = [entry for entry in kept if environment(entry) != environment(result)]
    file.write_text(json.dumps([*kept, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
