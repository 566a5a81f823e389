# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import pytest

from .__main__ import changes, run


STEPS = 5000


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["iapo", "cpo, logging off"])
def test_nothing_grows_in_thousands_of_steps(arm):
    """After the warm-up memory grows by less than 2 %, and no file, thread or tensor is added."""
    result = run(arm, STEPS)
    assert len(result["notes"]) == 100
    assert result["memory_growth"] < 0.02
    assert result["more_files"] <= 0 and result["more_threads"] <= 0
    assert result["more_tensors"] < 20  # those of the steps that are looked at; one kept a step would be thousands


def test_growth_is_told():
    """A tensor more in each note, and memory that grows by a tenth from the second fifth to the last."""
    note = {"files": 6, "threads": 5, "steps_per_second": 8.0}
    told = changes([{**note, "memory": 1000 + index, "tensors": index} for index in range(100)])
    assert told["more_tensors"] == 60 and told["more_files"] == told["more_threads"] == 0
    assert told["memory_growth"] == pytest.approx(60 / 1029.5)
    assert told["throughput"] == 1
