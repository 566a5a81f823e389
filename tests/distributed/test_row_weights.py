# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import itertools

import pytest
import torch

from tests import tiny
from tests.cli.processes import run_distributed
from tests.distributed.row_weights import ROWS, make_trainer, run_all, train
from trl_diffusion.data.padding import as_padding


TRAININGS = ["memory", "resumed", "averaged", "stream", "shuffled stream", "short stream", "buckets", "last dropped"]
EVALUATIONS = ["evaluate memory", "evaluate stream", "predict memory", "predict stream"]


def assert_same_training(one: dict, other: dict) -> None:
    """The same weights to 1e-6, which moved by far more, and the same logs."""
    assert tiny.max_difference(one["end"], other["end"]) <= 1e-6
    assert tiny.max_difference(one["end"], one["start"]) > 1e-2
    for first, second in zip(one["logs"], other["logs"], strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"grad_norm", "epoch"}:
            assert first[name] == pytest.approx(second[name], abs=1e-5, rel=1e-5), name


def test_accumulation_and_processes_cut_rows_alike(tmp_path):
    """
    Two processes with a batch of 1 and 2 accumulations equal one with a batch of 4 in weights, logs, the order of rows in
    every step, and evaluations: rows in memory and in a stream, resumed within an epoch, and in buckets.
    """
    for ended in run_distributed(["-m", "tests.distributed.row_weights", tmp_path]):
        assert ended.returncode == 0, ended.stderr
    two = [torch.load(tmp_path / f"process-{rank}.pt", weights_only=False) for rank in (0, 1)]
    one = run_all(tmp_path / "one", batch_size=4, accumulation=1, bucket_accumulation=2)

    for name in TRAININGS:
        assert_same_training(one[name], two[0][name])
        assert tiny.max_difference(two[0][name]["end"], two[1][name]["end"]) == 0
        size = 2 if name in ("buckets", "last dropped") else 1
        for alone, first, second in zip(one[name]["steps"], two[0][name]["steps"], two[1][name]["steps"], strict=True):
            chunks = (_chunks(rows, size) for rows in (first, second))
            both = [row for pair in itertools.zip_longest(*chunks, fillvalue=()) for chunk in pair for row in chunk]
            assert both == alone, name
    for name in EVALUATIONS:
        assert one[name] == pytest.approx(two[0][name], abs=1e-6), name
        assert one[name] == pytest.approx(one["evaluate memory"], abs=1e-6), name

    # Every row once an epoch
    for name, rows in (("memory", 7), ("stream", 7), ("shuffled stream", 7), ("short stream", 5), ("buckets", 10)):
        steps = one[name]["steps"]
        for first, second, *third in itertools.zip_longest(*[iter(steps)] * (3 if name == "buckets" else 2)):
            assert sorted(sum(third, [*first, *second])) == sorted(f"row-{index}" for index in range(rows)), name
    assert one["memory"]["steps"][3:] == one["resumed"]["steps"]
    for runs in (one, *two):
        assert tiny.max_difference(runs["memory"]["end"], runs["resumed"]["end"]) == 0
    assert (
        len({tuple(sum(one["memory"]["steps"][start : start + 2], [])) for start in (0, 2, 4)}) == 3
    )  # shuffled anew


def _chunks(rows: list, size: int) -> list[list]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.mark.parametrize("kind", ["memory", "stream", "short stream"])
def test_accumulation_equals_a_larger_batch(tmp_path, kind):
    """Rows that fill neither the last batch nor the last step weigh no more: batches of 2, accumulated twice, equal 4."""
    dataset = tiny.pairs(5 if kind == "short stream" else ROWS)
    dataset = dataset if kind == "memory" else dataset.to_iterable_dataset()
    whole = train(tmp_path, dataset, per_device_train_batch_size=4)
    for batch_size in (1, 2):
        cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        parts = train(tmp_path, dataset, **cut)
        assert_same_training(whole, parts)
        assert whole["steps"] == parts["steps"]


def test_the_logged_loss_is_the_mean_over_rows(tmp_path):
    """Steps of 4 and of 3 rows, logged together: each row weighs a seventh."""
    each = train(tmp_path, tiny.pairs(ROWS), per_device_train_batch_size=4)["logs"]
    both = train(tmp_path, tiny.pairs(ROWS), per_device_train_batch_size=4, logging_steps=2)["logs"]
    for name in ("loss", "rewards/margins"):
        for first, second, mean in zip(each[::2], each[1::2], both, strict=True):
            assert mean[name] == pytest.approx((4 * first[name] + 3 * second[name]) / 7, abs=1e-6)
        assert any(
            abs(mean[name] - (a[name] + b[name]) / 2) > 1e-4
            for a, b, mean in zip(each[::2], each[1::2], both, strict=True)
        )


def test_a_batch_of_padding_counts_nothing(tmp_path):
    """Its loss and every gradient are exactly zero, and no metric knows it; the same rows unmarked have all of these."""
    trainer = make_trainer(tmp_path, tiny.pairs(ROWS))
    trainer.create_optimizer_and_scheduler(1)
    batch = trainer.data_collator([tiny.pairs(2)[row] for row in range(2)])
    assert trainer.training_step(trainer.model, as_padding(batch), torch.tensor(5)) == 0
    assert all(parameter.grad.eq(0).all() for parameter in trainer.model.parameters())
    assert trainer.meters.averages("train") == {}
    assert trainer.training_step(trainer.model, batch, torch.tensor(5)) > 0
    assert any(parameter.grad.ne(0).any() for parameter in trainer.model.parameters())
    assert "rewards/margins" in trainer.meters.averages("train")


def test_rows_beside_padding_are_all_that_counts(tmp_path):
    """A batch of a row and a padding row has the row's loss, gradient and metrics."""
    gradients, metrics = [], []
    for padded in (False, True):
        trainer = make_trainer(tmp_path, tiny.pairs(ROWS))
        trainer.create_optimizer_and_scheduler(1)
        with torch.no_grad():
            trainer.model.conv_out.bias.add_(0.1)
        trainer.reference_is_initial_policy = False  # it was moved on purpose
        rows = [tiny.pairs(2)[row] for row in range(1 + padded)]
        batch = trainer.data_collator(rows)
        if padded:
            batch["is_padding"] = torch.tensor([False, True])
        loss = trainer.training_step(trainer.model, batch, torch.tensor(1))
        gradients.append({name: parameter.grad for name, parameter in trainer.model.named_parameters()})
        metrics.append({**trainer.meters.averages("train"), "step": loss.item()})
    assert tiny.max_difference(*gradients) <= 1e-6
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    assert metrics[0]["rewards/margins"] != 0 and metrics[0]["masks/area"] == 0


@pytest.mark.parametrize("train_is_stream", [False, True], ids=["rows", "stream"])
def test_streams_and_rows_in_memory_mix(tmp_path, train_is_stream):
    """Whatever is trained on, an evaluation of a stream gives what the same rows in memory give, by every door."""
    rows, few = tiny.pairs(ROWS), tiny.pairs(3)
    stream = few.to_iterable_dataset()
    trainer = make_trainer(
        tmp_path,
        rows.to_iterable_dataset() if train_is_stream else rows,
        {"rows": few, "stream": stream},
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.train()
    logged = [{k: v for k, v in entry.items() if k.startswith("eval_")} for entry in trainer.state.log_history]
    logged = [entry for entry in logged if entry]
    assert len(logged) == 4
    for first, second in zip(logged[::2], logged[1::2], strict=True):
        for name in ("loss", "rewards/margins", "errors/chosen"):
            assert first[f"eval_rows_{name}"] == pytest.approx(second[f"eval_stream_{name}"], abs=1e-6)
    expected = logged[2]["eval_rows_loss"]
    unnumbered = few.remove_columns("id")
    assert trainer.evaluate(few)["eval_loss"] == trainer.evaluate(stream)["eval_loss"] == pytest.approx(expected)
    assert trainer.predict(few).metrics["test_loss"] == trainer.predict(stream).metrics["test_loss"]
    assert trainer.predict(few).metrics["test_loss"] == pytest.approx(expected)
    assert trainer.evaluate(unnumbered)["eval_loss"] == trainer.predict(unnumbered).metrics["test_loss"]
    with pytest.raises(ValueError, match="`test_dataset` lacks the column `chosen`"):
        trainer.predict(few.remove_columns("chosen"))


def test_workers_that_persist_read_the_dataset_that_is_asked_for(tmp_path):
    """Each evaluation is of its own rows, as without workers, whatever was evaluated before."""
    losses = []
    for settings in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        trainer = make_trainer(tmp_path, tiny.pairs(ROWS), tiny.pairs(2), **settings)
        with torch.no_grad():
            trainer.model.conv_out.bias.add_(0.1)
        trainer.reference_is_initial_policy = False  # it was moved on purpose
        datasets = (None, tiny.pairs(3), tiny.pairs(3).to_iterable_dataset(), tiny.pairs(1), None)
        losses.append([trainer.evaluate(dataset)["eval_loss"] for dataset in datasets])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_batches_that_the_main_process_cuts_are_refused(tmp_path):
    """`dispatch_batches=True` is an error that names it."""
    with pytest.raises(ValueError, match="`accelerator_config` has `dispatch_batches=True`"):
        make_trainer(tmp_path, tiny.pairs(ROWS), accelerator_config={"dispatch_batches": True})
