# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Names of models and files that are known without opening anything."""

import re
from pathlib import Path


METADATA_FILE = "metadata.jsonl"
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
ON_A_BASE = ("lora", "denoiser")  # kinds of models that are drawn with the other parts of a base
HUB_FILE = re.compile(r"([\w-][\w.-]*/[\w.-]+)/(.+\.safetensors)")


def is_image(path: Path) -> bool:
    """Whether a file has an image suffix."""
    return path.suffix.lower() in IMAGE_TYPES


def repository_of(where: str) -> str:
    """The repository of a file on the Hub, which is named `user/name/file.safetensors`; any other name as it is."""
    on_hub = None if Path(where).exists() else HUB_FILE.fullmatch(where)
    return on_hub[1] if on_hub else where
