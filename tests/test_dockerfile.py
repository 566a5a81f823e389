# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The Dockerfile, read without Docker: what it copies, installs and starts."""

import fnmatch
import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from trl_diffusion.cli.main import COMMANDS, script_of


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INSTRUCTIONS = {
    *("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN"),
    *("SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
}


class Instruction(NamedTuple):
    name: str
    text: str


def read_dockerfile(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile, with continued lines put together."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


STEPS = read_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))


def of(name: str) -> list[str]:
    """What stands behind an instruction, each time that it is used."""
    return [step.text for step in STEPS if step.name == name]


def last(name: str) -> str:
    return of(name)[-1]


def is_ignored(path: str, patterns: list[str]) -> bool:
    """Whether `.dockerignore` leaves a file out: of the patterns that fit it or a folder above it, the last one decides."""
    above = [path, *map(str, PurePosixPath(path).parents)][:-1]
    ignored = False
    for pattern in patterns:
        name = pattern.removeprefix("!")
        forms = [name, name.removeprefix("**/")]
        if any(fnmatch.fnmatchcase(part, form) for part in above for form in forms):
            ignored = not pattern.startswith("!")
    return ignored


def context() -> set[str]:
    """The files that a build may read, of all that lie in the repository and of some that must not be read."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    files = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in (".git", ".venv")]
        files += [(Path(folder) / name).relative_to(ROOT).as_posix() for name in names]
    secrets = [".git/config", ".venv/bin/python", ".env", "quickstart/report.md", "trl_diffusion/__pycache__/x.pyc"]
    return {path for path in [*files, *secrets] if not is_ignored(path, patterns)}


def copied() -> list[str]:
    """What is copied, without the targets."""
    return [source for text in of("COPY") for source in shlex.split(text)[:-1]]


def test_instructions_are_known():
    """Each is one of Docker's, the first chooses one release of Debian, and each `RUN` is a command that a shell can read."""
    assert {step.name for step in STEPS} <= INSTRUCTIONS and len(of("RUN")) >= 4
    assert STEPS[0] == Instruction("FROM", "debian:12-slim") and not of("ADD")
    for command in of("RUN"):
        assert subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True).stderr == ""


def test_the_build_reads_what_it_copies_and_nothing_else():
    """Every file that is copied exists and is not ignored; of a repository with secrets and results no other file is read."""
    files = context()
    for source in copied():
        assert source in files or (ROOT / source).is_dir()
    named = {path for path in files if path in copied()}
    package = {path for path in files if path.startswith("trl_diffusion/")}
    assert files == named | package and named == set(copied()) - {"trl_diffusion"}
    present = {p.relative_to(ROOT).as_posix() for p in (ROOT / "trl_diffusion").rglob("*") if p.is_file()}
    assert package == {path for path in present if "__pycache__" not in path} and len(package) > 200


def test_everything_is_pinned():
    """Each `pip install` takes the versions of `constraints.txt`, or installs this package and nothing else; none keeps a cache."""
    installs = [part for text in of("RUN") for part in text.split("&&") if "pip install" in part]
    assert len(installs) == 3
    for install in installs:
        package = shlex.split(install)[-1]
        assert "--no-cache-dir" in install
        assert ("-c constraints.txt" in install) == (package != ".") and ("--no-deps" in install) == (
            package != ".[evaluation]"
        )
    assert [shlex.split(install)[-1] for install in installs] == ["torch", ".[evaluation]", "."]


def test_one_argument_chooses_the_build_of_pytorch():
    """It is the index of PyTorch's CPU wheels unless a build says otherwise, and the one thing that a build can choose."""
    assert of("ARG") == ['TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"']
    (install,) = [text for text in of("RUN") if "TORCH_INDEX" in text]
    assert "--no-deps $TORCH_INDEX" in install and install.endswith(" torch") and "--no-deps" in install


def test_the_extras_exist():
    """What is installed beside the package is an extra of it."""
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', " ".join(of("RUN")))
    assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


def test_it_starts_as_the_readme_does():
    """Without words behind the image, the command is the quickstart of README.md; with words, these are a command."""
    (line,) = [
        line for line in README.splitlines() if line.endswith("trl-diffusion quickstart --output_dir quickstart")
    ]
    started = json.loads(last("ENTRYPOINT")) + json.loads(last("CMD"))
    assert line.endswith(f".venv/bin/{shlex.join(started)}")
    assert json.loads(last("ENTRYPOINT")) == list(PROJECT["project"]["scripts"]) and started[1] in COMMANDS
    script_of(started[1]).make_parser().parse_args_and_config(started[2:])


def test_results_are_of_an_ordinary_user_in_a_volume():
    """The last user is not root; it owns the folder where commands run, which is its home and the volume."""
    assert STEPS[-1].name == "CMD" and of("USER") == ["user"]
    assert last("WORKDIR") == last("VOLUME") == "/results" and "HOME=/results" in of("ENV")
    assert re.search(r"useradd .*--home-dir /results .*user\b", of("RUN")[0])
    assert "install -d -o user -g user /results" in of("RUN")[0]
    order = [step.name for step in STEPS]
    assert max(n for n, name in enumerate(order) if name == "RUN") < order.index("USER") < order.index("VOLUME")
