# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The code on a model card, which runs as it is printed."""

import shlex
from collections.abc import Iterable

from .facts import ModelFacts
from .text import plain, python_string


WEIGHTS = "pytorch_lora_weights.safetensors"
UNNAMED = "the base model"  # of a LoRA on a pipeline that was made in memory


def base_of(facts: ModelFacts) -> str:
    """How commands and code name the base: its Hub id, or its folder's name."""
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
        lines = [f"pipeline = {_load(facts.model_id or facts.name, facts.loading_arguments)}"]
        return _program(facts, lines, facts.call_arguments)
    vae = "vae=vae, " if facts.vae else ""
    lines = [f"pipeline = {_load(base_of(facts), vae + facts.loading_arguments)}"]
    if facts.base_changes:
        changes = plain(" and ".join(facts.base_changes))
        lines.append(f"# The base was trained with {changes}: do that here, or the images are others")
    if facts.vae:
        folder = f"subfolder={python_string(facts.vae_subfolder)}, " if facts.vae_subfolder else ""
        arguments = folder + facts.loading_arguments.split(",")[0]
        lines.insert(0, f"vae = {facts.vae_class}.from_pretrained({python_string(facts.vae)}, {arguments})")
    if facts.base is None and facts.base_folder:
        folder = python_string(facts.base_folder)
        lines.insert(0, f"# The base is not on the Hub: {folder} is its folder, which must lie where this runs")
    return _program(facts, lines, facts.call_arguments, {facts.vae_class} if facts.vae else ())


def other_start(facts: ModelFacts) -> str | None:
    """The code that draws with the LoRA on another model than its base, such as a distilled sibling; `None` without any."""
    if not (facts.is_lora and facts.sample_model and facts.sample_arguments):
        return None
    lines = [f"pipeline = {_load(facts.sample_model, facts.loading_arguments)}"]
    return _program(facts, lines, facts.sample_arguments)


def _load(name: str, arguments: str) -> str:
    return f'AutoPipelineForText2Image.from_pretrained({python_string(name)}, {arguments}).to("cuda")'


def _program(facts: ModelFacts, loading: list[str], arguments: str, further: Iterable[str] = ()) -> str:
    guides = facts.is_lora and facts.is_reversed
    classes = sorted({"AutoPipelineForText2Image", *further})
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
    if facts.is_lora and facts.is_reversed:
        models = f"base={base} guided={base} --negative_loras guided={model}"
    else:
        models = f"base={base} trained={model}" + (f" --base_model {base}" if facts.is_lora else "")
    return (
        f"trl-diffusion evaluate --models {models} --prompts parti --metrics pickscore hpsv2 --output_dir evaluation"
    )


def export_command(facts: ModelFacts) -> str:
    """The command that writes a LoRA for ComfyUI and A1111."""
    return f"trl-diffusion export-lora {shlex.quote(facts.model_id or facts.name)} --output lora.safetensors"


def export_path(facts: ModelFacts) -> str:
    """Where the LoRA for ComfyUI and A1111 lies in the repository."""
    return f"comfyui/{(facts.model_id or facts.name).split('/')[-1]}.safetensors"
