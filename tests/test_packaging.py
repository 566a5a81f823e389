# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is published: a source distribution that holds everything, a wheel, and a page on PyPI without dead links."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta as backend, sys; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
LEFT_OUT = {".git", ".venv", ".pytest_cache", ".ruff_cache", "build", "dist", "trl_diffusion.egg-info"}
NOT_SHIPPED = {".gitignore"}


def build(kind: str, source: Path, folder: Path) -> Path:
    command = [sys.executable, "-c", BUILD, kind, str(folder)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / result.stdout.splitlines()[-1]


def files_of(folder: Path) -> set[str]:
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in paths if path.parts[0] not in LEFT_OUT and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution of a copy of the repository, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "repository"
    for name in files_of(ROOT):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / name)
    with tarfile.open(build("build_sdist", copy, folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def test_the_source_distribution_is_the_repository(sdist):
    """Package, tests, docs, examples, builders and constraints are all in it, so that it builds and tests elsewhere."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = set(tracked.stdout.splitlines()) if tracked.returncode == 0 else files_of(ROOT)
    missing = {name for name in names if (ROOT / name).exists()} - files_of(sdist) - NOT_SHIPPED
    assert len(names) > 300 and not missing


def test_the_wheel_holds_the_package_and_nothing_else(sdist, tmp_path):
    """A wheel that is built from the source distribution holds every file of `trl_diffusion/`, and no tests."""
    with zipfile.ZipFile(build("build_wheel", sdist, tmp_path)) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name for name in files_of(sdist) if name.startswith("trl_diffusion/")}
    assert {name for name in names if "/accelerate_configs/" in name} == {
        f"trl_diffusion/accelerate_configs/{name}.yaml"
        for name in ("fsdp2", "multi_cpu", "multi_gpu", "single_gpu", "two_nodes", "zero2", "zero3")
    }


def test_the_page_on_pypi_has_no_dead_links(sdist):
    """In the description are only links to the web and within the page, and its text is that of the README."""
    description = (sdist / "PKG-INFO").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert "## See it work" in description and "![" not in description
    assert "[Two commands]" in (sdist / "README.md").read_text(encoding="utf-8")
    assert "Two commands" in description
