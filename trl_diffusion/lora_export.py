# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A LoRA with the names that ComfyUI and A1111 read."""

import math
from collections import Counter
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import save

from .files import write_file
from .lora_files import find_lora, read_lora, read_tensors


# Settings of a LoRA that no such file can hold
NOT_EXPORTED = {
    "use_dora": "a DoRA, whose magnitudes diffusers leaves out of such files",
    "lora_bias": "a LoRA with biases, which such files have no place for",
    "use_bdlora": "a block-diagonal LoRA, which such files have no place for",
}


def export_lora(lora: str | Path, output: str | Path) -> Path:
    """
    Writes a LoRA a second time, as programs beside diffusers read it; `pipeline.load_lora_weights` reads this file too.

    - Stable Diffusion 1 and 2, SDXL: the names of kohya's scripts, `lora_unet_....lora_down.weight`, `.lora_up.weight` and `.alpha`, for
      ComfyUI and A1111.
      Where layers have different alphas, their ratio to the most common one is in `lora_up`.
    - FLUX.1: `transformer....lora_A.weight`, `.lora_B.weight` and `.alpha`, for ComfyUI.
    - Stable Diffusion 3, of which diffusers reads no `.alpha`, Z-Image, FLUX.2, and a LoRA of FLUX.1 without its single blocks, which has the
      names of Stable Diffusion 3: `lora_A` and `lora_B` alone, for ComfyUI, with the scale in `lora_B`.

    What goes into the weights is exact where it is a power of two, and else rounded to float32.

    Args:
        lora (`str` or `Path`):
            Folder or Hub id of a LoRA that was trained here, or that diffusers saved with its configuration.
        output (`str` or `Path`):
            The new file, which ends in `.safetensors`.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: If the LoRA cannot be read, or cannot be written so that these programs apply the same update.

    Example:

    ```python
    from trl_diffusion import export_lora

    export_lora("sdxl-cpo", "sdxl-cpo-comfyui.safetensors")
    ```
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"`output` must be a file that ends in .safetensors, got {str(output)!r}.")
    path = find_lora(lora)
    if output.resolve() == path.resolve():
        raise ValueError(f"`output` is the LoRA itself, {path}. Name another file.")
    weights, config = read_lora(lora)
    for setting, what in NOT_EXPORTED.items():
        if getattr(config, setting):
            raise ValueError(
                f"The LoRA {path} is {what}: another program would draw other images. Train a plain LoRA."
            )
    weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    modules = {key.rpartition(".lora_A")[0] for key in weights if key.endswith(".lora_A.weight")}
    alphas = {module: _alpha(config, module) for module in modules}
    if not all(alpha and math.isfinite(alpha) for alpha in alphas.values()):
        raise ValueError(
            f"The LoRA {path} has an alpha of {min(alphas.values(), key=abs)}, with which it is of no use. Name another."
        )
    if any(module.startswith("transformer_blocks.") and ".attn1." in module for module in modules):
        raise ValueError(
            f"The LoRA {path} is one of Sana, for which ComfyUI and A1111 have no names. Load it with diffusers."
        )
    is_unet = next(iter(read_tensors(path)[0])).startswith("unet.")
    exported = _kohya(weights, alphas, path) if is_unet else _transformer(weights, alphas)
    write_file(output, save(exported, {"format": "pt"}))
    return output


def _alpha(config: LoraConfig, module: str) -> float:
    """The alpha by which a program that scales by `alpha / rank` scales as peft does."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(ranks, module), config.r)
    alpha = alphas.get(get_pattern_key(alphas, module), config.lora_alpha)
    return alpha / math.sqrt(rank) * rank if config.use_rslora else alpha


def _as_tensor(alpha: float) -> torch.Tensor:
    """In float32, or where that would round it in float64."""
    value = torch.tensor(alpha, dtype=torch.float32)
    return value if value.item() == alpha else torch.tensor(alpha, dtype=torch.float64)


def _kohya(weights: dict[str, torch.Tensor], alphas: dict[str, float], path: Path) -> dict[str, torch.Tensor]:
    exported, names = {}, {}
    common = Counter(alphas.values()).most_common(1)[0][0]  # diffusers knows one alpha for the layers of attention
    for module, alpha in alphas.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        exported[f"{name}.lora_down.weight"] = weights[f"{module}.lora_A.weight"].contiguous()
        exported[f"{name}.lora_up.weight"] = _scaled(weights[f"{module}.lora_B.weight"], alpha / common)
        exported[f"{name}.alpha"] = _as_tensor(common)
        names[name] = module
    for (
        name,
        module,
    ) in names.items():  # points and underscores are one there: whether diffusers finds the module again
        layer = {key: value for key, value in exported.items() if key.startswith(f"{name}.")}
        converted, _ = StableDiffusionPipeline.lora_state_dict(layer)
        read = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in converted.items()})
        if read.keys() != {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}:
            raise ValueError(
                f"The LoRA {path} adapts {module!r}, whose name diffusers does not read out of such a file. Train a LoRA without this "
                "module in `target_modules`."
            )
    return exported


def _transformer(weights: dict[str, torch.Tensor], alphas: dict[str, float]) -> dict[str, torch.Tensor]:
    exported = {f"transformer.{key}": value.contiguous() for key, value in weights.items()}
    # Those of FLUX.2 have other layers than those of FLUX.1
    is_flux = any(
        module.startswith("single_transformer_blocks.")
        and not module.endswith((".attn.to_qkv_mlp_proj", ".attn.to_out"))
        for module in alphas
    )
    for module, alpha in alphas.items():
        if is_flux:
            exported[f"transformer.{module}.alpha"] = _as_tensor(alpha)
            continue
        key = f"transformer.{module}.lora_B.weight"
        exported[key] = _scaled(exported[key], alpha / weights[f"{module}.lora_A.weight"].shape[0])
    return exported


def _scaled(weight: torch.Tensor, scale: float) -> torch.Tensor:
    """A power of two changes no digit; any other number is multiplied in float32."""
    is_power_of_two = math.frexp(scale)[0] == 0.5
    return ((weight if is_power_of_two else weight.float()) * scale).contiguous()
