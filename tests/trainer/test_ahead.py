# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a step no longer does: making noise and looking up rows, which a thread has done before."""

import threading
from collections import Counter

import pytest
import torch
from transformers import TrainerCallback

from tests import tiny
from tests.tiny import max_difference, weights
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)
from trl_diffusion.data.caching import TensorCache
from trl_diffusion.trainer import ahead as ahead_module
from trl_diffusion.trainer import encoding, noised_batch
from trl_diffusion.trainer.ahead import Ahead, Reader


SETTINGS = {
    **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "use_cpu": True},
    **{"learning_rate": 1e-2, "report_to": "none", "logging_strategy": "no", "save_strategy": "no"},
}


def make_trainer(folder, **settings) -> InstanceDPOTrainer:
    args = InstanceDPOConfig(str(folder), **SETTINGS | settings)
    return InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(7))


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """Calls of `keyed_noise` and of `TensorCache.look_up` in training, by name and whether they ran in the main thread."""
    counts = Counter()
    look_up, keyed_noise = TensorCache.look_up, ahead_module.keyed_noise

    def counted(name, function):
        def count(*args, **kwargs):
            counts[name, threading.current_thread() is threading.main_thread()] += 1
            return function(*args, **kwargs)

        return count

    monkeypatch.setattr(TensorCache, "look_up", counted("rows", look_up))
    for module in (ahead_module, noised_batch):
        monkeypatch.setattr(module, "keyed_noise", counted("noise", keyed_noise))
    assert not hasattr(encoding, "keyed_noise")
    return counts


MODES = {
    "live": ({}, {("noise", False): 8}),
    "precomputed": ({"precompute": True}, {("noise", False): 8, ("rows", False): 4}),
    "noised beforehand": (
        {"precompute": True, "precompute_ref_preds": True},
        {("noise", False): 4, ("rows", False): 8},
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_step_makes_no_noise_and_looks_nothing_up(tmp_path, calls, mode):
    """7 rows in batches of 2 are 4 batches in 2 steps of an epoch: all that they draw and look up comes from the thread."""
    settings, expected = MODES[mode]
    folder = {"precompute_dir": str(tmp_path / "cache")} if settings else {}
    trainer = make_trainer(tmp_path, num_train_epochs=1, **settings, **folder)
    calls.clear()
    trainer.train()
    assert trainer.state.global_step == 2
    assert dict(calls) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precompute": True, "prompt_dropout": 0.5},
        {"precompute": True, "precompute_ref_preds": True},
        {"noise_source": "inversion", "inversion_steps": 4},
        {"max_steps": 3, "dataloader_num_workers": 1},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=["live", "dropout", "noised", "inversion", "workers", "evaluation"],
)
def test_the_numbers_are_those_of_a_training_without_it(tmp_path, monkeypatch, settings):
    """Weights after the training are bit for bit those of a training that makes everything in its step."""
    if "precompute" in settings:
        settings = settings | {"precompute_dir": str(tmp_path / "cache")}
    ends = []
    for is_ahead in (True, False):
        if not is_ahead:
            monkeypatch.setattr(Ahead, "plan", lambda *args: None)
        args = InstanceDPOConfig(str(tmp_path), **SETTINGS | settings)
        rows = tiny.pairs(7)
        trainer = InstanceDPOTrainer(
            tiny.sd_pipeline(), args=args, train_dataset=rows, eval_dataset=rows.select([0, 1])
        )
        trainer.train()
        ends.append(torch.cat([weight.flatten() for weight in trainer.model.parameters()]))
    assert torch.equal(*ends)


def test_each_batch_is_trained_on_once_in_its_order(tmp_path):
    """Reading one batch ahead loses and repeats none, in whole and in broken steps, across epochs."""
    trainer = make_trainer(tmp_path, train_sampling_strategy="sequential")
    compute_loss, seen = trainer.compute_loss, []

    def noted(model, inputs, *args, **kwargs):
        seen.append((trainer.state.global_step, [int(row_id.removeprefix("row-")) for row_id in inputs["id"]]))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = noted
    trainer.train()
    assert seen == [
        *[(0, [0, 1]), (0, [2, 3]), (1, [4, 5]), (1, [6])],
        *[(2, [0, 1]), (2, [2, 3]), (3, [4, 5]), (3, [6])],
    ]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("trl_diffusion_ahead")]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        assert len(threads()) == 1
        raise KeyboardInterrupt


def test_no_thread_outlives_a_training(tmp_path):
    """One thread while it lasts; neither a training that ends nor one that is interrupted leaves it, or what it made."""
    for is_interrupted in (False, True):
        trainer = make_trainer(tmp_path, num_train_epochs=1)
        assert not threads(), "it starts with the training"
        if is_interrupted:
            trainer.add_callback(Stop)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train()
        assert not threads()
        assert trainer.encoder.ahead.made is None and not trainer.encoder.ahead.coming


def test_a_mistake_in_the_thread_is_raised_by_the_step(tmp_path, monkeypatch):
    """An error of a look-up is not lost in the thread."""
    trainer = make_trainer(tmp_path, precompute=True, precompute_dir=str(tmp_path / "cache"))

    def failing(cache, keys, pin_memory=False):
        raise OSError("the disk is gone")

    monkeypatch.setattr(TensorCache, "look_up", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()


def test_both_stages_of_cpo_look_up_in_the_thread(tmp_path, monkeypatch, calls):
    """4 rows in batches of 2: one look-up a batch for the prompts of expert and policy, dropped or not; the weights stay."""
    (tmp_path / "criteria.yaml").write_text(tiny.CRITERIA)
    settings = SETTINGS | {"gradient_accumulation_steps": 1, "num_train_epochs": 1, "prompt_dropout": 0.5}
    settings |= {"precompute": True, "precompute_dir": str(tmp_path / "cache")}
    settings |= {"criteria": str(tmp_path / "criteria.yaml")}
    ends = []
    for is_ahead in (True, False):
        if not is_ahead:
            monkeypatch.setattr(Ahead, "plan", lambda *args: None)
        pipeline, rows = tiny.sd_pipeline(), tiny.paintings(4)
        expert = AttributeSFTTrainer(
            pipeline, AttributeSFTConfig(str(tmp_path / "expert"), **settings), train_dataset=rows
        )
        trainers = [expert]
        expert.train()
        expert.save_model()
        args = ComplexPOConfig(str(tmp_path / "policy"), **settings)
        trainers.append(ComplexPOTrainer(tiny.sd_pipeline(), str(tmp_path / "expert"), args, train_dataset=rows))
        trainers[1].train()
        ends.append([weights(trainer.model) for trainer in trainers])
        in_thread = not is_ahead
        assert dict(calls) == {("noise", in_thread): 8, ("rows", in_thread): 4}
        calls.clear()
    for ahead, alone in zip(*ends, strict=True):
        assert max_difference(ahead, alone) == 0


def test_a_reader_tells_what_comes_next():
    """Peeking takes nothing; at the end there is nothing to see, however often one looks."""
    reader = Reader(iter([{"id": 1}, {"id": 2}]))
    assert reader.peek() == reader.peek() == [{"id": 1}]
    assert next(reader) == {"id": 1} and next(reader) == {"id": 2}
    assert reader.peek() == reader.peek() == []
    with pytest.raises(StopIteration):
        next(reader)
