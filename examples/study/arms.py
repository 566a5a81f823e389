# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the study does to the two base models: its arms, and how one of them is run with one seed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image

from trl_diffusion.guidance import negative_preference_guidance
from trl_diffusion.quickstart import cpo, iapo
from trl_diffusion.quickstart.experiment import FAST
from trl_diffusion.quickstart.models import MODELS, model_of
from trl_diffusion.quickstart.paintings import painting_dataset, sample_painting
from trl_diffusion.quickstart.sampling import generate, load_pipeline
from trl_diffusion.quickstart.world import evaluation_prompts, preference_dataset
from trl_diffusion.trainer.attribute_sft_config import AttributeSFTConfig
from trl_diffusion.trainer.attribute_sft_trainer import AttributeSFTTrainer
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer


@dataclass(frozen=True)
class Arm:
    """
    What is done to the base before it generates images.

    Args:
        title (`str`):
            Its name in tables and pictures.
        settings (`dict`, *optional*):
            What the trainer's config gets. `None`: nothing is trained.
        kind (`str`, *optional*, defaults to `"preference"`):
            `"preference"`, or `"sft"` for fine-tuning on the better images.
        negative (`tuple[str, ...]`, *optional*):
            The arms whose adapters are added up in the unconditional branch of guidance.
        positive (`str`, *optional*):
            The arm whose adapter is used in the conditional branch of guidance, together with `negative`.
    """

    title: str
    settings: dict[str, Any] | None = None
    kind: str = "preference"
    negative: tuple[str, ...] = ()
    positive: str | None = None


@dataclass(frozen=True)
class Sizes:
    """
    How large the runs of a study are, and where they are written.

    Args:
        output_dir (`str`):
            Folder of the study.
        num_rows (`int`):
            Pairs, and paintings, to train on.
        max_steps (`int`):
            Optimizer steps of each training.
        num_samples (`int`):
            Images that each arm generates.
        model (`str`):
            The kind of model, see [`quickstart.models.MODELS`].
    """

    output_dir: str
    num_rows: int
    max_steps: int
    num_samples: int
    model: str = "unet"


INVERSION = {"noise_source": "inversion"}
SCENES = {
    "base": Arm("base"),
    "sft": Arm("SFT on the chosen", {}, kind="sft"),
    "dpo": Arm("Diffusion-DPO", {"w_neg": 1.0}),
    **{
        f"{overlap}_{w_neg}": Arm(
            f"IAPO, {'covering, ' if overlap == 'covering' else ''}w_neg {w_neg}",
            {"w_neg": w_neg, "mask_overlap": overlap},
        )
        for overlap in ("mean", "covering")
        for w_neg in (0.5, 0.0, -0.5)
    },
    "dpo_inversion": Arm("Diffusion-DPO, inversion", {"w_neg": 1.0, **INVERSION}),
    "mean_0.0_inversion": Arm("IAPO, w_neg 0.0, inversion", {"w_neg": 0.0, **INVERSION}),
    "covering_0.0_inversion": Arm(
        "IAPO, covering, w_neg 0.0, inversion", {"w_neg": 0.0, "mask_overlap": "covering", **INVERSION}
    ),
}


def npo_forms(name: str) -> dict[str, tuple[str, ...]]:
    """What the unconditional branch of an aligned arm gets: the reversed adapter on the base, or on the aligned one, as released."""
    return {"base": ("reversed",), "aligned": (name, "reversed")}


PAINTINGS = {
    "base": Arm("base"),
    "sft": Arm("SFT on the best", {}, kind="sft"),
    "cpo": Arm("CPO", {"loss_type": "unstabilized"}),
    **{
        f"{targets}_{strength}": Arm(
            f"CPO-S, {'paired, ' if targets == 'paired' else ''}strength {strength}",
            {"attribute_targets": targets, "target_strength": strength},
        )
        for targets in ("present", "paired")
        for strength in (1.0, 2.0, 4.0)
    },
    "reversed": Arm(
        "CPO-S, paired, strength 2.0, reversed",
        {"attribute_targets": "paired", "target_strength": 2.0, "reverse_preference": True},
    ),
    "base_npo": Arm("base + NPO", negative=("reversed",)),
    **{
        f"{name}_npo_{form}": Arm(f"{title} + NPO, {form} + reversed", negative=negative, positive=name)
        for name, title in (("present_1.0", "CPO-S, strength 1.0"), ("paired_2.0", "CPO-S, paired, strength 2.0"))
        for form, negative in npo_forms(name).items()
    },
}


def run_scene(name: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Trains the base on pairs as an arm of `SCENES` says, generates images, and scores them."""
    arm, pipeline = SCENES[name], load_pipeline(MODELS[sizes.model].scenes)
    record = {}
    if arm.settings is not None:
        pairs = preference_dataset(sizes.num_rows, seed=seed)
        settings = shared_settings("scenes", name, seed, sizes) | arm.settings
        if arm.kind == "sft":
            record = last_metrics(fine_tune(pipeline, pairs, settings))
        else:
            # The reference's predictions are the same in all of these arms
            record = last_metrics(iapo.train(pipeline, pairs, settings | {"precompute_ref_preds": True}))
    prompts = evaluation_prompts(sizes.num_samples, seed)
    return iapo.score(generate(pipeline, prompts, seed), prompts) | record


def run_painting(name: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Trains the base on paintings as an arm of `PAINTINGS` says, generates images, and scores them."""
    arm, pipeline = PAINTINGS[name], load_pipeline(MODELS[sizes.model].paintings)
    record = {}
    prompts = evaluation_prompts(sizes.num_samples, seed, sample_painting)
    if arm.negative:
        folder = partial(folder_of, "paintings", seed=seed, output_dir=sizes.output_dir)
        images = generate_guided(pipeline, arm.positive, arm.negative, folder, prompts, seed)
    else:
        if arm.settings is not None:
            paintings = painting_dataset(sizes.num_rows, seed=seed)
            train = cpo.train_sft if arm.kind == "sft" else cpo.train_cpo
            trainer = train(pipeline, paintings, shared_settings("paintings", name, seed, sizes) | arm.settings)
            trainer.save_model()
            record = last_metrics(trainer)
        images = generate(pipeline, prompts, seed)
    return cpo.score(images, prompts) | record


RUN = {"scenes": run_scene, "paintings": run_painting}
ARMS = {
    "unet": {"scenes": SCENES, "paintings": PAINTINGS},
    # The core: a flow model takes longer
    "flow": {
        "scenes": {name: SCENES[name] for name in ("base", "sft", "dpo", "mean_0.0", "covering_0.0")},
        "paintings": {
            name: PAINTINGS[name]
            for name in (
                *("base", "sft", "cpo", "present_1.0", "paired_2.0"),
                *("reversed", "base_npo", "paired_2.0_npo_base", "paired_2.0_npo_aligned"),
            )
        },
    },
}


def generate_guided(
    pipeline: DiffusionPipeline,
    positive: str | None,
    negative: tuple[str, ...],
    folder: Callable[[str], str],
    prompts: list[str],
    seed: int,
) -> list[Image.Image]:
    """
    Generates images with the adapter of one arm in the conditional branch of guidance, and the sum of others in the unconditional
    one. `folder` goes from an arm to its adapter's folder.
    """
    names = {arm: arm.replace(".", "_") for arm in filter(None, (positive, *negative))}  # peft allows no dot
    for arm, name in names.items():
        pipeline.load_lora_weights(folder(arm), adapter_name=name)
    with negative_preference_guidance(pipeline, names.get(positive), {names[arm]: 1.0 for arm in negative}):
        return generate(pipeline, prompts, seed)


def fine_tune(pipeline: DiffusionPipeline, pairs: Dataset, settings: dict[str, Any]) -> AttributeSFTTrainer:
    """Trains all weights of the denoiser on the chosen images of pairs, in place."""
    chosen = pairs.remove_columns(["rejected", "instances"]).rename_column("chosen", "image")
    no_attributes = [[]] * len(chosen)
    for column in ("positive_attributes", "negative_attributes"):
        chosen = chosen.add_column(column, no_attributes)
    model = model_of(pipeline)
    args = AttributeSFTConfig(**FAST | model.conditions | model.pair_training | settings)
    trainer = AttributeSFTTrainer(pipeline, args=args, train_dataset=chosen, peft_config=None)
    trainer.train()
    return trainer


def folder_of(world: str, name: str, seed: int, output_dir: str) -> str:
    return str(Path(output_dir) / "runs" / world / f"{name}-{seed}")


def shared_settings(world: str, name: str, seed: int, sizes: Sizes) -> dict[str, Any]:
    return {
        "output_dir": folder_of(world, name, seed, sizes.output_dir),
        "seed": seed,
        "max_steps": sizes.max_steps,
        "precompute": True,  # what the arms of a seed share is computed once
        "precompute_dir": str(Path(sizes.output_dir) / "precomputed"),
    }


def last_metrics(trainer: DiffusionTrainer) -> dict[str, float]:
    """The loss, the margins and the accuracies that the training logged last."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    return {name: last[name] for name in ("loss", "rewards/margins", "rewards/accuracies") if name in last}
