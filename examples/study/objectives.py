# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The objectives that the study compares at the learning rate that suits each: three worlds, and what is done to their bases."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image

from trl_diffusion.data.labels import unpair_pairs
from trl_diffusion.quickstart import cpo, crowds, iapo
from trl_diffusion.quickstart.experiment import FAST, train_quietly
from trl_diffusion.quickstart.models import MODELS, model_of
from trl_diffusion.quickstart.paintings import painting_dataset, sample_painting
from trl_diffusion.quickstart.world import evaluation_prompts, preference_dataset
from trl_diffusion.trainer.complex_po_config import ComplexPOConfig
from trl_diffusion.trainer.complex_po_trainer import ComplexPOTrainer
from trl_diffusion.trainer.ddspo_config import DDSPOConfig
from trl_diffusion.trainer.ddspo_trainer import DDSPOTrainer
from trl_diffusion.trainer.diffusion_kto_config import DiffusionKTOConfig
from trl_diffusion.trainer.diffusion_kto_trainer import DiffusionKTOTrainer
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer

from .arms import fine_tune, npo_forms


BREAKING = "breaking"
Train = Callable[[DiffusionPipeline, Dataset, dict[str, Any]], DiffusionTrainer]


@dataclass(frozen=True)
class Objective:
    """
    What is done to a base before it generates images.

    Args:
        title (`str`):
            Its name in tables and pictures.
        train (`Callable`, *optional*):
            Takes a pipeline, rows and settings, and trains the pipeline in place. `None`: nothing is trained.
        settings (`dict`, *optional*):
            What the trainer's config gets besides the settings that all arms share.
        rate_of (`str`, *optional*):
            The arm whose learning rate it takes, or `"breaking"` for the smallest at which the world's reference arm breaks.
            `None`: its own is chosen.
        positive (`str`, *optional*):
            Of an arm that trains nothing, the arm whose adapter is used in the conditional branch of guidance.
        negative (`tuple[str, ...]`, *optional*):
            The arms whose adapters are added up in the unconditional branch.
    """

    title: str
    train: Train | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    rate_of: str | None = None
    positive: str | None = None
    negative: tuple[str, ...] = ()

    @property
    def is_tuned(self) -> bool:
        return self.train is not None and self.rate_of is None


@dataclass(frozen=True)
class World:
    """
    A base, its data, and how its images are judged.

    Args:
        pipeline (`str`):
            The base, see `quickstart.sampling.load_pipeline`.
        rows (`Callable`):
            Makes the training data, from the number of rows and a seed.
        prompts (`Callable`):
            Makes prompts, from their number and a seed.
        score (`Callable`):
            Scores images, given their prompts.
        learning_rate (`float`):
            The middle of the grid of learning rates.
        goodness (`Callable`):
            From scores to the number that the best learning rate has the most of.
        matches (`tuple[str, ...]`):
            The scores which say that what a prompt names is there.
        reference (`str`):
            The arm that the others are compared with.
        arms (`dict[str, Objective]`):
            The arms.
    """

    pipeline: str
    rows: Callable[[int, int], Dataset]
    prompts: Callable[[int, int], list[str]]
    score: Callable[[list[Image.Image], list[str]], dict[str, float]]
    learning_rate: float
    goodness: Callable[[dict[str, float]], float]
    matches: tuple[str, ...]
    reference: str
    arms: dict[str, Objective]

    def match(self, scores: dict[str, float]) -> float:
        """The worst of the scores that say whether the prompt is shown."""
        return min(scores[name] for name in self.matches)


# ----- how they are trained -----


def train_ddspo(pipeline: DiffusionPipeline, pairs: Dataset, settings: dict[str, Any]) -> DDSPOTrainer:
    """Trains all weights of the denoiser on pairs, with the reference's predictions as targets."""
    model = model_of(pipeline)
    args = DDSPOConfig(**FAST | model.conditions | model.pair_training | settings)
    return train_quietly(DDSPOTrainer(pipeline, args=args, train_dataset=pairs.remove_columns("instances")))


def train_kto(pipeline: DiffusionPipeline, pairs: Dataset, settings: dict[str, Any]) -> DiffusionKTOTrainer:
    """Trains all weights of the denoiser on the images of pairs, without saying which belong together; as many in each step."""
    model = model_of(pipeline)
    settings = FAST | model.conditions | model.pair_training | settings
    settings["per_device_train_batch_size"] *= 2
    trainer = DiffusionKTOTrainer(pipeline, args=DiffusionKTOConfig(**settings), train_dataset=unpair_pairs(pairs))
    return train_quietly(trainer)


def train_without_expert(
    pipeline: DiffusionPipeline, paintings: Dataset, settings: dict[str, Any]
) -> ComplexPOTrainer:
    """Trains a LoRA on the reference's own predictions for other prompts."""
    settings = cpo.training_settings(pipeline, {"beta": model_of(pipeline).painting_beta} | settings)
    args = ComplexPOConfig(criteria=cpo.CRITERIA, **settings)
    trainer = ComplexPOTrainer(pipeline, None, args=args, train_dataset=paintings, peft_config=cpo.lora(pipeline))
    return train_quietly(trainer)


# ----- the arms -----

REFERENCE_KEPT = {"precompute_ref_preds": True}  # computed once for the arms that share it
COVERING = {"w_neg": 0.0, "mask_overlap": "covering"}
PLAIN = {"w_neg": 1.0}
SFT = Objective("SFT on the chosen", fine_tune)
DPO = Objective("Diffusion-DPO", iapo.train, REFERENCE_KEPT | PLAIN)
IAPO_COVERING = Objective("IAPO, covering", iapo.train, REFERENCE_KEPT | COVERING)
GROUPED = Objective("IAPO, grouped", iapo.train, REFERENCE_KEPT | {"w_neg": 0.0, "grouped_instances": True})
LOSSES = {
    "ipo": ("IPO", REFERENCE_KEPT | {"loss_type": "ipo"}),
    "ipo_100": ("IPO, beta 100", REFERENCE_KEPT | {"loss_type": "ipo", "beta": 100.0}),
    "hinge": ("hinge", REFERENCE_KEPT | {"loss_type": "hinge"}),
    "mapo": ("MaPO", {"loss_type": "mapo", "beta": None}),  # it has no reference, and a beta of its own
    "dspo": ("DSPO", REFERENCE_KEPT | {"loss_type": "dspo", "beta": None}),
    "dmpo": ("DMPO", REFERENCE_KEPT | {"loss_type": "dmpo"}),
}
SAFEGUARDS = {
    "none": ("", {}),
    "sdpo_0.6": (", SDPO 0.6", {"safeguard_mu": 0.6}),
    "sdpo_0.9": (", SDPO 0.9", {"safeguard_mu": 0.9}),
    "anchor": (", anchor 100", {"anchor_alpha": 100.0}),
    "smoothing": (", label smoothing 0.1", {"label_smoothing": 0.1}),
}
SCENES = {
    "base": Objective("base"),
    "dpo": DPO,
    "covering": IAPO_COVERING,
    "grouped": GROUPED,
    "sft": SFT,
    **{
        f"{loss}{suffix}": Objective(f"{title}{masked}", iapo.train, settings | masks)
        for loss, (title, settings) in LOSSES.items()
        for suffix, masked, masks in (("", "", PLAIN), ("_covering", ", covering", COVERING))
    },
    "kto": Objective("Diffusion-KTO", train_kto, REFERENCE_KEPT),
    "ddspo": Objective("DDSPO", train_ddspo, REFERENCE_KEPT),
    **{
        f"{BREAKING}_{name}": Objective(
            f"Diffusion-DPO, too fast{title}", iapo.train, REFERENCE_KEPT | PLAIN | settings, rate_of=BREAKING
        )
        for name, (title, settings) in SAFEGUARDS.items()
    },
}
CROWDS = {
    "base": Objective("base"),
    "dpo": DPO,
    "mean": Objective("IAPO, mean", iapo.train, REFERENCE_KEPT | {"w_neg": 0.0}),
    "covering": IAPO_COVERING,
    "grouped": GROUPED,
    "sft": SFT,
}
PAIRED = {"attribute_targets": "paired", "target_strength": 2.0}
PAINTINGS = {
    "base": Objective("base"),
    "sft": Objective("SFT on the best", cpo.train_sft),
    "present": Objective("CPO-S, strength 1.0", cpo.train_cpo, REFERENCE_KEPT),
    "paired": Objective("CPO-S, paired, strength 2.0", cpo.train_cpo, REFERENCE_KEPT | PAIRED),
    "attributes": Objective(
        "CPO-S, paired, strength 2.0, no expert, attributes",
        train_without_expert,
        REFERENCE_KEPT | PAIRED | {"target_prompts": "attributes"},
    ),
    "degraded": Objective(
        "CPO-S, no expert, degraded", train_without_expert, REFERENCE_KEPT | {"target_prompts": "degraded"}
    ),
    "reversed": Objective(
        "CPO-S, paired, strength 2.0, reversed",
        cpo.train_cpo,
        REFERENCE_KEPT | PAIRED | {"reverse_preference": True},
        rate_of="paired",
    ),
    "base_npo": Objective("base + NPO", negative=("reversed",)),
    **{
        f"{name}_npo_{form}": Objective(f"{title} + NPO, {form} + reversed", positive=name, negative=negative)
        for name, title in (("present", "CPO-S, strength 1.0"), ("paired", "CPO-S, paired, strength 2.0"))
        for form, negative in npo_forms(name).items()
    },
}

MODEL = MODELS["unet"]
WORLDS = {
    "scenes": World(
        pipeline=MODEL.scenes,
        rows=preference_dataset,
        prompts=evaluation_prompts,
        score=iapo.score,
        learning_rate=MODEL.pair_training["learning_rate"],
        goodness=lambda scores: (scores["clean_a"] + scores["clean_b"]) / 2,
        matches=("match_a", "match_b"),
        reference="dpo",
        arms=SCENES,
    ),
    "crowds": World(
        pipeline=MODEL.crowds,
        rows=crowds.crowd_dataset,
        prompts=crowds.crowd_prompts,
        score=crowds.score,
        learning_rate=MODEL.pair_training["learning_rate"],
        goodness=lambda scores: (scores["clean_a"] + scores["clean_b"] + scores["clean_c"]) / 3,
        matches=("match",),
        reference="dpo",
        arms=CROWDS,
    ),
    "paintings": World(
        pipeline=MODEL.paintings,
        rows=painting_dataset,
        prompts=partial(evaluation_prompts, sample=sample_painting),
        score=cpo.score,
        learning_rate=MODEL.painting_training["learning_rate"],
        goodness=lambda scores: -scores["negatives"],
        matches=("match",),
        reference="sft",
        arms=PAINTINGS,
    ),
}
