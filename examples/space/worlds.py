# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the Space shows: the embedded models, data and trainings, or those that environment variables name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trl_diffusion.quickstart.cpo import CRITERIA
from trl_diffusion.quickstart.sampling import SAMPLING, shipped


EMBEDDED = Path(__file__).parent / "embedded"  # made by prepare.py
DEFAULT_PROMPTS = (
    "a harbor at dusk, fishing boats, oil painting",
    "a portrait of an old fisherman, soft window light",
    "two cats and a red ball on a wooden floor",
    "a glass of water on a stack of books",
    "a street market in the rain, watercolor",
    "a fox in the snow",
)


@dataclass(frozen=True)
class World:
    """
    A base model and the LoRAs that are compared on it.

    Args:
        title (`str`):
            Its name in the interface.
        base (`str`):
            The base model, a Hub id or a folder.
        loras (`dict[str, str]`):
            The LoRAs, Hub ids or folders, by the title of their column.
        prompts (`tuple[str, ...]`):
            The prompts that can be clicked.
        reversed_lora (`str`, *optional*):
            A LoRA that was trained with `reverse_preference`, for negative preference guidance.
        num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*):
            Settings of the sampling. Default to the pipeline's.
        is_tiny (`bool`, *optional*, defaults to `False`):
            Whether the model is one of the embedded ones, which are loaded in float32.
    """

    title: str
    base: str
    loras: dict[str, str]
    prompts: tuple[str, ...]
    reversed_lora: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    is_tiny: bool = False


@dataclass(frozen=True)
class Settings:
    """
    All that the Space shows.

    Args:
        worlds (`tuple[World, ...]`):
            The models of the first tab.
        pairs (`str` or `None`), paintings (`str` or `None`):
            Datasets of the second tab, Hub ids, folders or files; `None` for the embedded ones.
        criteria (`str`):
            The tree of attributes, a file or the name of a shipped tree.
        trainings (`dict[str, str]`):
            Folders or Hub ids with a `trainer_state.json`, by their titles.
    """

    worlds: tuple[World, ...]
    pairs: str | None
    paintings: str | None
    criteria: str
    trainings: dict[str, str]


def embedded_worlds() -> tuple[World, World]:
    """The scenes, for IAPO, and the paintings, for CPO."""
    sampling = {name: SAMPLING[name] for name in ("num_inference_steps", "guidance_scale")}
    scenes = World(
        title="Scenes: IAPO",
        base=shipped("base_pipeline"),
        loras={"Diffusion-DPO": str(EMBEDDED / "scenes-dpo"), "IAPO": str(EMBEDDED / "scenes-iapo")},
        prompts=(
            "a green triangle and a yellow circle",
            "a blue square and a red triangle",
            "a red circle and a blue square",
            "a yellow triangle and a green square",
            "a blue circle and a yellow triangle",
            "a red square and a green circle",
        ),
        reversed_lora=str(EMBEDDED / "scenes-reversed"),
        is_tiny=True,
        **sampling,
    )
    paintings = World(
        title="Paintings: CPO",
        base=shipped("painting_base"),
        loras={"SFT on the best": str(EMBEDDED / "paintings-sft"), "CPO": str(EMBEDDED / "paintings-cpo")},
        prompts=("a red circle", "a blue square", "a green triangle", "a yellow square", "a blue circle"),
        reversed_lora=str(EMBEDDED / "paintings-reversed"),
        is_tiny=True,
        **sampling,
    )
    return scenes, paintings


def read_settings(environment: Mapping[str, str]) -> Settings:
    """
    Reads the environment variables that README.md describes. What is not set is embedded.

    Args:
        environment (`Mapping[str, str]`):
            The variables.

    Returns:
        [`Settings`]

    Raises:
        `ValueError`: If LoRAs are set without their base, a base without a LoRA, or a training has no title.
    """
    value = {name: text.strip() for name, text in environment.items() if text.strip()}
    loras = {
        title: value[name]
        for title, name in (("Diffusion-DPO", "DPO_LORA"), ("Aligned", "ALIGNED_LORA"))
        if name in value
    }
    if "BASE_MODEL" in value:
        if not loras:
            raise ValueError("`BASE_MODEL` is set, but no LoRA to compare it with: set `DPO_LORA` or `ALIGNED_LORA`.")
        prompts = tuple(line.strip() for line in value.get("PROMPTS", "").splitlines() if line.strip())
        worlds = (
            World(
                title=value["BASE_MODEL"],
                base=value["BASE_MODEL"],
                loras=loras,
                prompts=prompts or DEFAULT_PROMPTS,
                reversed_lora=value.get("REVERSED_LORA"),
            ),
        )
    elif set_alone := [name for name in ("DPO_LORA", "ALIGNED_LORA", "REVERSED_LORA", "PROMPTS") if name in value]:
        raise ValueError(f"`{set_alone[0]}` is set without `BASE_MODEL`, the model that it belongs to: set both.")
    else:
        worlds = embedded_worlds()
    return Settings(
        worlds=worlds,
        pairs=value.get("PAIRS_DATASET"),
        paintings=value.get("PAINTINGS_DATASET"),
        criteria=value.get("CRITERIA", "painting" if "PAINTINGS_DATASET" in value else CRITERIA),
        trainings=read_trainings(value["TRAININGS"]) if "TRAININGS" in value else embedded_trainings(),
    )


def embedded_trainings() -> dict[str, str]:
    """The trainings of the embedded LoRAs."""
    return {
        f"{world.title.split(':')[0]}, {title}": folder
        for world in embedded_worlds()
        for title, folder in world.loras.items()
    }


def read_trainings(text: str) -> dict[str, str]:
    """Reads lines like `IAPO = user/sdxl-iapo`."""
    trainings = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        title, equals, name = map(str.strip, line.partition("="))
        if not (title and equals and name):
            raise ValueError(f"`TRAININGS` has the line {line!r}: write `title = folder or Hub id`, one a line.")
        trainings[title] = name
    return trainings
