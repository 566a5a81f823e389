# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a GPU waits for, and what the host does for each module or keeps for each step: counted, not timed."""

import copy
import gc
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.families import FAMILIES
from tests.tiny import FAST, PIPELINES, lora, max_difference, weights
from tests.trainer.waits import HostTraffic, micro_batch, to_meta
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)
from trl_diffusion.trainer.meters import MAX_RECORDED, Meters


# Copies that wait in a micro-batch that encodes its prompts: those of diffusers' `encode_prompt`. The language models of the other families
# ask the device whether a prompt is padded, which the meta device does not know
TOKENIZED = {
    "sd": 1,  # ids of tokens
    "sdxl": 2,  # ids, for each of two encoders
    "sd3": 3,  # ids, for each of three encoders
    "flux": 3,
    "sana": 2,  # ids and their mask
}
# Of prompts of several lengths: diffusers makes a tensor of Python's numbers in each call with a mask, by policy and reference
MASKED = {"qwen_image": 2}


@pytest.fixture
def device_is_restored():
    """`to_meta` changes the device of a state that all trainers of a process share."""
    state = dict(AcceleratorState._shared_state)
    yield
    AcceleratorState._shared_state.update(state)


def make(kind: str, family: str, folder: Path, peft_config=None, num_rows=4, **settings):
    make_pipeline = FAMILIES[family].make if family in FAMILIES else PIPELINES[family]
    pipeline, own = make_pipeline(), FAMILIES[family].settings if family in FAMILIES else {}
    settings = {**FAST, **own, "use_cpu": True, **settings}
    if settings.get("precompute"):
        settings["precompute_dir"] = str(folder / "cache")
    if kind == "iapo":
        args = InstanceDPOConfig(str(folder / "policy"), **settings)
        return InstanceDPOTrainer(pipeline, args=args, train_dataset=tiny.pairs(num_rows), peft_config=peft_config)
    (folder / "criteria.yaml").write_text(tiny.CRITERIA)
    settings["criteria"] = str(folder / "criteria.yaml")
    data = {"train_dataset": tiny.paintings(4), "peft_config": lora()}
    expert = AttributeSFTTrainer(make_pipeline(), args=AttributeSFTConfig(str(folder / "sft"), **settings), **data)
    if kind == "sft":
        return expert
    return ComplexPOTrainer(pipeline, expert, args=ComplexPOConfig(str(folder / "policy"), **settings), **data)


PRECOMPUTED = {"precompute": True}
REFERENCE_PRECOMPUTED = PRECOMPUTED | {"precompute_ref_preds": True}
INVERSION = {"noise_source": "inversion", "inversion_eta": 0.1, "mask_overlap": "covering"}
CASES = [
    *(("iapo", family, {}) for family in ("sdxl", *FAMILIES) if family in TOKENIZED),
    *(("iapo", family, PRECOMPUTED) for family in ("sdxl", *FAMILIES)),
    *(("iapo", "sd", settings) for settings in (INVERSION, REFERENCE_PRECOMPUTED)),
    *(("cpo", "sd", {}), ("cpo", "sdxl", PRECOMPUTED), ("sft", "sd", PRECOMPUTED)),
]


@pytest.mark.usefixtures("device_is_restored")
@pytest.mark.parametrize(
    ("kind", "family", "settings"), CASES, ids=["-".join((*case[:2], *case[2].keys())) for case in CASES]
)
def test_a_micro_batch_waits_for_no_result(tmp_path, kind, family, settings):
    """
    After the first step no result is asked for between two optimizer steps. The only copies to the device that wait are those of
    the tokens of a prompt that is encoded in the step.
    """
    trainer = make(kind, family, tmp_path, lora(), **settings)
    rows = [trainer.train_dataset[index] for index in (0, 1)]
    to_meta(trainer)
    micro_batch(trainer, rows)  # makes what stays on the device: positions, the table of the schedule
    traffic = micro_batch(trainer, rows)
    assert not traffic.waits
    assert sum(traffic.blocking.values()) == (MASKED.get(family, 0) if "precompute" in settings else TOKENIZED[family])
    assert traffic.copies["aten._to_copy"] > 0  # the noise


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def test_one_wait_an_optimizer_step(tmp_path, monkeypatch):
    """Between two logs a step asks once whether all is finite, the optimizer's own step left out."""
    settings = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "logging_steps": 10,
    }
    trainer = make("iapo", "sd", tmp_path, lora(), num_rows=8, **settings)
    asked, on_end = [], trainer.health.on_step_end

    def noted(args, state, control, **kwargs):
        asked.append(counter.counts["aten._local_scalar_dense.default"] + counter.counts["aten.is_nonzero.default"])
        return on_end(args, state, control, **kwargs)

    monkeypatch.setattr(trainer.health, "on_step_end", noted)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: None)
    with Operations() as counter:
        trainer.train()
    # The first has the comparison with the reference besides, and what the loader asks the CPU
    assert [after - before for before, after in zip(asked, asked[1:], strict=False)] == [1, 1, 1]


# ---- Meters ----


def test_one_copy_for_all_metrics(monkeypatch):
    """An average of many metrics is one sum over processes and one copy from the device."""
    meters = Meters(Accelerator(cpu=True))
    monkeypatch.setattr(meters.accelerator, "reduce", lambda sums: torch.ones(sums.shape))
    for name in "abcde":
        meters.record(
            "train",
            {
                name: torch.ones(8, device="meta"),
                f"some_{name}": (torch.ones(8, device="meta"), torch.ones(8, dtype=torch.bool, device="meta")),
            },
        )
    with HostTraffic() as traffic:
        assert len(meters.averages("train")) == 10
    assert not traffic.waits and not traffic.blocking


def test_averages_are_right_in_the_seventh_digit():
    """Sums are in float64; what a metric has no value for does not count."""
    meters = Meters(Accelerator(cpu=True))
    generator, expected = torch.Generator().manual_seed(0), {}
    for name in "abcde":
        values = 1e3 + torch.randn(7, 8, generator=generator)
        expected[name] = values.double().mean().item()
        for row in values:
            meters.record("train", {name: row})
    meters.record("train", {"some": (torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))})
    meters.record("train", {"none": (torch.ones(2), torch.zeros(2, dtype=torch.bool))})
    assert meters.averages("train") == pytest.approx(expected | {"some": 1.0}, rel=2e-7)
    assert meters.averages("train") == {}


def test_metrics_that_nobody_asks_for_take_no_more_memory(tmp_path):
    """As many tensors are alive after 3 and after 6 rounds of batches, and their average is over all of them."""
    meters, alive = Meters(Accelerator(cpu=True)), []
    for step in range(6 * MAX_RECORDED):
        meters.record("train", {"step": torch.full((2,), float(step)), "other": torch.zeros(2, dtype=torch.bool)})
        if (step + 1) % MAX_RECORDED == 0:
            gc.collect()
            alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert alive[2] == alive[5]
    assert meters.averages("train") == {"step": (6 * MAX_RECORDED - 1) / 2, "other": 0.0}


# ---- Modules ----


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_step_does_not_go_through_all_modules(tmp_path, monkeypatch, peft_config):
    """
    Each module is put into training mode once for three steps of two micro-batches, and all are in it in each; after the first
    step none is visited to find parameters.
    """
    trainer = make("iapo", "sd", tmp_path, peft_config, max_steps=3, gradient_accumulation_steps=2)
    policy = trainer.policy
    all_modules, calls, modes = list(policy.modules()), Counter(), []
    was_training = trainer.denoiser_was_training
    train = torch.nn.Module.train

    def counted(module, mode=True):
        calls[mode] += 1
        return train(module, mode)

    trainer.backbone.denoiser.register_forward_pre_hook(
        lambda *args: modes.append({module.training for module in all_modules})
    )
    trainer.backbone.denoiser.eval()
    monkeypatch.setattr(torch.nn.Module, "train", counted)
    named_modules, visits = torch.nn.Module.named_modules, []

    def noted(module, *args, **kwargs):
        if module is policy and 0 < trainer.state.global_step < 3:
            visits.append(trainer.state.global_step)
        return named_modules(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", noted)
    monkeypatch.setattr(trainer.health, "on_step_end", lambda *args, **kwargs: modes.append(len(visits)))
    trainer.train()
    visits_at = [mode for mode in modes if not isinstance(mode, set)]
    assert visits_at == [0, 0, 0]
    modes = [mode for mode in modes if isinstance(mode, set)]
    assert was_training and calls == {True: 2 * len(all_modules)}  # in the first micro-batch, and to be as it was
    assert modes == [{True}] * (6 if peft_config is None else 12)  # the reference of a LoRA is the same module
    assert not {"train", "parameters"} & vars(policy).keys()


def test_a_copy_that_is_made_in_training_is_on_its_own(tmp_path):
    """A callback may copy the policy: mode and parameters of the copy are its own."""
    trainer = make("iapo", "sd", tmp_path, lora())
    policy, copied = trainer.policy, []

    def copy_policy(module, args):
        if not copied:
            copied.append(copy.deepcopy(policy).eval())

    trainer.backbone.denoiser.register_forward_pre_hook(copy_policy)
    trainer.train()
    assert not any(module.training for module in copied[0].modules())
    own, of_policy = list(copied[0].parameters()), {id(parameter) for parameter in policy.parameters()}
    assert [id(p) for p in own] == [id(p) for _, p in copied[0].named_parameters()]
    assert not any(id(parameter) in of_policy for parameter in own)


# ---- Adapters in one forward ----


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_rows_take_their_adapter_by_slices(tmp_path, family):
    """Expert and reference share a forward that indexes nothing, and give what peft's `adapter_names` gives."""
    trainer = make("cpo", family, tmp_path)
    with torch.no_grad():
        for name, parameter in trainer.policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    before = weights(trainer.policy)
    rows = [trainer.train_dataset[index] for index in (0, 1)]
    batch = trainer.data_collator(rows)
    noised = next(trainer.noised_batches(trainer.model, batch))
    trainer.model.train()
    with Operations() as counter:
        frozen = trainer.frozen_predictions(trainer.model, noised)
    indexing = {name: count for name, count in counter.counts.items() if name.startswith("aten.index")}
    conditions = noised.batch["frozen_conditions"]
    with torch.no_grad():
        mixed = partial(trainer.policy.eval(), adapter_names=["expert"] * 4 + ["__base__"] * 2)
        expected = trainer.backbone.predict(
            mixed, torch.cat([noised.noisy_latents] * 3), noised.timesteps.repeat(3), conditions
        )
    assert not indexing
    assert (torch.cat(list(frozen.values())) - expected).abs().max() <= 1e-6
    assert (frozen["chosen_target"] - frozen["ref_pred"]).abs().max() > 1e-3
    assert max_difference(weights(trainer.policy), before) == 0
    assert all(not layer._disable_adapters for layer in trainer.mixer.layers)
