# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""An annotation run that is killed at any moment ends, by the same command, as one that was not, and asks no shard twice but the last."""

from pathlib import Path

import pytest

from tests.kills.commands import code
from tests.kills.killing import changes, contents, finish, kill_at


NUM_ROWS = 10  # three shards, the last of two rows


@pytest.fixture(scope="module", params=["memory", "stream"])
def undisturbed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(annotation(folder / "out", request.param))
    return request.param, folder / "out"


def annotation(output_dir: Path, streaming: str) -> list:
    return code("annotate", output_dir, output_dir.with_suffix(".log"), NUM_ROWS, streaming)


def asked(output_dir: Path) -> int:
    return sum(int(line.split()[1]) for line in output_dir.with_suffix(".log").read_text().splitlines())


def kill_and_compare(undisturbed, out: Path, number: int) -> None:
    streaming, whole = undisturbed
    assert kill_at(annotation(out, streaming), out, number), number
    finish(annotation(out, streaming))
    kept = lambda folder: contents(folder, lambda name: not name.endswith((".lock", ".stream_state.json")))  # noqa: E731
    assert kept(out) == kept(whole)
    assert not list(out.rglob("*.tmp"))
    assert asked(out) <= asked(whole) * 1.8  # one shard of four rows, and what was asked of the next one


@pytest.mark.parametrize("number", [4, 11])
def test_killed_at_a_change(undisturbed, tmp_path, number):
    """Killed right before a change of its folder, the same command completes it."""
    kill_and_compare(undisturbed, tmp_path / "out", number)


@pytest.mark.slow
def test_killed_at_every_change(undisturbed, tmp_path):
    """The same at each of the changes that a run makes in its folder."""
    made = changes(annotation(tmp_path / "listed", undisturbed[0]), tmp_path / "listed")
    assert len(made) > 20
    for number in range(1, len(made) + 1):
        kill_and_compare(undisturbed, tmp_path / f"out-{number}", number)
