# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Preference alignment for text-to-image diffusion models, in the manner of TRL."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .annotation.files import save_annotations
    from .annotation.join import join_annotations, load_annotations
    from .criteria import Criteria
    from .data.formats import attribute_features, instance_pair_features
    from .data.labels import labelled_image_features, unpair_pairs
    from .evaluation.callback import EvaluationCallback
    from .evaluation.push import push_evaluation
    from .guidance import negative_preference_guidance
    from .lora_export import export_lora
    from .sampling import sample_images
    from .trainer.attribute_sft_config import AttributeSFTConfig
    from .trainer.attribute_sft_trainer import AttributeSFTTrainer
    from .trainer.callbacks import SampleImagesCallback
    from .trainer.complex_po_config import ComplexPOConfig
    from .trainer.complex_po_trainer import ComplexPOTrainer
    from .trainer.ddspo_config import DDSPOConfig
    from .trainer.ddspo_trainer import DDSPOTrainer
    from .trainer.diffusion_config import DiffusionConfig
    from .trainer.diffusion_kto_config import DiffusionKTOConfig
    from .trainer.diffusion_kto_trainer import DiffusionKTOTrainer
    from .trainer.diffusion_trainer import DiffusionTrainer
    from .trainer.instance_dpo_config import InstanceDPOConfig
    from .trainer.instance_dpo_trainer import InstanceDPOTrainer
    from .trainer.model_config import ModelConfig

__version__ = version("trl-diffusion")

import_module(".notes", __name__).hold_back_notes()

# Imported when first used: `import trl_diffusion` alone loads no torch.
_MODULES = {
    "AttributeSFTConfig": "trainer.attribute_sft_config",
    "AttributeSFTTrainer": "trainer.attribute_sft_trainer",
    "ComplexPOConfig": "trainer.complex_po_config",
    "ComplexPOTrainer": "trainer.complex_po_trainer",
    "Criteria": "criteria",
    "DDSPOConfig": "trainer.ddspo_config",
    "DDSPOTrainer": "trainer.ddspo_trainer",
    "DiffusionConfig": "trainer.diffusion_config",
    "DiffusionKTOConfig": "trainer.diffusion_kto_config",
    "DiffusionKTOTrainer": "trainer.diffusion_kto_trainer",
    "DiffusionTrainer": "trainer.diffusion_trainer",
    "EvaluationCallback": "evaluation.callback",
    "InstanceDPOConfig": "trainer.instance_dpo_config",
    "InstanceDPOTrainer": "trainer.instance_dpo_trainer",
    "ModelConfig": "trainer.model_config",
    "SampleImagesCallback": "trainer.callbacks",
    "attribute_features": "data.formats",
    "export_lora": "lora_export",
    "instance_pair_features": "data.formats",
    "join_annotations": "annotation.join",
    "labelled_image_features": "data.labels",
    "load_annotations": "annotation.join",
    "negative_preference_guidance": "guidance",
    "push_evaluation": "evaluation.push",
    "sample_images": "sampling",
    "save_annotations": "annotation.files",
    "unpair_pairs": "data.labels",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
