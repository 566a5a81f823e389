# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The Space is a folder of files that import one another by name, as the Hub runs them."""

from pathlib import Path

import pytest


SPACE = Path(__file__).parents[2] / "examples" / "space"


@pytest.fixture(autouse=True)
def space_modules(monkeypatch):
    """Puts the Space's folder on the path."""
    monkeypatch.syspath_prepend(str(SPACE))
