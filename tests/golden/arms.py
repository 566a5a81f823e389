# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Twenty steps of each trainer on tiny pipelines: what they log, to compare before and after a change."""

import math
import tempfile
from pathlib import Path
from typing import Any

from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    DDSPOConfig,
    DDSPOTrainer,
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    unpair_pairs,
)

from .. import tiny
from ..families import FAMILIES


STEPS = 20
IAPO = {"learning_rate": 1e-4, "beta": 100.0}
INVERSION = {"noise_source": "inversion", "inversion_steps": 4}
# What is compared in pairs, and how, besides IAPO's own loss
PAIRS = {
    **{name: {"loss_type": name, "w_neg": -0.5} for name in ("ipo", "hinge", "dmpo")},
    "mapo": {"loss_type": "mapo", "beta": 0.1, "w_neg": -0.5},
    "dspo": {"loss_type": "dspo", "beta": 0.5, "w_neg": -0.5},
    "safeguard": {"safeguard_mu": 0.5, "label_smoothing": 0.1},
    "anchor": {"anchor_alpha": 1000.0},
    "grouped": {"grouped_instances": True},
}
# name: family, whether a LoRA is trained, trainer, settings
ARMS: dict[str, tuple[str, bool, str, dict[str, Any]]] = {
    **{
        f"{trainer}-{family}-{'lora' if is_lora else 'full'}-{noise}": (
            family,
            is_lora,
            trainer,
            (IAPO | {"w_neg": -0.5, "mask_overlap": "covering"} if trainer == "iapo" else {"learning_rate": 1e-4})
            | (INVERSION if noise == "inversion" else {}),
        )
        for trainer, noises in (("iapo", ("random", "inversion")), ("sft", ("random",)))
        for family in ("sd", "sd_v", "sdxl")
        for is_lora in (True, False)
        for noise in noises
    },
    **{
        f"cpo-{family}-lora-random": (family, True, "cpo", {"learning_rate": 1e-3, "beta": 50.0})
        for family in ("sd", "sd_v", "sdxl")
    },
    **{
        f"{trainer}-{family}-{'lora' if is_lora else 'full'}-{noise}": (family, is_lora, trainer, settings)
        for family in FAMILIES
        for trainer, is_lora, noise, settings in (
            ("iapo", True, "random", IAPO | {"timestep_density": "logit_normal"}),
            ("iapo", False, "inversion", IAPO | INVERSION),
            ("sft", True, "random", {"learning_rate": 1e-3}),
            ("cpo", True, "random", {"learning_rate": 1e-3, "beta": 50.0}),
        )
    },
    **{
        f"{name}-{family}-lora-random": (family, True, trainer, {"learning_rate": 1e-3, "beta": 50.0} | settings)
        for family in ("sd", "sd3")
        for name, trainer, settings in (
            ("ddspo", "ddspo", {}),
            ("cpo-degraded", "cpo-alone", {"target_prompts": "degraded", "target_strength": 2.0}),
            ("cpo-attributes", "cpo-alone", {"target_prompts": "attributes", "target_strength": 2.0}),
            ("kto", "kto", {"gradient_accumulation_steps": 2}),
            *((name, "iapo", {"beta": 100.0} | settings) for name, settings in PAIRS.items()),
        )
    },
    "iapo-sd-lora-policy-inverts": (
        *("sd", True, "iapo"),
        IAPO | INVERSION | {"inversion_model": "policy", "inversion_eta": 0.1},
    ),
    "iapo-sd-full-precomputed": ("sd", False, "iapo", IAPO | {"precompute": True, "precompute_ref_preds": True}),
    "iapo-sd-lora-dropout": (
        *("sd", True, "iapo"),
        IAPO | {"prompt_dropout": 0.5, "random_flip": True, "center_crop": False},
    ),
    "iapo-sdxl-lora-dropout": ("sdxl", True, "iapo", IAPO | {"prompt_dropout": 0.5}),
    "iapo-sd-lora-bf16": ("sd", True, "iapo", IAPO | {"bf16": True}),
    "cpo-sd-lora-unstabilized": (
        *("sd", True, "cpo"),
        {
            **{"learning_rate": 1e-3, "beta": 50.0, "loss_type": "unstabilized", "attribute_targets": "paired"},
            **{"target_strength": 1.5, "timestep_weighting": "min_snr"},
        },
    ),
    "cpo-sd_v-lora-sigmoid": (
        *("sd_v", True, "cpo"),
        {"learning_rate": 1e-3, "beta": 50.0, "timestep_weighting": "sigmoid", "policy_condition": "positive"},
    ),
}
# Trainer, configuration, and what it is given of pairs
OF_PAIRS = {
    "iapo": (InstanceDPOTrainer, InstanceDPOConfig, lambda pairs: pairs),
    "ddspo": (DDSPOTrainer, DDSPOConfig, lambda pairs: pairs),
    "kto": (DiffusionKTOTrainer, DiffusionKTOConfig, unpair_pairs),
}
NOT_RECORDED = ("runtime", "_per_second", "total_flos", "step", "epoch", "num_tokens")


def record(name: str, changes: dict[str, Any] | None = None) -> dict[str, list[float]]:
    """What an arm logs: each metric's values in order, an evaluation's last."""
    family, is_lora, trainer_name, settings = ARMS[name]
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(trainer_name, family, is_lora, settings, changes or {}, Path(folder))
        trainer.train()
        trainer.evaluate()
        recorded: dict[str, list[float]] = {}
        for entry in trainer.state.log_history:
            for key, value in entry.items():
                if isinstance(value, float) and math.isfinite(value) and not key.endswith(NOT_RECORDED):
                    recorded.setdefault(key, []).append(value)
    return recorded


def _trainer(name: str, family: str, is_lora: bool, settings: dict[str, Any], changes: dict[str, Any], folder: Path):
    make = FAMILIES[family].make if family in FAMILIES else tiny.PIPELINES[family]
    own = FAMILIES[family].settings if family in FAMILIES else {}
    common = tiny.FAST | own | {"max_steps": STEPS, "use_cpu": True, "output_dir": str(folder)} | settings | changes
    if settings.get("precompute"):
        common["precompute_dir"] = str(folder / "cache")
    lora = tiny.lora(alpha=8) if is_lora else None
    if name in OF_PAIRS:
        trainer, config, rows = OF_PAIRS[name]
        data = {"train_dataset": rows(tiny.pairs(8)), "eval_dataset": rows(tiny.pairs(2))}
        return trainer(make(), args=config(**common), peft_config=lora, **data)
    (folder / "criteria.yaml").write_text(tiny.CRITERIA)
    common |= {"criteria": str(folder / "criteria.yaml")}
    data = {"train_dataset": tiny.paintings(8), "eval_dataset": tiny.paintings(2), "peft_config": lora}
    if name == "sft":
        return AttributeSFTTrainer(make(), args=AttributeSFTConfig(attribute_dropout=0.3, **common), **data)
    if name == "cpo-alone":
        return ComplexPOTrainer(make(), args=ComplexPOConfig(**common), **data)
    base = tiny.FAST | own | {"learning_rate": 0.05, "use_cpu": True, "criteria": common["criteria"]} | changes
    expert = AttributeSFTTrainer(
        make(),
        args=AttributeSFTConfig(str(folder / "expert"), **base),
        train_dataset=tiny.paintings(8),
        peft_config=tiny.lora(),
    )
    expert.train()
    return ComplexPOTrainer(make(), expert, args=ComplexPOConfig(**common), **data)
