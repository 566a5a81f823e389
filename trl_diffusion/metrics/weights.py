# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Finds or downloads published weights, and loads them with a check of every tensor."""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file

from trl_diffusion.revisions import commit_of, digest_of_file


def fetch_file(repo_id: str, filename: str, revision: str | None = None) -> tuple[Path, str]:
    """
    Finds a file of a Hub repository in the cache, or downloads it.

    Args:
        repo_id (`str`):
            The repository.
        filename (`str`):
            The file in it.
        revision (`str`, *optional*):
            Branch, tag or commit.

    Returns:
        `tuple[Path, str]`: the local path and the commit.

    Raises:
        `ValueError`: If the file cannot be downloaded, with the command that downloads it.
    """
    try:
        path = Path(hf_hub_download(repo_id, filename, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"The weights {filename} of https://huggingface.co/{repo_id} are not in the cache and could not be downloaded: "
            f"{str(error).splitlines()[0]} Run `hf download {repo_id} {filename}` on a machine with network access and copy "
            "its Hub cache (`HF_HOME`) here."
        ) from error
    return path, commit_of(path, filename)


def local_file(path: str | Path) -> tuple[Path, str]:
    """
    Finds a local file of weights.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `tuple[Path, str]`: the file, and its hash, which serves as revision.

    Raises:
        `ValueError`: If there is no such file.
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
            A safetensors or PyTorch file. Of a PyTorch file, only tensors are read. A state dict may be nested under
            the key `state_dict`.

    Returns:
        `dict[str, torch.Tensor]`: the state dict.

    Raises:
        `ValueError`: If the file cannot be read, or has no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the parsers of torch and safetensors raise many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as weights: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} contains no state dict.")
    return content.get("state_dict", content)


def load_tensors(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """
    Loads a state dict into a module, and checks that both have the same tensors.

    Args:
        module (`torch.nn.Module`):
            The module.
        tensors (`Mapping[str, torch.Tensor]`):
            The state dict.
        source (`str`):
            Source of the tensors, for the message.

    Raises:
        `ValueError`: If a tensor is missing, unexpected, or has another shape.
    """
    expected = module.state_dict()
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    shapes = sorted(name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape)
    for names, what in (
        (missing, "lacks"),
        (unexpected, "has the unexpected tensors"),
        (shapes, "has other shapes for"),
    ):
        if names:
            raise ValueError(
                f"{source} does not fit the model of this metric: it {what} {', '.join(names[:5])}"
                f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}."
            )
    module.load_state_dict(tensors)
