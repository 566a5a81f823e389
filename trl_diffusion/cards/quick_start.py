# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The code on a model card, which runs as it is printed."""

import shlex
from collections.abc import Iterable

from .facts import ModelFacts
from .text import HUB, plain, python_string, quoted


AUTO = "AutoPipelineForText2Image"
WEIGHTS = "pytorch_lora_weights.safetensors"
UNNAMED = "the base model"  # of a LoRA on a pipeline that was made in memory


def base_of(facts: ModelFacts) -> str:
    """How commands and code name the base: its Hub id, the link of its file, or the name of its folder."""
    if facts.base and facts.base_file:
        return f"{HUB}/{facts.base}/blob/{facts.base_revision or 'main'}/{quoted(facts.base_file)}"
    return facts.base or facts.base_folder or UNNAMED


def quick_start(facts: ModelFacts) -> str:
    """
    The code that draws an image: with the base and the LoRA on it, or with the whole pipeline that was trained.

    Args:
        facts ([`cards.facts.ModelFacts`]):
            The facts.

    Returns:
        `str`: a program in Python.
    """
    if not facts.is_lora:
        return _program(
            facts, [_load(AUTO, facts.model_id or facts.name, facts.loading_arguments)], facts.call_arguments
        )
    base, vae = base_of(facts), "vae=vae, " if facts.vae else ""
    is_file = base.endswith((".safetensors", ".ckpt"))
    pipeline_class = facts.pipeline_class if is_file else AUTO
    lines = []
    if facts.base is None:
        what = "file" if is_file else "folder"
        lines.append(
            f"# The base is not on the Hub: {python_string(base)} stands for its {what}, which must lie where this runs"
        )
    if facts.vae:
        folder = f"subfolder={python_string(facts.vae_subfolder)}, " if facts.vae_subfolder else ""
        arguments = folder + facts.loading_arguments.split(",")[0]
        lines.append(f"vae = {facts.vae_class}.from_pretrained({python_string(facts.vae)}, {arguments})")
    lines.append(_load(pipeline_class, base, vae + facts.loading_arguments, is_file))
    if facts.base_changes:
        changes = plain(" and ".join(facts.base_changes))
        lines.append(f"# The base was trained with {changes}: do that here, or the images are others")
    classes = [*([facts.vae_class] if facts.vae else []), pipeline_class]
    return _program(facts, lines, facts.call_arguments, classes)


def other_start(facts: ModelFacts) -> str | None:
    """The code that draws with the LoRA on another model than its base, such as a distilled sibling; `None` without any."""
    if not (facts.is_lora and facts.sample_model and facts.sample_arguments):
        return None
    return _program(facts, [_load(AUTO, facts.sample_model, facts.loading_arguments)], facts.sample_arguments)


def _load(pipeline_class: str, name: str, arguments: str, is_file: bool = False) -> str:
    method = "from_single_file" if is_file else "from_pretrained"
    return f'pipeline = {pipeline_class}.{method}({python_string(name)}, {arguments}).to("cuda")'


def _program(facts: ModelFacts, loading: list[str], arguments: str, classes: Iterable[str] = (AUTO,)) -> str:
    guides = facts.is_lora and facts.is_reversed
    lines = ["import torch", f"from diffusers import {', '.join(classes)}"]
    if guides:
        lines.append("from trl_diffusion import negative_preference_guidance")
    lines += ["", *loading]
    if facts.is_lora:
        name = ', adapter_name="reversed"' if guides else ""
        lora = python_string(facts.model_id or facts.name)
        lines.append(f'pipeline.load_lora_weights({lora}, weight_name="{WEIGHTS}"{name})')
    draw = f"image = pipeline(prompt={python_string(facts.example_prompt)}, {arguments}).images[0]"
    if guides:
        lines += ['with negative_preference_guidance(pipeline, positive=None, negative="reversed"):', f"    {draw}"]
    else:
        lines.append(draw)
    return "\n".join(lines)


def evaluation_command(facts: ModelFacts) -> str:
    """The command that compares the model with its base."""
    base, model = shlex.quote(base_of(facts)), shlex.quote(facts.model_id or facts.name)
    models = [f"--models base={base} trained={model}", *([f"--base_model {base}"] if facts.is_lora else [])]
    if facts.is_lora and facts.is_reversed:
        models = [f"--models base={base} guided={base}", f"--negative_loras guided={model}"]
    flags = [*models, "--prompts parti --metrics pickscore hpsv2", "--output_dir evaluation"]
    return " \\\n    ".join(["trl-diffusion evaluate", *flags])


def export_command(facts: ModelFacts) -> str:
    """The command that writes a LoRA for ComfyUI and A1111."""
    return f"trl-diffusion export-lora {shlex.quote(facts.model_id or facts.name)} --output lora.safetensors"


def export_path(facts: ModelFacts) -> str:
    """Where the LoRA for ComfyUI and A1111 lies in the repository."""
    return comfyui_path((facts.model_id or facts.name).split("/")[-1])


def comfyui_path(model_name: str) -> str:
    """
    Where the LoRA for ComfyUI and A1111 lies in the repository of a name. It does not end as the LoRA itself, which
    `load_lora_weights("user/name")` of diffusers finds by that.
    """
    return f"comfyui/{model_name}{'-comfyui' if model_name.endswith('pytorch_lora_weights') else ''}.safetensors"
