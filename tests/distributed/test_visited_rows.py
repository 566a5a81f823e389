# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import torch

from tests.cli.processes import run_distributed
from tests.distributed.visited_rows import CASES, RESUMED


NUMBERS = {"a batch of one": 4, "accumulation": 8, "to the end": 9, "global batches": 4, "buckets": 8}


def test_what_two_processes_visit_together_is_what_is_encoded(tmp_path):
    """Neither process visits a row that is not encoded, no row is encoded that none visits, and both find all of them."""
    for ended in run_distributed(["-m", "tests.distributed.visited_rows", tmp_path]):
        assert ended.returncode == 0, ended.stderr
    one, other = (torch.load(tmp_path / f"process-{rank}.pt", weights_only=False) for rank in (0, 1))
    assert one.keys() == {*CASES, "resumed"}
    for case in CASES:
        visited = {row for steps in (one[case]["steps"], other[case]["steps"]) for step in steps for row in step}
        assert one[case]["encoded"] == other[case]["encoded"], case
        assert visited == set(one[case]["encoded"]) and len(visited) == NUMBERS.get(case, len(visited)), case
    assert set(one[RESUMED]["noised"]) == set(one[RESUMED]["encoded"]) != set(one["data_seed"]["encoded"])
    for process in (one, other):
        assert process["resumed"]["encoded"] == process[RESUMED]["encoded"]
        assert process["resumed"]["steps"] == process[RESUMED]["steps"][1:]
