# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What CONTRIBUTING says of adding an objective: this one is not part of the package, and needs nothing of it changed."""

from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel

from tests import tiny
from trl_diffusion import DiffusionConfig, DiffusionTrainer
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.noising import per_sample_errors
from trl_diffusion.trainer.model_card import Method


# ---- the objective: IPO's loss on image pairs, (u - 1 / (2 beta))^2 of Diffusion-DPO's margin u ----


def diffusion_ipo_loss(
    errors: torch.Tensor, ref_errors: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the errors `(2B,)` of chosen and rejected images: the losses `(B,)` and the margins `(B,)`."""
    chosen, rejected = (errors - ref_errors).chunk(2)
    margins = rejected - chosen
    return (margins - 1 / (2 * beta)).square(), margins.detach()


@dataclass
class DiffusionIPOConfig(DiffusionConfig):
    beta: float = 100.0


class DiffusionIPOTrainer(DiffusionTrainer):
    method = Method("IPO", "pairs", ("ipo",), {"title": "IPO", "id": "2310.12036", "citation": "@article{ipo}"})
    columns = ("prompt", "chosen", "rejected")
    image_columns = ("chosen", "rejected")
    config_class = DiffusionIPOConfig
    collator_class = InstancePairCollator
    uses_reference = True
    _output_suffix = "IPO"

    def objective(self, model, noised):
        target = self.process.target(noised.latents, noised.noise, noised.timesteps)
        errors = per_sample_errors(self.predict_with_policy(model, noised), target)
        ref_errors = per_sample_errors(noised.frozen["ref_pred"], target)
        losses, margins = diffusion_ipo_loss(errors, ref_errors, self.args.beta)
        return losses, {"rewards/margins": margins, "rewards/accuracies": margins > 0}


# ---- what it gets for that ----


@pytest.mark.parametrize("peft_config", [tiny.lora(), None], ids=["lora", "full"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"noise_source": "inversion", "inversion_steps": 3},
        {"precompute": True, "precompute_ref_preds": True},
    ],
    ids=["random", "inversion", "precomputed"],
)
def test_a_new_objective_trains(tmp_path, settings, peft_config):
    """It starts at its closed form, 1 / (2 beta)^2 and margin 0, moves, evaluates, saves and has a card."""
    args = DiffusionIPOConfig(
        str(tmp_path / "out"),
        **tiny.FAST,
        **settings,
        precompute_dir=str(tmp_path / "cache"),
    )
    trainer = DiffusionIPOTrainer(
        tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(4), eval_dataset=tiny.pairs(4), peft_config=peft_config
    )
    before = trainer.evaluate()
    trainer.train()
    first = trainer.state.log_history[0]
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(1 / 200**2, rel=1e-3) and abs(before["eval_rewards/margins"]) < 1e-6
    assert first["loss"] == pytest.approx(1 / 200**2, rel=1e-3) and abs(first["rewards/margins"]) < 1e-6
    assert after["eval_rewards/margins"] != before["eval_rewards/margins"]
    trainer.save_model()
    trainer.create_model_card()
    assert isinstance(trainer.policy, PeftModel) == (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    assert "IPO" in (tmp_path / "out" / "README.md").read_text()
