# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
NAMED = re.findall(r"`([\w/]+\.py)` \((\d+) lines\)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_the_page_names_files():
    """The check below does not pass for want of files."""
    assert len(NAMED) >= 6


@pytest.mark.parametrize(("path", "lines"), NAMED)
def test_the_files_are_as_long_as_the_page_says(path, lines):
    """A line count of CONTRIBUTING.md is the file's."""
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) == int(lines)
