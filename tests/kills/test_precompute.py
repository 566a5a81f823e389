# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Precomputing that is killed, and the same command again: the files of an undisturbed run, and no finished file made twice."""

import shutil
import time
from pathlib import Path

import pytest

from tests.kills.killing import changes, contents, finish, kill_after, kill_at, times


ROWS = """
import sys
from pathlib import Path
import datasets, torch
from datasets import Dataset, Features, Value
from trl_diffusion.data import caching

root = Path(sys.argv[1])
datasets.config.HF_DATASETS_CACHE = root / "datasets"
caching.ROWS_PER_FILE = 4

def encode(rows):
    with (root.parent / f"{root.name}.log").open("a") as log:
        log.write("".join(f"{row['value']}\\n" for row in rows))
    return [{"id": row["id"], "tensor": torch.full((1000,), float(row["value"]))} for row in rows]

dataset = Dataset.from_dict({"id": [f"row-{index}" for index in range(10)], "value": list(range(10))})
caching.precompute_dataset(dataset, encode, Features({"id": Value("string")}), "rows", "abc", root / "cache", 2)
"""


def rows(root: Path) -> list:
    root.mkdir(parents=True, exist_ok=True)
    return ["-c", ROWS, root]


def encoded(root: Path) -> list[int]:
    log = root.parent / f"{root.name}.log"
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.slow
def test_precomputing_that_is_killed_at_any_change_goes_on(tmp_path):
    """At each file that is opened, written, renamed or made; what is finished is not encoded again, and nothing is left over."""
    listed = changes(rows(tmp_path / "whole"), tmp_path / "whole")
    whole = contents(tmp_path / "whole" / "cache")
    assert len(whole) == 3 and len(listed) >= 3 * 2 + 2
    for number in range(1, len(listed) + 1):
        root = tmp_path / f"killed-{number}"
        assert kill_at(rows(root), root, number)
        files = sorted((root / "cache").glob("*.arrow"))
        states = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files]
        before = len(encoded(root))
        finish(rows(root))
        assert contents(root / "cache") == whole, listed[number - 1]
        assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in files] == states
        made = {row for row in range(10) if any(f"-{row // 4:05d}-" in path.name for path in files)}
        again = encoded(root)[before:]
        assert set(again[1:] or again) == set(range(10)) - made and len(again) == (
            11 - len(made) if len(made) < 10 else 0
        )
        assert not list(root.rglob("*.tmp"))


TRAINER = """
import sys
from pathlib import Path
import datasets
from tests import tiny
from tests.trainer.test_precompute import iapo
from trl_diffusion.data import caching

root = Path(sys.argv[1])
datasets.config.HF_DATASETS_CACHE = root / "datasets"
caching.ROWS_PER_FILE = 4
settings = {"noise_source": "inversion", "inversion_steps": 2, "prompt_dropout": 0.5, "max_steps": 20}
iapo(root, dataset=tiny.pairs(20), per_device_eval_batch_size=2, **settings)
print("precomputed")
"""


@pytest.mark.slow
def test_a_trainers_precomputing_that_is_killed_at_random_goes_on(tmp_path):
    """Images, prompts and inversions, killed ten times in one folder: the files are those of an undisturbed run, byte for byte."""
    args = {name: ["-c", TRAINER, tmp_path / name] for name in ("whole", "killed")}
    finish(["-c", "pass"])  # starts what processes are forked from
    start = time.monotonic()
    finish(args["whole"])
    taken = time.monotonic() - start
    whole = contents(tmp_path / "whole" / "cache")
    assert {name.split("-")[0] for name in whole} == {"images", "prompts", "noised"}
    killed = 0
    for duration in times(40, 0.2 * taken, 0.95 * taken):
        if kill_after(args["killed"], duration):
            killed += 1
        else:  # it was done before: another one begins
            assert contents(tmp_path / "killed" / "cache") == whole
            shutil.rmtree(tmp_path / "killed")
        if killed == 10:
            break
    finish(args["killed"])
    assert contents(tmp_path / "killed" / "cache") == whole and killed == 10
    assert not list((tmp_path / "killed").rglob("*.tmp"))
