# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The description on PyPI, which has no files of the repository: links to them become text, and pictures are left out."""

import re
from pathlib import Path

from setuptools import setup


def description(readme: str) -> str:
    """The README without pictures and without links to files."""
    readme = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", readme)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\)", r"\1", readme)


setup(
    long_description=description((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
