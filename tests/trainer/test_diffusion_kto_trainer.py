# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, IterableDataset, Value
from PIL import Image

from tests import tiny
from tests.cli.processes import COMMAND, run, run_distributed
from trl_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer, labelled_image_features, unpair_pairs
from trl_diffusion.data.padding import IS_PADDING
from trl_diffusion.randomness import keyed_noise
from trl_diffusion.trainer.row_randomness import NUM_EVAL_TIMESTEPS


SETTINGS = {
    **tiny.FAST,
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 0.0,
    "beta": 20.0,
    "use_cpu": True,
}
ONE_LABEL = [False, False, True, True, True, False, True]  # batches of two of one label, and mixed ones


def labelled(num_rows: int = 7) -> Dataset:
    """Images with labels of both kinds, an odd number of them."""
    return unpair_pairs(tiny.pairs(4)).select(range(num_rows))


def make_trainer(
    folder: Path, dataset: Dataset | IterableDataset, kind: str = "sd", is_lora: bool = False, **settings
):
    pipeline = tiny.PIPELINES[kind]()
    args = DiffusionKTOConfig(str(folder), **SETTINGS | tiny.settings(pipeline) | settings)
    lora = tiny.lora() if is_lora else None
    return DiffusionKTOTrainer(pipeline, args=args, train_dataset=dataset, eval_dataset=labelled(), peft_config=lora)


def train(folder: Path, dataset: Dataset | IterableDataset, resume_from: int | None = None, **settings) -> dict:
    """The weights that a training starts from and ends on, and what it logs."""
    trainer = make_trainer(folder, dataset, **settings)
    start = tiny.weights(trainer.model)
    trainer.train(resume_from_checkpoint=resume_from and str(folder / f"checkpoint-{resume_from}"))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"start": start, "end": tiny.weights(trainer.model), "logs": logs}


def assert_same(one: dict, other: dict) -> None:
    """The same weights to 1e-6, which moved by far more, and the same logs, of which some have a KL."""
    assert tiny.max_difference(one["end"], other["end"]) <= 1e-6
    assert tiny.max_difference(one["end"], one["start"]) > 1e-2
    assert any(entry["kl"] > 1e-3 for entry in one["logs"])
    for first, second in zip(one["logs"], other["logs"], strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"grad_norm", "epoch"}:
            assert first[name] == pytest.approx(second[name], abs=1e-4, rel=1e-4), name


# ---- one KL for a step, however it is cut ----


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_one_kl_for_all_micro_batches(tmp_path, kind):
    """Batches of 4, of 2 accumulated twice and of 1 accumulated 4 times train the same: 7 rows, so some steps have 3."""
    dataset = labelled() if kind == "memory" else labelled().to_iterable_dataset()
    whole = train(tmp_path, dataset, per_device_train_batch_size=4, max_steps=4)
    for batch_size in (1, 2):
        cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        assert_same(whole, train(tmp_path, dataset, max_steps=4, **cut))


def test_a_kl_for_each_micro_batch_would_differ(tmp_path, monkeypatch):
    """The test above can fail: without the look ahead, 2 x 2 is another training than 1 x 4."""
    whole = train(tmp_path, labelled(), per_device_train_batch_size=4, max_steps=4)
    monkeypatch.setattr(DiffusionKTOTrainer, "_look_ahead", lambda self, batches: None)
    cut = train(tmp_path, labelled(), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4)
    assert tiny.max_difference(whole["end"], cut["end"]) > 1e-5


def test_the_kl_is_the_mean_reward_of_the_step(tmp_path):
    """Of all rows of a step, at least 0: logged rewards of both labels, weighted by their rows, are its mean."""
    logs = train(tmp_path, labelled(), gradient_accumulation_steps=2, max_steps=8)["logs"]
    assert sum(entry["kl"] > 0 for entry in logs) >= 2
    for entry in logs:
        share = entry["labels/desirable"]
        mean = share * entry.get("rewards/chosen", 0) + (1 - share) * entry.get("rewards/rejected", 0)
        assert entry["kl"] == pytest.approx(max(0, mean), abs=1e-5)


def test_the_reference_is_asked_once(tmp_path, monkeypatch):
    """A step of two micro-batches asks the reference for each once, and the policy twice; one of a single batch, once."""
    for accumulation, policy_calls in ((1, 1), (2, 4)):
        trainer = make_trainer(tmp_path, labelled(4), gradient_accumulation_steps=accumulation, max_steps=1)
        calls = {"frozen_predictions": 0, "predict_with_policy": 0}
        for name in calls:
            method = getattr(trainer, name)

            def counted(*args, name=name, method=method, calls=calls):
                calls[name] += 1
                return method(*args)

            monkeypatch.setattr(trainer, name, counted)
        trainer.train()
        assert calls == {"frozen_predictions": accumulation, "predict_with_policy": policy_calls}


def run_all(folder: Path, batch_size: int, accumulation: int) -> dict:
    cut = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    trainer = make_trainer(folder / "evaluated", labelled(), per_device_eval_batch_size=2)
    moved(trainer)
    return {
        "memory": train(folder / "memory", labelled(), **cut),
        "stream": train(folder / "stream", labelled().to_iterable_dataset(), **cut),
        "evaluation": {name: trainer.evaluate()[f"eval_{name}"] for name in ("loss", "kl", "rewards/margins")},
    }


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one(tmp_path, accumulation):
    """Two processes with parts of a step and one with all of it: one KL, the same weights, the same evaluation."""
    command = ["-m", "tests.trainer.test_diffusion_kto_trainer", tmp_path, 2 // accumulation, accumulation]
    for ended in run_distributed(command):
        assert ended.returncode == 0, ended.stderr
    two = [torch.load(tmp_path / f"process-{rank}.pt", weights_only=False) for rank in (0, 1)]
    one = run_all(tmp_path / "one", 4, 1)
    for name in ("memory", "stream"):
        assert_same(one[name], two[0][name])
        assert tiny.max_difference(two[0][name]["end"], two[1][name]["end"]) == 0
    assert one["evaluation"] == pytest.approx(two[0]["evaluation"], abs=1e-6)


# ---- evaluation ----


def moved(trainer: DiffusionKTOTrainer) -> None:
    """Moves the policy away from its reference."""
    with torch.no_grad():
        trainer.model.conv_out.bias.add_(torch.linspace(-0.3, 0.4, 4))
    trainer.reference_is_initial_policy = False  # it was moved on purpose


def test_an_evaluation_has_the_kl_of_its_dataset(tmp_path):
    """
    Batches of 1, 2 and 7 give the same loss, which is that of the formula over all rows at each timestep, from their recorded rewards.
    """
    trainer = make_trainer(tmp_path, labelled(), "sd3", learning_rate=0.1, per_device_train_batch_size=7)
    trainer.train()
    trainer.args.beta = 200.0
    rewards, losses = [], trainer._losses

    def noted(judged, kl):
        if len(judged.rewards) == 1:
            rewards.append((judged.rewards.item(), judged.desirable.item()))
        return losses(judged, kl)

    trainer._losses = noted
    found = []
    for batch_size in (1, 2, 7):
        trainer.args.per_device_eval_batch_size = batch_size
        found.append({name: trainer.evaluate()[f"eval_{name}"] for name in ("loss", "kl", "rewards/margins")})
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)

    each = torch.tensor(rewards[: 7 * NUM_EVAL_TIMESTEPS]).reshape(7, NUM_EVAL_TIMESTEPS, 2)
    values, signs = each[..., 0], 2 * each[..., 1] - 1
    kls = values.mean(dim=0).clamp(min=0)
    assert found[0]["kl"] == pytest.approx(kls.mean().item(), rel=1e-5) and kls.max() > 0.1
    expected = (1 - torch.sigmoid(signs * (values - kls))).mean().item()
    assert found[0]["loss"] == pytest.approx(expected, rel=1e-5)
    without = (1 - torch.sigmoid(signs * values)).mean().item()
    assert abs(expected - without) > 1e-4


# ---- labels ----


def with_labels(labels: list[bool]) -> Dataset:
    return labelled().remove_columns("label").add_column("label", labels)


def assert_starts_at_one_half(logs: dict[str, float], prefix: str = "") -> None:
    """1 - sigma(0) = 1/2, where no reward is."""
    assert logs[f"{prefix}loss"] == pytest.approx(0.5, abs=1e-5)
    assert logs[f"{prefix}kl"] == pytest.approx(0, abs=1e-5)


def assert_saves(trainer: DiffusionKTOTrainer, is_lora: bool) -> None:
    trainer.save_model(folder := trainer.args.output_dir)
    assert (Path(folder) / ("pytorch_lora_weights.safetensors" if is_lora else "model_index.json")).exists()


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_trains(tmp_path, is_lora):
    """It starts at one half and learns: the margin of its evaluation grows."""
    settings = {"learning_rate": 3.0 if is_lora else 0.02, "max_steps": 60, "per_device_train_batch_size": 7}
    trainer = make_trainer(tmp_path, labelled(), is_lora=is_lora, **settings)
    before = trainer.evaluate()
    trainer.train()
    assert_starts_at_one_half(before, "eval_")
    assert_starts_at_one_half(trainer.state.log_history[0])
    assert trainer.evaluate()["eval_rewards/margins"] > before["eval_rewards/margins"] + 1e-3
    assert_saves(trainer, is_lora)


def stripes(num_rows: int, first: int = 0) -> Dataset:
    """Stripes across are desirable, stripes down are not; every image has noise of its own."""
    rows = []
    for index in range(first, first + num_rows):
        pixels = 40 + np.random.default_rng(index).integers(0, 40, (32, 32, 3), dtype=np.uint8)
        pixels[np.arange(32) // 4 % 2 == 0] += 175
        image = Image.fromarray(pixels if index % 2 else pixels.transpose(1, 0, 2))
        rows.append({"id": f"row-{index}", "prompt": "a cat", "image": image, "label": bool(index % 2)})
    return Dataset.from_list(rows, features=labelled_image_features())


@torch.no_grad()
def margin_by_hand(trainer: DiffusionKTOTrainer, rows: Dataset) -> float:
    """The margin of an evaluation, from the networks of Stable Diffusion 3 and the formula of a rectified flow."""
    pipeline, policy = tiny.sd3_pipeline(), trainer.policy.eval()
    conditions = pipeline.encode_prompt("a cat", None, None, do_classifier_free_guidance=False, max_sequence_length=16)
    latents = tiny.latents(trainer, trainer.data_collator(list(rows)))
    rewards = {True: [], False: []}
    for row, clean in zip(rows, latents.split(1), strict=True):
        for timestep in trainer.process.evaluation_timesteps(NUM_EVAL_TIMESTEPS, (8, 8)):
            noise = keyed_noise([(trainer.args.seed, "eval", row["id"], "", timestep)], (4, 8, 8))
            inputs = (1 - timestep / 1000) * clean + timestep / 1000 * noise, conditions[0], conditions[2]
            errors = [
                (denoiser(*inputs, torch.tensor([timestep]))[0] - (noise - clean)).square().mean().item()
                for denoiser in (policy, pipeline.transformer.eval())
            ]
            rewards[row["label"]].append(trainer.args.beta / 2 * (errors[1] - errors[0]))
    return sum(rewards[True]) / len(rewards[True]) - sum(rewards[False]) / len(rewards[False])


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_a_flow_learns_what_is_desirable(tmp_path, is_lora):
    """On images that it has not seen, for several draws of the noise, its margin grows; the weights give the same by hand."""
    settings = {"optim": "adamw_torch", "learning_rate": 0.03 if is_lora else 0.01, "max_steps": 30}
    settings |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    trainer, unseen = make_trainer(tmp_path, stripes(16), "sd3", is_lora, **settings), stripes(16, first=16)
    assert_starts_at_one_half(trainer.evaluate(unseen), "eval_")
    trainer.train()
    found = trainer.evaluate(unseen)
    assert found["eval_rewards/margins"] == pytest.approx(margin_by_hand(trainer, unseen), rel=1e-3)
    draws = [found]
    for seed in range(3):
        trainer.randomness.seed = seed
        draws.append(trainer.evaluate(unseen))
    assert all(logs["eval_rewards/margins"] > 0.2 and logs["eval_loss"] < 0.49 for logs in draws), draws
    assert_saves(trainer, is_lora)


@pytest.mark.parametrize("loss_type", ["log_sigmoid", "risk_seeking"])
def test_other_utilities_start_at_ln_2(tmp_path, loss_type):
    """At no reward, -log sigma(0) = ln 2, and log sigma(0) = -ln 2; then the loss falls."""
    logs = train(tmp_path, labelled(), loss_type=loss_type, per_device_train_batch_size=7, max_steps=3)["logs"]
    assert abs(logs[0]["loss"]) == pytest.approx(0.6931472, abs=1e-6)
    assert (logs[0]["loss"] > 0) == (loss_type == "log_sigmoid")


def test_batches_of_one_label(tmp_path):
    """Steps whose rows are all desirable, or none, have the rewards of that label alone, and a finite loss."""
    order = {"train_sampling_strategy": "sequential", "max_steps": 4}
    logs = train(tmp_path, with_labels(ONE_LABEL), **order)["logs"]
    assert [entry["labels/desirable"] for entry in logs] == [0, 1, 0.5, 1]
    for entry in logs:
        names = {name for name in ("chosen", "rejected", "margins") if f"rewards/{name}" in entry}
        assert (
            names
            == {0: {"rejected"}, 1: {"chosen"}, 0.5: {"chosen", "rejected", "margins"}}[entry["labels/desirable"]]
        )
        assert 0 < entry["loss"] < 1


def test_reversed_labels(tmp_path):
    """`reverse_preference` is the training on the labels swapped."""
    labels = labelled()["label"][:]
    swapped = train(tmp_path, with_labels([not label for label in labels]))
    reversed_ = train(tmp_path, labelled(), reverse_preference=True)
    assert tiny.max_difference(swapped["end"], reversed_["end"]) == 0
    assert tiny.max_difference(swapped["end"], train(tmp_path, labelled())["end"]) > 1e-3


def test_weights_of_labels(tmp_path):
    """A weight of 0 leaves the rows of its label out of the gradient; twice the weight is twice the first step."""
    one_step = {"per_device_train_batch_size": 7, "max_steps": 1, "lr_scheduler_type": "constant"}
    ends = {}
    for weights in ((1, 1), (2, 0), (1, 0), (0, 1)):
        settings = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
        run_ = train(tmp_path, labelled(), **one_step, **settings)
        ends[weights] = {name: run_["end"][name] - run_["start"][name] for name in run_["end"]}
    both = {name: ends[1, 0][name] + ends[0, 1][name] for name in ends[1, 0]}
    twice = {name: 2 * value for name, value in ends[1, 0].items()}
    assert tiny.max_difference(both, ends[1, 1]) <= 1e-6
    assert tiny.max_difference(twice, ends[2, 0]) <= 1e-6
    assert max(value.abs().max() for value in ends[1, 0].values()) > 1e-3


# ---- what all trainers have ----


def test_resumes_and_repeats(tmp_path):
    """A resumed training ends on the weights of an uninterrupted one, and two runs are identical, with accumulation too."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = train(tmp_path / "first", labelled(), **settings)
    again = train(tmp_path / "again", labelled(), **settings)
    resumed = train(tmp_path / "first", labelled(), resume_from=2, **settings)
    assert tiny.max_difference(first["end"], again["end"]) == 0
    assert tiny.max_difference(first["end"], resumed["end"]) == 0
    assert [entry["loss"] for entry in first["logs"]] == [entry["loss"] for entry in again["logs"]]


@pytest.mark.parametrize(
    "settings",
    [
        {"precompute": True, "precompute_ref_preds": True, "gradient_accumulation_steps": 2},
        {"noise_source": "inversion", "inversion_steps": 2, "gradient_accumulation_steps": 2},
        {"prompt_dropout": 0.5, "random_flip": True, "gradient_accumulation_steps": 2},
        {"aspect_ratio_buckets": True, "resolution": 32, "gradient_accumulation_steps": 2},
    ],
    ids=["precomputed", "inversion", "dropout", "buckets"],
)
def test_with_what_all_trainers_have(tmp_path, settings):
    """It trains, evaluates and has a card."""
    cache = {"precompute_dir": str(tmp_path / "cache")} if "precompute" in settings else {}
    trainer = make_trainer(tmp_path / "out", labelled(), **settings, **cache)
    start = tiny.weights(trainer.model)
    trainer.train()
    assert tiny.max_difference(start, tiny.weights(trainer.model)) > 1e-4
    assert trainer.evaluate()["eval_loss"] != 0.5
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Diffusion-KTO" in card and "2404.04465" in card


def test_precomputed_equals_on_the_fly(tmp_path):
    """Precomputed latents, labels and predictions give the same training."""
    settings = {"precompute": True, "precompute_dir": str(tmp_path / "cache")}
    plain, precomputed = train(tmp_path, labelled()), train(tmp_path, labelled(), **settings)
    assert tiny.max_difference(plain["end"], precomputed["end"]) <= 1e-5


def test_padding_counts_nothing(tmp_path):
    """A padding row changes neither the KL nor the loss nor a gradient."""
    results = []
    for padded in (False, True):
        trainer = make_trainer(tmp_path, labelled())
        trainer.create_optimizer_and_scheduler(1)
        moved(trainer)
        batch = trainer.data_collator([labelled()[index] for index in range(2 + padded)])
        if padded:
            batch[IS_PADDING] = torch.tensor([False, False, True])
        loss = trainer.training_step(trainer.model, batch, torch.tensor(2))
        gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
        results.append((loss.item(), trainer.meters.averages("train"), gradients))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-5)
    assert tiny.max_difference(results[0][2], results[1][2]) <= 1e-6


# ---- mistakes ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "`beta` must be positive"),
        ({"loss_type": "sigmoid"}, "`loss_type`"),
        ({"desirable_weight": -1.0}, "`desirable_weight` must be at least 0"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "both 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionKTOConfig(str(tmp_path), **settings)


def test_datasets_that_cannot_be_read(tmp_path):
    """Pairs, names for labels, other numbers and nulls are refused with the way out, which works; 1 and 0 are labels."""
    with pytest.raises(ValueError, match="`trl_diffusion.unpair_pairs` makes the columns"):
        make_trainer(tmp_path, tiny.pairs(4))
    numbers = labelled().cast_column("label", Value("int64"))
    assert tiny.max_difference(train(tmp_path, numbers)["end"], train(tmp_path, labelled())["end"]) == 0
    names = labelled().cast_column("label", ClassLabel(names=["desirable", "undesirable"]))
    with pytest.raises(ValueError, match=r"`label` of `train_dataset` must contain true .*ClassLabel"):
        make_trainer(tmp_path, names)
    for wrong in ([True, None, False, None, True, True, False], [1, -1, 0, -1, 1, 1, 0]):
        dataset = with_labels(wrong)
        with pytest.raises(ValueError, match=f"in 2 of the 7 rows of `train_dataset`: it is {wrong[1]} in row 1"):
            make_trainer(tmp_path, dataset)
        make_trainer(tmp_path, dataset.filter(lambda row: row["label"] in (0, 1)))
        stream = make_trainer(tmp_path, dataset.to_iterable_dataset(), per_device_train_batch_size=7)
        with pytest.raises(
            ValueError, match=f"`label` of the row with id 'row-0/rejected' must be .*, got {wrong[1]}"
        ):
            stream.train()
    with pytest.raises(ValueError, match="lacks the column 'label'|lacks the column `label`"):
        make_trainer(tmp_path, labelled().remove_columns("label"))


def test_one_label_is_warned_of(tmp_path, caplog):
    """A dataset of one label trains, after a warning; one of both labels has none."""
    with caplog.at_level(logging.WARNING, "trl_diffusion.data.labels"):
        make_trainer(tmp_path, labelled())
        assert not [record for record in caplog.records if record.name == "trl_diffusion.data.labels"]
        trainer = make_trainer(tmp_path, with_labels([True] * 7))
    assert "Every row of `train_dataset` is desirable" in caplog.text
    trainer.train()
    logs = {"labels/desirable": 1.0}
    assert trainer.health_warnings(logs) == {}  # of two rows
    trainer.args.per_device_train_batch_size = 64
    assert "had the same label" in trainer.health_warnings(logs)["labels"]
    assert trainer.health_warnings({"labels/desirable": 0.5}) == {}


def test_from_the_command_line(tmp_path):
    """`check-dataset` accepts the dataset and counts its labels, and `diffusion-kto` trains on it from a file of settings."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    labelled().to_parquet(tmp_path / "labelled.parquet")
    report = tmp_path / "report.json"
    checked = run(
        ["-c", COMMAND, "check-dataset", "--dataset_name", tmp_path / "labelled.parquet", "--output", report]
    )
    assert checked.returncode == 0, checked.stderr
    assert "labels: desirable 4, undesirable 3" in checked.stdout and "Nothing is wrong." in checked.stdout
    assert json.loads(report.read_text())["holds"]["labels"] == {"desirable": 4, "undesirable": 3}
    settings = {
        "model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "labelled.parquet", "max_steps": 1,
        "use_peft": "true", "lora_r": 4, "report_to": "none", "resolution": 32, "output_dir": tmp_path / "out",
    }  # fmt: skip
    (tmp_path / "kto.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    trained = run(["-c", COMMAND, "diffusion-kto", "--config", tmp_path / "kto.yaml", "--loss_type", "log_sigmoid"])
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = run_all(Path(sys.argv[1]) / "two", *map(int, sys.argv[2:]))
    torch.save(found, Path(sys.argv[1]) / f"process-{PartialState().process_index}.pt")
