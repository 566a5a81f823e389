# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Reading the weights of a single file, and what is wrong with one that cannot be read."""

import json
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import load_single_file_checkpoint


def read_checkpoint(path: str) -> dict[str, torch.Tensor]:
    """
    Reads the weights of a single file, a `.ckpt` without running any code.

    Args:
        path (`str`):
            The file.

    Returns:
        `dict[str, torch.Tensor]`: the weights by their names.

    Raises:
        `ValueError`: If the file cannot be read, or its weights cannot be used as they are.
    """
    try:
        checkpoint = load_single_file_checkpoint(path)
    except Exception as error:  # whatever a damaged file makes torch and safetensors raise
        raise ValueError(f"{path} cannot be read: {_damage(Path(path))}") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(weight, torch.Tensor) for weight in checkpoint.values()):
        checkpoint = {key: weight for key, weight in dict(checkpoint).items() if isinstance(weight, torch.Tensor)}
    scaled = [key for key in checkpoint if key.endswith(("scaled_fp8", ".scale_weight", ".weight_scale", ".absmax"))]
    whole_numbers = [
        key for key, weight in checkpoint.items() if weight.dtype in (torch.int8, torch.uint8) and weight.ndim > 1
    ]
    if scaled or whole_numbers:
        raise ValueError(
            f"{path} holds quantized weights ({(scaled or whole_numbers)[0]}), which mean nothing without their scales. Pass the file in "
            "float32, bfloat16, float16 or plain float8."
        )
    return checkpoint


def _damage(path: Path) -> str:
    """Why a file cannot be read, and what to do."""
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(200)
    text = beginning.decode("utf-8", errors="replace").strip()
    if not size:
        return "it is empty. Download it again."
    if text.startswith("<"):
        return "it is a web page, such as that of a login, and no model. Log in where it comes from, and download it again."
    if text.startswith("version https://git-lfs"):
        return "it is a pointer of git-lfs in place of the file. Run `git lfs pull` in its folder."
    if text.startswith("{"):
        return f"it is the message of a server and no model: {text[:100]} Download it again."
    if path.suffix == ".ckpt":
        return (
            "it is damaged, or holds more than weights, which could be code and is not loaded. Download it again, or use its "
            ".safetensors file."
        )
    header = int.from_bytes(beginning[:8], "little")
    if header + 8 >= size:
        return f"it is cut off within its first {header + 8:,} bytes, or no .safetensors file. Download it again."
    with path.open("rb") as file:
        file.seek(8)
        try:
            entries = json.loads(file.read(header))
        except ValueError:
            return "it is no .safetensors file. Download it again."
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    return f"it is damaged, with {size:,} bytes in place of {8 + header + max(ends, default=0):,}. Download it again."
