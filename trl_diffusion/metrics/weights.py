# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Published weights: found or fetched, and read so that every tensor is accounted for."""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file

from trl_diffusion.revisions import commit_of, digest_of_file


def fetch_file(repo_id: str, filename: str, revision: str | None = None) -> tuple[Path, str]:
    """
    A file of a Hub repository, from the cache or over the network.

    Args:
        repo_id (`str`):
            The repository.
        filename (`str`):
            The file in it.
        revision (`str`, *optional*):
            Branch, tag or commit.

    Returns:
        `tuple[Path, str]`: where it is, and the commit.

    Raises:
        `ValueError`: If it cannot be had; says which file, from where, and how to fetch it.
    """
    try:
        path = Path(hf_hub_download(repo_id, filename, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"The weights {filename} of https://huggingface.co/{repo_id} are not in the cache, and could not be fetched: "
            f"{str(error).splitlines()[0]} Where the network is, run `hf download {repo_id} {filename}`, and bring the Hub's "
            "cache along (`HF_HOME`)."
        ) from error
    return path, commit_of(path, filename)


def local_file(path: str | Path) -> tuple[Path, str]:
    """
    A file of weights on the disk.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `tuple[Path, str]`: the file, and a digest of it in the place of a revision.

    Raises:
        `ValueError`: If there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file of weights at {path}.")
    return path, digest_of_file(path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    Reads a file of weights.

    Args:
        path (`Path`):
            A file of safetensors, or of PyTorch, from which nothing but tensors is read. A state dict under the key
            `state_dict` is taken out.

    Returns:
        `dict[str, torch.Tensor]`: the state dict.

    Raises:
        `ValueError`: If it is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise what their parsers raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds no state dict.")
    return content.get("state_dict", content)


def load_tensors(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """
    Loads a state dict into a module, and every tensor of both is accounted for.

    Args:
        module (`torch.nn.Module`):
            The module.
        tensors (`Mapping[str, torch.Tensor]`):
            Its tensors, by the module's names.
        source (`str`):
            Where they are from, for the message.

    Raises:
        `ValueError`: If a tensor is missing, or left over, or has another shape.
    """
    expected = module.state_dict()
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = sorted(name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape)
    for names, what in (
        (missing, "lacks"),
        (unexpected, "has, and the model does not,"),
        (shapes, "has other shapes for"),
    ):
        if names:
            raise ValueError(
                f"{source} is no file of this metric: it {what} {', '.join(names[:5])}"
                f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}."
            )
    module.load_state_dict(tensors)
