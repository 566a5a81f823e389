# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A builder that is killed at any moment builds, by the same command, what one builds that was not, and leaves nothing beside it."""

from pathlib import Path

import pytest

from tests.datasets_builders import sources
from tests.kills.commands import code
from tests.kills.killing import changes, contents, finish, kill_at


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Annotated pairs, and the dataset that is built of them undisturbed."""
    folder = tmp_path_factory.mktemp("world")
    sources.annotate_pairs(sources.pairs(4), folder / "annotations")
    sources.save(folder / "source", train=sources.pairs(4))
    finish(building(folder, folder / "whole" / "out"))
    return folder


def building(world: Path, out: Path) -> list:
    return code("build", world / "source", world / "annotations", out)


def kill_and_compare(world: Path, parent: Path, number: int) -> None:
    out = parent / "out"
    assert kill_at(building(world, out), parent, number), number
    finish(building(world, out))
    assert contents(parent) == contents(world / "whole")
    assert [path.name for path in parent.iterdir()] == ["out"]


@pytest.mark.parametrize("share", [0.5, 0.97])
def test_killed_at_a_change(world, tmp_path, share):
    """Killed while it builds, and after the dataset has its name, the same command completes it."""
    made = changes(building(world, tmp_path / "listed" / "out"), tmp_path / "listed")
    kill_and_compare(world, tmp_path / "killed", int(share * len(made)))


@pytest.mark.slow
def test_killed_at_every_change(world, tmp_path):
    """The same at each of the changes that a builder makes beside its folder, as far as it has not ended."""
    made = changes(building(world, tmp_path / "listed" / "out"), tmp_path / "listed")
    for number in range(1, len(made) + 1):
        kill_and_compare(world, tmp_path / f"killed-{number}", number)
