# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Denoisers that others published without the other parts of their pipeline."""

from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download

from ..backbones.folder_checks import check_component, read_index, read_json
from ..backbones.weights import check_loading_info, reason_of
from ..revisions import pinned
from .kinds import DENOISERS, denoiser_folder


FILES = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index.json")
WAY_OUT = "Pass the pipeline that it was trained from as `base_model`."


def load_denoiser(
    path: str, revision: str, base: str, base_revision: str, dtype: torch.dtype
) -> dict[str, torch.nn.Module]:
    """
    Loads a denoiser that is to be in the place of a base pipeline's.

    Args:
        path (`str`):
            A folder or Hub id with a folder `unet` or `transformer`, or such a folder itself.
        revision (`str`):
            Its commit on the Hub, or its hash.
        base (`str`):
            Folder or Hub id of the base pipeline.
        base_revision (`str`):
            Commit or hash of the base.
        dtype (`torch.dtype`):
            Precision of the weights.

    Returns:
        `dict[str, torch.nn.Module]`: the denoiser, by its name in the pipeline.

    Raises:
        `ValueError`: If it cannot be loaded, its weights are not whole, or it is another model than the base's denoiser.
    """
    index = read_index(base, pinned(base_revision))
    name = next((part for part in DENOISERS if part in index), None)
    if name is None:
        raise ValueError(f"{base} has no denoiser in whose place {path} could be. {WAY_OUT}")
    wanted = index[name][1]
    folder = _folder_of(path, revision)
    check_component(folder)
    kind = read_json(folder / "config.json").get("_class_name")
    if kind != wanted:
        raise ValueError(f"{path} holds a `{kind}`, and the denoiser of {base} is a `{wanted}`. {WAY_OUT}")
    denoiser_class = getattr(diffusers, wanted)
    try:
        denoiser, info = denoiser_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise ValueError(f"The denoiser {path} cannot be loaded: {reason_of(error)}") from error
    check_loading_info(info, f"The denoiser {path}")
    with init_empty_weights():
        own = denoiser_class.from_config(
            denoiser_class.load_config(base, subfolder=name, **pinned(base_revision))
        ).state_dict()
    loaded = denoiser.state_dict()
    shapes = {key: (key in own and own[key].shape, key in loaded and loaded[key].shape) for key in own | loaded}
    if different := [key for key, (first, second) in shapes.items() if first != second]:
        raise ValueError(
            f"The denoiser {path} has other weights than that of {base}: {len(different)} differ in shape, such as {different[0]}. "
            f"{WAY_OUT}"
        )
    return {name: denoiser}


def _folder_of(path: str, revision: str) -> Path:
    """The folder with the denoiser's files, downloaded if needed, and no pickles with them."""
    folder = Path(path)
    if not folder.is_dir():
        patterns = [f"{part}{name}" for part in ("", *(f"{x}/" for x in DENOISERS)) for name in FILES]
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    names = {file.relative_to(folder).as_posix() for pattern in ("*", "*/*") for file in folder.glob(pattern)}
    return folder / (denoiser_folder(names) or "")
