# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What stops a run that cannot learn, what is warned of, and what a trainer leaves as it found it."""

import logging
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import tiny
from tests.tiny import FAST, FLOWS, PIPELINES, UNETS, lora, losses, max_difference, weights
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    attribute_features,
)
from trl_diffusion.data.transforms import normalize_pixels
from trl_diffusion.trainer.callbacks import HealthCallback
from trl_diffusion.trainer.meters import Meters
from trl_diffusion.trainer.reference import check_untrained


def iapo(folder, pipeline=None, dataset=None, **kwargs) -> InstanceDPOTrainer:
    given = {name: kwargs.pop(name) for name in ("eval_dataset", "peft_config", "ref_model") if name in kwargs}
    pipeline = pipeline or tiny.sd_pipeline()
    return InstanceDPOTrainer(
        pipeline,
        args=InstanceDPOConfig(str(folder), **{**FAST, "use_cpu": True, **tiny.settings(pipeline), **kwargs}),
        train_dataset=tiny.pairs() if dataset is None else dataset,
        **given,
    )


@pytest.fixture(scope="module")
def criteria(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("criteria") / "tiny.yaml"
    path.write_text(tiny.CRITERIA)
    return str(path)


@pytest.fixture(scope="module")
def expert(tmp_path_factory, criteria) -> str:
    folder = tmp_path_factory.mktemp("expert")
    args = AttributeSFTConfig(str(folder), criteria=criteria, **{**FAST, "learning_rate": 0.05})
    trainer = AttributeSFTTrainer(tiny.sd_pipeline(), args, train_dataset=tiny.paintings(), peft_config=lora(8, 16))
    trainer.train()
    trainer.save_model()
    return str(folder)


def cpo(folder, expert, criteria, dataset=None, **kwargs) -> ComplexPOTrainer:
    return ComplexPOTrainer(
        tiny.sd_pipeline(),
        expert,
        args=ComplexPOConfig(str(folder), criteria=criteria, **{**FAST, "use_cpu": True, **kwargs}),
        train_dataset=tiny.paintings() if dataset is None else dataset,
        peft_config=lora(),
    )


def some_weight(trainer) -> torch.nn.Parameter:
    """A weight that is trained and gets a gradient in the first step."""
    return [weight for name, weight in trainer.model.named_parameters() if weight.requires_grad and "_A" not in name][
        0
    ]


# ---- Before the optimizer steps ----


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, peft_config, value, max_grad_norm):
    """Although all losses are finite: the message says so and names step and ids, and no weight has moved."""
    settings = {"max_grad_norm": max_grad_norm, "train_sampling_strategy": "sequential"}
    trainer = iapo(tmp_path, peft_config=peft_config, gradient_accumulation_steps=2, **settings)
    some_weight(trainer).register_hook(
        lambda gradient: torch.full_like(gradient, value) if trainer.state.global_step == 1 else gradient
    )
    before = weights(trainer.model)
    message = (
        "The gradient is not finite in step 2, although all losses are.*row-4, row-5, row-6, row-7:.*learning_rate"
    )
    at_step = {}
    optimizer_step = torch.optim.AdamW.step

    def noted(self, *args, **kwargs):
        result = optimizer_step(self, *args, **kwargs)
        at_step[trainer.state.global_step] = weights(trainer.model)
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(torch.optim.AdamW, "step", noted)
        trainer.train()
    assert list(at_step) == [0] and max_difference(at_step[0], before) > 0
    assert max_difference(weights(trainer.model), at_step[0]) == 0


def test_a_loss_that_is_not_finite_names_its_rows(tmp_path):
    """The rows of all micro-batches of the step, and no other."""
    settings = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = iapo(tmp_path, **settings)
    collate = trainer.data_collator

    def poisoned(rows):
        batch = collate(rows)
        batch["rejected_pixel_values"] = normalize_pixels(batch["rejected_pixel_values"])
        for place, row_id in enumerate(batch["id"]):
            if row_id in ("row-1", "row-2"):
                batch["rejected_pixel_values"][place] = float("inf")
        return batch

    trainer.data_collator = poisoned
    before = weights(trainer.model)
    with pytest.raises(
        ValueError, match="not finite in step 1, for the rows with id row-1, row-2. The optimizer has not"
    ):
        trainer.train()
    assert max_difference(weights(trainer.model), before) == 0


def step_with(callback: HealthCallback, gradient_norm: float, loss: float = 0.7, fp16: bool = True) -> None:
    callback.losses.append((["row-a", "row-b"], torch.tensor([0.7, loss]), None))
    callback.gradient_norm = gradient_norm
    callback.on_pre_optimizer_step(SimpleNamespace(fp16=fp16), SimpleNamespace(global_step=4), None)


def test_an_overflow_in_float16_is_left_to_the_scaler(tmp_path):
    """The scaler skips the step and lowers its scale; below 1 it has no room left, and a loss is never its matter."""
    callback = HealthCallback()
    for scale in (65536.0, 1.0):
        callback.scaler = SimpleNamespace(get_scale=lambda scale=scale: scale)
        for norm in (math.inf, math.nan, 1.0):
            step_with(callback, norm)
            assert callback.losses == []
        with pytest.raises(ValueError, match="loss is not finite in step 5, for the rows with id row-b.*bf16=True"):
            step_with(callback, 1.0, loss=math.nan)
    callback.scaler = SimpleNamespace(get_scale=lambda: 0.5)
    step_with(callback, 1.0)
    with pytest.raises(ValueError, match="gradient is not finite in step 5.*row-a, row-b.*bf16=True"):
        step_with(callback, math.inf)
    callback.scaler = None
    with pytest.raises(ValueError, match="gradient is not finite") as error:
        step_with(callback, math.inf, fp16=False)
    assert "fp16" not in str(error.value) and "`learning_rate`" in str(error.value)


# ---- Runs without a step ----


@pytest.mark.parametrize(
    "settings", [{"max_steps": 0}, {"max_steps": -1, "num_train_epochs": 0}], ids=["steps", "epochs"]
)
def test_a_run_without_steps_is_an_error(tmp_path, settings):
    """It says that there is nothing to train, and names what to raise."""
    with pytest.raises(ValueError, match="`max_steps`.*`num_train_epochs`"):
        iapo(tmp_path, **settings).train()


def test_a_run_that_is_done_cannot_be_resumed(tmp_path):
    """Resumed at its last step it has none left; with a later one it goes on."""
    iapo(tmp_path, save_strategy="steps", save_steps=3).train()
    with pytest.raises(
        ValueError, match="has 3 optimizer steps, and 3 of them are done already. Raise `max_steps` or"
    ):
        iapo(tmp_path).train(resume_from_checkpoint=True)
    longer = iapo(tmp_path, max_steps=4)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4


# ---- Warnings ----


def covered(preference: str = "rejected") -> Dataset:
    """Pairs of which an instance covers both images."""

    def cover(row):
        sizes = {column: row[column].size for column in ("chosen", "rejected")}
        boxes = {f"{column}_box": [0, 0, *size] for column, size in sizes.items()}
        return {"instances": [{"label": "x", "preference": preference, **boxes}]}

    return tiny.pairs().map(cover)


@pytest.mark.parametrize("mask_overlap", ["mean", "covering"])
def test_masks_that_are_all_zero_are_warned_of_once(tmp_path, caplog, mask_overlap):
    """The advice names `w_neg`, and another `mask_overlap` only where it is not used already."""
    with caplog.at_level(logging.WARNING):
        trainer = iapo(tmp_path, dataset=covered(), mask_overlap=mask_overlap)
        trainer.train()
    assert caplog.text.count("Every mask is zero since the last log") == 1
    assert "raise `w_neg`" in caplog.text and ("mask_overlap='mean'" in caplog.text) == (mask_overlap == "covering")
    assert losses(trainer) == pytest.approx([math.log(2)] * 3)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        iapo(tmp_path, dataset=covered(), w_neg=0.5).train()
        iapo(tmp_path, dataset=covered("chosen")).train()
    assert "Every mask is zero" not in caplog.text


def long_paintings() -> Dataset:
    """Rows whose prompts leave no room for an attribute."""
    prompt = " ".join(["a"] * 10)
    rows = [
        {**row, "prompt": prompt, "positive_attributes": ["hue"], "negative_attributes": ["kind"]}
        for row in tiny.paintings()
    ]
    return Dataset.from_list(rows, features=attribute_features())


def test_targets_that_coincide_are_warned_of_with_their_reason(tmp_path, expert, criteria, caplog, monkeypatch):
    """Attributes that the prompt's limit cuts off, or an expert for which they are one; else there is no warning."""
    short, blind = "do not fit into the prompt", "does not tell the attributes apart"
    with caplog.at_level(logging.WARNING):
        trainer = cpo(tmp_path, expert, criteria, dataset=long_paintings())
        trainer.train()
    assert caplog.text.count("predictions are equal") == 1 and short in caplog.text and blind not in caplog.text
    assert "For 100% of the samples" in caplog.text
    caplog.clear()
    trainer, encode = cpo(tmp_path, expert, criteria), trainer.backbone.encode_prompts
    monkeypatch.setattr(
        trainer.backbone, "encode_prompts", lambda prompts: {name: 0 * x for name, x in encode(prompts).items()}
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("predictions are equal") == 1 and blind in caplog.text and short not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        cpo(tmp_path, expert, criteria).train()
    assert "predictions are equal" not in caplog.text


@pytest.mark.parametrize("loss_type", ["stabilized", "unstabilized"])
def test_drift_is_warned_of_with_advice_that_is_not_followed_already(tmp_path, expert, criteria, caplog, loss_type):
    """Above 1 and once; a loss that is bounded is not advised where it is used."""
    trainer = cpo(tmp_path, expert, criteria, loss_type=loss_type)
    trainer.model.train()
    for drift, count in ((0.99, 0), (4.0, 1), (9.0, 1)):
        trainer.record({"drift": torch.tensor([drift, drift])})
        with caplog.at_level(logging.WARNING):
            trainer.log({})
        assert caplog.text.count("times as far from the reference's") == count
    assert "are 2.0 times as far" in caplog.text
    assert ("loss_type='stabilized'" in caplog.text) == (loss_type == "unstabilized")
    assert ("lower `reflection_weight`" in caplog.text) == (loss_type == "stabilized")


# ---- The first step ----


SOURCES = ("random", "inversion")
SETTINGS = [(family, source, bf16) for family in UNETS for source in SOURCES for bf16 in (False, True)]
SETTINGS += [(family, "inversion", True) for family in FLOWS]  # the rest of theirs is tested with the first loss


@pytest.mark.parametrize(("family", "noise_source", "bf16"), SETTINGS)
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_an_untrained_policy_is_its_reference_in_every_setting(tmp_path, peft_config, family, noise_source, bf16):
    """Training begins without a complaint."""
    settings = {"noise_source": noise_source, "inversion_steps": 2, "max_steps": 1, "bf16": bf16}
    trainer = iapo(tmp_path, PIPELINES[family](), peft_config=peft_config, **settings)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"target_strength": 1.5, "policy_condition": "positive"}])
def test_an_untrained_policy_of_cpo_is_its_reference(tmp_path, expert, criteria, settings):
    """Also where the reference's prediction is a row of a larger forward."""
    trainer = cpo(tmp_path, expert, criteria, max_steps=1, **settings)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_policy_that_was_changed_before_training_is_an_error(tmp_path, peft_config):
    """Nothing was trained and yet the two differ: no step is made. With a `ref_model` they may."""
    for settings in ({}, {"ref_model": tiny.sd_pipeline()}):
        trainer = iapo(tmp_path, peft_config=peft_config, **settings)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if weight.requires_grad and "lora_A" not in name:
                    weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
        before = weights(trainer.model)
        error = "Policy and reference differ by .*% of their predictions in the first step.*`ref_model`"
        with nullcontext() if settings else pytest.raises(ValueError, match=error):
            trainer.train()
        assert (max_difference(weights(trainer.model), before) > 0) == bool(settings)


def test_a_policy_of_cpo_that_was_changed_before_training_is_an_error(tmp_path, expert, criteria):
    """A forward that is not that of the base stops the first step."""
    trainer = cpo(tmp_path, expert, criteria)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B.default" in name:
                weight.fill_(0.1)
    with pytest.raises(ValueError, match="Policy and reference differ"):
        trainer.train()


def test_a_resumed_run_may_differ_from_its_reference(tmp_path):
    """Only the first step is compared."""
    iapo(tmp_path, peft_config=lora(), learning_rate=0.05, save_strategy="steps", save_steps=2).train()
    resumed = iapo(tmp_path, peft_config=lora(), learning_rate=0.05)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-2), (torch.bfloat16, 5e-2), (torch.float16, 2e-2)])
def test_rounding_is_what_may_differ(dtype, limit):
    """The limit is relative to the size of the predictions; what is not finite is another check's matter."""
    ref_pred = 7 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    check_untrained(ref_pred * (1 + 0.9 * limit), ref_pred, dtype)
    with pytest.raises(ValueError, match="Policy and reference differ"):
        check_untrained(ref_pred * (1 + 1.1 * limit), ref_pred, dtype)
    check_untrained(ref_pred * math.nan, ref_pred * math.nan, dtype)


# ---- Precision ----


class Doubles(TorchDispatchMode):
    """Notes every operation that makes a tensor in float64."""

    def __init__(self):
        super().__init__()
        self.found, self.is_watching = [], True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        is_double = any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result))
        if self.is_watching and is_double:
            self.found.append(str(operation))
        return result


@pytest.mark.parametrize("kind", ["iapo", "iapo_inversion", "sdxl", "cpo"])
def test_nothing_on_the_device_is_float64(tmp_path, monkeypatch, expert, criteria, kind):
    """Some accelerators have no float64: a step, an evaluation and a log need none but in the sums of the log, on the CPU."""
    if kind == "cpo":
        trainer = cpo(tmp_path, expert, criteria, timestep_weighting="min_snr")
    else:
        settings = {"noise_source": "inversion", "inversion_eta": 0.1} if kind == "iapo_inversion" else {}
        trainer = iapo(tmp_path, PIPELINES["sdxl" if kind == "sdxl" else "sd"](), **settings)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 1)])
    averages, doubles, reduced = Meters.averages, Doubles(), []

    def unwatched(self, mode):
        doubles.is_watching = False
        result = averages(self, mode)
        doubles.is_watching = True
        return result

    monkeypatch.setattr(Meters, "averages", unwatched)
    monkeypatch.setattr(Accelerator, "reduce", lambda self, sums: reduced.append(sums.dtype) or sums)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # as the Trainer sets it before a step
    with doubles:
        trainer.model.train()
        trainer.training_step(trainer.model, dict(batch))
        trainer.optimizer.step()
        trainer.log({})
        trainer.model.eval()
        trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=True)
        metrics = trainer.meters.averages("evaluation")
    assert doubles.found == [] and reduced == [torch.float32] * 2
    assert metrics["loss"] > 0


@pytest.mark.parametrize("kind", ["iapo", "cpo"])
def test_losses_errors_and_masks_are_float32_under_bf16(tmp_path, monkeypatch, expert, criteria, kind):
    """Whatever precision the models run in."""
    trainer = iapo(tmp_path, bf16=True) if kind == "iapo" else cpo(tmp_path, expert, criteria, bf16=True)
    recorded, record = {}, trainer.record
    monkeypatch.setattr(trainer, "record", lambda metrics: (recorded.update(metrics), record(metrics))[1])
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 3)])
    trainer.model.train()
    with trainer.accelerator.autocast():  # as the Trainer wraps the policy
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.dtype == outputs["losses"].dtype == torch.float32
    values = {name: value[0] if isinstance(value, tuple) else value for name, value in recorded.items()}
    assert "errors/chosen" in values
    assert {value.dtype for value in values.values() if value.is_floating_point()} == {torch.float32}
    if kind == "iapo":
        assert trainer.prepare_batch(batch, torch.empty(4, 4, 8, 8))["masks"].dtype == torch.float32


# ---- What is left as it was ----


@pytest.mark.parametrize("was_training", [False, True])
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_the_denoiser_comes_back_in_its_mode(tmp_path, peft_config, was_training):
    """After training, evaluation and sampling, and after an error in each."""
    pipeline = tiny.sd_pipeline()
    pipeline.unet.train(was_training)
    settings = {"num_inference_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny.pairs(2)}
    settings |= {"max_steps": 1}
    trainer = iapo(tmp_path, pipeline, peft_config=peft_config, sample_prompts=["a cat"], **settings)
    uses = [trainer.train, trainer.evaluate, lambda: trainer.sample(["a"]), lambda: trainer.sample(["a"], True)]
    for use in uses:
        use()
        assert {module.training for module in trainer.backbone.denoiser.modules()} == {was_training}

    def failing(*args, **kwargs):
        raise RuntimeError("in between")

    trainer.backbone.denoiser.register_forward_pre_hook(failing)
    if trainer.reference.denoiser is not None:
        trainer.reference.denoiser.register_forward_pre_hook(failing)
    for use in uses:
        with pytest.raises(RuntimeError, match="in between"):
            use()
        assert {module.training for module in trainer.backbone.denoiser.modules()} == {was_training}


def test_precomputing_leaves_the_denoiser_in_its_mode(tmp_path):
    """Noised rows are made as in a step, and the denoiser is in its own mode again."""
    pipeline = tiny.sd_pipeline()
    pipeline.unet.eval()
    settings = {"precompute": True, "precompute_dir": str(tmp_path / "cache"), "noise_source": "inversion"}
    trainer = iapo(tmp_path, pipeline, **settings)
    assert not trainer.backbone.denoiser.training


SIZES = [(family, resolution) for family in ("sd", "sdxl", "sd3") for resolution in (None, 64)]


@pytest.mark.parametrize(("family", "resolution"), [*SIZES, ("flux", 64)])
def test_samples_have_the_size_that_is_trained_at(tmp_path, family, resolution):
    """With policy and reference; by default it is the model's own."""
    trainer = iapo(tmp_path, PIPELINES[family](), resolution=resolution, num_inference_steps=1)
    for with_reference in (False, True):
        (image,) = trainer.sample(["a cat"], with_reference=with_reference)
        assert image.size == (resolution or 32,) * 2


@pytest.mark.parametrize("kind", ["full", "lora", "cpo"])
def test_an_evaluation_before_training_runs_in_the_precision_of_training(tmp_path, expert, criteria, kind):
    """Under bf16 an untrained policy is its reference to bf16's rounding, whether or not it was prepared for training."""
    if kind == "cpo":
        trainer = cpo(tmp_path, expert, criteria, bf16=True)
    else:
        trainer = iapo(tmp_path, peft_config=lora() if kind == "lora" else None, bf16=True)
    metrics = trainer.evaluate(tiny.paintings(2) if kind == "cpo" else tiny.pairs(2))
    if kind == "cpo":
        assert metrics["eval_drift"] < 1e-4
    else:
        assert (
            metrics["eval_rewards/margins"] == 0 and metrics["eval_errors/chosen"] == metrics["eval_errors/ref_chosen"]
        )
