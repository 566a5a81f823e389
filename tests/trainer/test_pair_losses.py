# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Trainings with each loss of pairs."""

import math

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.trainer.test_mask_training import MIXED, rows
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer


# Diffusion-DPO's own loss is trained in `test_instance_dpo_trainer.py`
LOSSES = {
    **{name: {"loss_type": name} for name in ("ipo", "hinge", "mapo", "dspo", "dmpo")},
    "switches": {"label_smoothing": 0.1, "safeguard_mu": 0.5, "anchor_alpha": 0.1},
    "grouped": {"grouped_instances": True, "safeguard_mu": 0.5},
}


def make_trainer(folder, pipeline, peft_config=None, dataset=None, ref_model=None, **settings) -> InstanceDPOTrainer:
    args = InstanceDPOConfig(str(folder), **{**tiny.FAST, **tiny.settings(pipeline), **settings})
    dataset = tiny.pairs() if dataset is None else dataset
    return InstanceDPOTrainer(pipeline, ref_model, args, train_dataset=dataset, peft_config=peft_config)


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("name", LOSSES)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path, name, family):
    """Every loss trains a LoRA, from the closed form of its first loss where that has one, and resumes to the same weights."""
    settings = LOSSES[name] | {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, tiny.PIPELINES[family](), tiny.lora(), **settings)
    before = tiny.weights(whole.policy)
    whole.train()
    # u = 0: log 2, (0 - 1/2)^2, 1 - 0, KL of 1/2 and 0.99
    dmpo = 0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01)
    expected = {"ipo": 0.25, "hinge": 1.0, "dmpo": dmpo, "mapo": None, "dspo": None}.get(name, math.log(2))
    assert expected is None or tiny.losses(whole)[0] == pytest.approx(expected, abs=1e-6)
    resumed = make_trainer(tmp_path, tiny.PIPELINES[family](), tiny.lora(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.max_difference(tiny.weights(whole.policy), tiny.weights(resumed.policy)) == 0
    assert tiny.max_difference(tiny.weights(whole.policy), before) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_accumulation_changes_nothing(tmp_path, name):
    """Four pairs at once and one at a time give the same weights: a lambda is a pair's, and the terms are weighted within it."""
    sgd, ends = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.05}, []
    for size, number in ((4, 1), (1, 4)):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": number}
        trainer = make_trainer(tmp_path, tiny.sd_pipeline(), tiny.lora(), **sgd | cut | LOSSES[name])
        before = tiny.weights(trainer.policy)
        trainer.train()
        ends.append(tiny.weights(trainer.policy))
    assert tiny.max_difference(*ends) < 1e-3 * tiny.max_difference(before, ends[0])


# ---- Reversed preferences ----


def swapped_by_hand(row: dict) -> dict:
    """
    The row with its images exchanged, and the boxes and masks of its instances. What was better is now worse: an instance whose winner
    was in the rejected image has its new winner in the other image, which is now the rejected one, so that its label reads the same.
    """
    instances = [dict(instance) for instance in row.get("instances", ())]
    for instance in instances:
        for kind in ("box", "mask"):
            names = f"chosen_{kind}", f"rejected_{kind}"
            if names[0] in instance:
                instance |= dict(zip(names, [instance[name] for name in reversed(names)], strict=True))
    swapped = {"chosen": row["rejected"], "rejected": row["chosen"]}
    return row | swapped | ({"instances": instances} if "instances" in row else {})


def train_on_means(folder, dataset: Dataset, **settings) -> tuple[list[float], dict[str, torch.Tensor], float]:
    """
    The losses of two steps, the weights after them, and how far these moved. The VAE gives the mean of its posterior, because the
    posterior's noise depends on the name of the column.
    """
    pipeline = tiny.sd_pipeline()
    with torch.no_grad():
        pipeline.vae.quant_conv.weight[4:].zero_()
        pipeline.vae.quant_conv.bias[4:].fill_(-30)
    sgd = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.05, "max_steps": 2}
    trainer = make_trainer(folder, pipeline, tiny.lora(), dataset, **sgd | settings)
    before = tiny.weights(trainer.policy)
    trainer.train()
    after = tiny.weights(trainer.policy)
    return tiny.losses(trainer), after, tiny.max_difference(before, after)


REVERSED = {
    **{name: {"loss_type": name, "beta": 20.0} for name in ("sigmoid", "ipo", "hinge", "dmpo")},
    "mapo": {"loss_type": "mapo", "beta": 0.1},
    "dspo": {"loss_type": "dspo", "beta": 0.5},
    "safeguard": {"safeguard_mu": 0.5, "label_smoothing": 0.1, "beta": 20.0},
    "anchor": {"anchor_alpha": 100.0, "beta": 20.0},
    "grouped": {"grouped_instances": True, "beta": 20.0},
}


@pytest.mark.parametrize("has_instances", [False, True], ids=["images", "instances"])
@pytest.mark.parametrize("name", REVERSED)
def test_reversed_training_is_training_on_swapped_columns(tmp_path, name, has_instances):
    """
    The same losses and weights, without instances, and with boxes and masks. The losses of so short a training are nearly the same in
    both directions; the weights are not.
    """
    dataset = rows(*MIXED) if has_instances else tiny.pairs(4, with_instances=False)
    settings = REVERSED[name] | ({"w_neg": -0.5} if has_instances and name != "grouped" else {})
    losses, weights, _ = train_on_means(tmp_path, dataset, reverse_preference=True, **settings)
    swapped = Dataset.from_list([swapped_by_hand(row) for row in dataset], features=dataset.features)
    expected_losses, expected_weights, moved = train_on_means(tmp_path, swapped, **settings)
    assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-6)
    assert tiny.max_difference(weights, expected_weights) < 1e-3 * moved


def test_mapo_makes_half_of_the_forwards_and_no_copy(tmp_path):
    """Two forwards a step with a reference, one without; all weights are trained and there is no frozen copy of them."""
    calls = {}
    for name in ("sigmoid", "mapo"):
        trainer, seen = make_trainer(tmp_path / name, tiny.sd_pipeline(), tiny.lora(), loss_type=name), []
        trainer.policy.register_forward_hook(lambda *args, seen=seen: seen.append(1))
        trainer.train()
        calls[name] = len(seen)
    assert calls == {"sigmoid": 6, "mapo": 3}
    assert make_trainer(tmp_path, tiny.sd_pipeline(), loss_type="mapo").reference is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpo"}, "`loss_type` must be 'sigmoid', 'ipo'"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "`label_smoothing` is 0.1, but `loss_type='ipo'`"),
        ({"label_smoothing": 0.5}, "`label_smoothing` is a share of wrong labels, at least 0 and below 0.5"),
        ({"loss_type": "dmpo", "label_smoothing": 0.0}, "`label_smoothing` is a share of wrong labels, above 0"),
        ({"safeguard_mu": 1.5}, "`safeguard_mu` must be between 0 and 1"),
        ({"anchor_alpha": -1.0}, "`anchor_alpha` must not be negative"),
        ({"loss_type": "mapo", "anchor_alpha": 1.0}, "`anchor_alpha` needs a reference"),
        (
            {"loss_type": "mapo", "precompute": True, "precompute_ref_preds": True},
            "`precompute_ref_preds` needs a refe",
        ),
        ({"grouped_instances": True, "w_neg": 1.0}, "`w_neg` is 1.0, which is of the mask"),
        (
            {"grouped_instances": True, "mask_overlap": "covering"},
            "`mask_overlap` is 'covering', which is of the mask",
        ),
        ({"grouped_instances": True, "mask_examples": 1}, "`mask_examples` is 1, which is of the mask"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, settings, message):
    """The message names the setting and the way out."""
    with pytest.raises(ValueError, match=message):
        InstanceDPOConfig(str(tmp_path), **settings)


def test_defaults_follow_the_loss(tmp_path):
    """`beta` and `label_smoothing` are filled in, and what the user says stands."""
    defaults = {name: InstanceDPOConfig(str(tmp_path), loss_type=name) for name in ("sigmoid", "mapo", "dspo", "dmpo")}
    assert [args.beta for args in defaults.values()] == [2000, 0.1, 0.001, 2000]
    assert [args.label_smoothing for args in defaults.values()] == [0, 0, 0, 0.01]
    assert InstanceDPOConfig(str(tmp_path), loss_type="mapo", beta=7.0).beta == 7


def test_mapo_refuses_a_reference(tmp_path):
    """A `ref_model` that would not be used is a mistake."""
    with pytest.raises(ValueError, match="`ref_model` has no use with `loss_type='mapo'`"):
        make_trainer(tmp_path, tiny.sd_pipeline(), ref_model=tiny.sd_pipeline(), loss_type="mapo")
