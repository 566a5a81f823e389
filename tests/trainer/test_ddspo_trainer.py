# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import logging
import math

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from tests import by_hand, families, tiny
from tests.tiny import PIPELINES, lora, max_difference, weights
from trl_diffusion import DDSPOConfig, DDSPOTrainer, InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import load_backbone
from trl_diffusion.degraded_prompts import degraded_prompt
from trl_diffusion.losses import diffusion_dpo_loss
from trl_diffusion.randomness import keyed_noise
from trl_diffusion.trainer.target_prompts import warn_of_prompts_without_words


def make_trainer(tmp_path, pipeline=None, dataset=None, **kwargs) -> DDSPOTrainer:
    pipeline = pipeline or tiny.sd_pipeline()
    given = {"peft_config": kwargs.pop("peft_config", lora()), "eval_dataset": kwargs.pop("eval_dataset", None)}
    settings = {"beta": 500.0, **tiny.FAST, **tiny.settings(pipeline), **kwargs}
    return DDSPOTrainer(
        pipeline,
        args=DDSPOConfig(str(tmp_path), **settings),
        train_dataset=tiny.pairs() if dataset is None else dataset,
        **given,
    )


def move(trainer: DDSPOTrainer) -> None:
    """Lets the policy differ from the reference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    trainer.reference_is_initial_policy = False  # it was moved before its first step


def logged(trainer: DDSPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- The objective ----


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("family", "size_conditions"),
    [*((family, "target") for family in PIPELINES if family in tiny.FAMILIES), ("sdxl", "original")],
)
def test_the_loss_is_the_published_formula(tmp_path, family, size_conditions, is_lora):
    """Loss of a batch = the formula written out, on the predictions of policy and base as pipelines of diffusers."""
    peft_config = lora() if is_lora else None
    trainer = make_trainer(
        *(tmp_path, PIPELINES[family](), tiny.pairs(2)), peft_config=peft_config, size_conditions=size_conditions
    )
    move(trainer)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)

    ids, base, plain = batch["id"], PIPELINES[family](), batch["prompt"]
    degraded = [degraded_prompt(prompt, [0.4, 0.7], 42) for prompt in plain]
    assert all(0 < len(left.split()) < len(prompt.split()) for left, prompt in zip(degraded, plain, strict=True))
    keys = [(42, 0, row_id, "") for row_id in ids]
    timesteps, noise = trainer.process.sample_timesteps(keys, (8, 8)), keyed_noise(keys, (4, 8, 8))  # of the pair
    differences = {}
    for column, asked in (("chosen", plain), ("rejected", degraded)):
        posterior_keys = [(42, 0, row_id, column) for row_id in ids]
        latents = by_hand.latents(base, batch[f"{column}_pixel_values"], posterior_keys)
        noisy, _ = by_hand.noised(base, latents, noise, timesteps)
        time_ids = None
        if size_conditions == "original":
            sizes = [batch[f"{column}_original_sizes"], batch[f"{column}_crop_top_lefts"]]
            time_ids = torch.cat([*sizes, torch.full((len(ids), 2), 32)], dim=1)

        @torch.no_grad()
        def predict(denoiser, prompts, noisy=noisy, time_ids=time_ids):
            return by_hand.predict(base, denoiser, noisy, timesteps, prompts, time_ids)

        denoiser = getattr(base, trainer.backbone.denoiser_name)
        z, e, r = predict(denoiser, asked), predict(trainer.policy, plain), predict(denoiser, plain)
        distance, ref_distance = ((each - z).pow(2).mean(dim=[1, 2, 3]) for each in (e, r))
        assert (ref_distance == 0).all() if column == "chosen" else (ref_distance > 1e-9).all()
        differences[column] = distance - ref_distance
    expected = -torch.nn.functional.logsigmoid(-0.5 * 500.0 * (differences["chosen"] - differences["rejected"]))
    assert (expected - math.log(2)).abs().max() > 1e-3
    torch.testing.assert_close(outputs["losses"].detach(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss.detach(), expected.mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_asked_with_its_own_prompts(tmp_path, family):
    """
    Of each flow family, whose prompts may differ in length: the reference's predictions are those of Diffusion-DPO's reference, and z_l
    is what that predicts when it is asked for the degraded prompt.
    """
    settings = tiny.FAST | families.FAMILIES[family].settings | {"max_steps": 1}
    rows = tiny.pairs(2, with_instances=False)
    trainer = DDSPOTrainer(
        families.FAMILIES[family].make(),
        args=DDSPOConfig(str(tmp_path), **settings),
        train_dataset=rows,
        peft_config=lora(),
    )
    degraded = rows.map(lambda row: {"prompt": degraded_prompt(row["prompt"], [0.4, 0.7], 42)})
    assert degraded["prompt"] != rows["prompt"]
    predictions = []
    for dataset in (rows, degraded):
        other = InstanceDPOTrainer(
            families.FAMILIES[family].make(),
            args=InstanceDPOConfig(str(tmp_path), **settings),
            train_dataset=dataset,
            peft_config=lora(),
        )
        batch = other.data_collator([dataset[0], dataset[1]])
        other.model.train()
        with torch.no_grad():
            predictions.append(next(other.noised_batches(other.model, batch)).frozen["ref_pred"].float())
    trainer.model.train()
    with torch.no_grad():
        frozen = next(trainer.noised_batches(trainer.model, trainer.data_collator([rows[0], rows[1]]))).frozen
    torch.testing.assert_close(frozen["ref_pred"], predictions[0], atol=1e-5, rtol=1e-4)
    target = torch.cat([predictions[0][:2], predictions[1][2:]])
    torch.testing.assert_close(frozen["target"], target, atol=1e-5, rtol=1e-4)
    assert (predictions[0] - predictions[1])[2:].abs().max() > 1e-4  # the prompt matters
    trainer.train()


def ddspo(e, r, z, beta=100.0):
    """The losses `(B,)` and chosen rewards of predictions `(2B, ...)`, chosen then rejected, in float64."""
    errors, ref_errors = ((each - z).square().flatten(1).mean(dim=1).chunk(2) for each in (e, r))
    losses, chosen, _ = diffusion_dpo_loss(*errors, *ref_errors, beta)
    return losses, chosen


def test_the_gradient_where_the_policy_is_the_reference():
    """
    At theta = ref the chosen image's term has no gradient, as z_w = r, and the rejected one's is beta (z_l - r) / 2D: a step leaves
    z_l. By autograd and by finite differences.
    """
    generator = torch.Generator().manual_seed(0)
    r, apart, direction = torch.randn(3, 4, 4, 3, 3, generator=generator).double()
    z = torch.cat([r[:2], r[2:] + 0.3 * apart[2:]])
    e = r.clone().requires_grad_()
    losses, _ = ddspo(e, r, z)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-12)
    gradient = torch.autograd.grad(losses.sum(), e)[0]
    assert gradient[:2].abs().max() == 0
    torch.testing.assert_close(gradient[2:], 100.0 * (z - r)[2:] / (2 * r[0].numel()), atol=1e-12, rtol=1e-9)
    ends = [ddspo(r + step * direction, r, z)[0].sum() for step in (1e-5, -1e-5)]
    assert ((ends[0] - ends[1]) / 2e-5).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


def test_the_chosen_reward_holds_and_the_rejected_one_has_no_bound():
    """On the chosen image each step away from the reference costs; on the rejected one the loss falls for ever."""
    generator = torch.Generator().manual_seed(1)
    r, apart = torch.randn(2, 2, 4, 3, 3, generator=generator).double()
    z = torch.cat([r[:1], r[1:] + 0.3 * apart[1:]])
    away = torch.stack([apart[0], torch.zeros_like(apart[0])])
    losses = [ddspo(r + step * away, r, z)[0].item() for step in (0, 0.5, 1, 2)]
    assert losses == sorted(losses) and losses[0] == pytest.approx(math.log(2), abs=1e-12)
    assert ddspo(r + away, r, z)[1].item() == pytest.approx(-50.0 * apart[0].square().mean().item(), rel=1e-9)
    away = torch.stack([torch.zeros_like(apart[0]), (r - z)[1]])
    losses = [ddspo(r + step * away, r, z)[0].item() for step in (0, 0.5, 2, 8, 32)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-6


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_one_image_with_one_target_is_ln_2(tmp_path, family):
    """Where both images are one and the prompt has no words to lose, the policy cancels, wherever it is."""
    rows = [{**row, "rejected": row["chosen"], "prompt": ""} for row in tiny.pairs(4, with_instances=False)]
    dataset = Dataset.from_list(rows, features=tiny.pairs(1, with_instances=False).features)
    # the posterior's noise is that of each column, so that the latents differ as far as it is wide
    trainer = make_trainer(tmp_path, PIPELINES[family](), dataset)
    trainer.encoder.sample_latents = lambda inputs, keys: torch.cat([inputs["latents"]] * 2)
    move(trainer)
    trainer.model.train()
    batch = trainer.data_collator([dataset[0], dataset[1]]) | {"latents": torch.randn(2, 4, 8, 8)}
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(outputs["losses"].detach(), torch.full((2,), math.log(2)), atol=1e-5, rtol=0)
    metrics = trainer.meters.averages("train")
    assert metrics["errors/chosen"] > 1e-4 and metrics["errors/ref_rejected"] < 1e-12


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_starts_at_ln_2_and_learns(tmp_path, family):
    """The first margin is 0 up to rounding; then the policy leaves the prediction for the degraded prompt."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), eval_dataset=tiny.pairs(4), max_steps=10)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-5) and before["eval_errors/chosen"] <= 1e-10
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert after["eval_loss"] < before["eval_loss"] - 1e-3 and after["eval_rewards/margins"] > 1e-3
    assert after["eval_rewards/chosen"] < 0
    assert after["eval_errors/rejected"] > after["eval_errors/ref_rejected"] > 1e-7


def test_instances_change_nothing(tmp_path):
    """It has no masks: a dataset with instances trains as one without."""
    ends = []
    for dataset in (tiny.pairs(), tiny.pairs(with_instances=False)):
        trainer = make_trainer(tmp_path, dataset=dataset)
        trainer.train()
        ends.append(weights(trainer.model))
    assert max_difference(*ends) == 0


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_a_step_is_two_forwards(tmp_path, is_lora):
    """The reference is asked in one forward of three rows for each pair, the policy in one of two; the reference stays."""
    trainer, rows = make_trainer(tmp_path, peft_config=lora() if is_lora else None), []
    for model in {trainer.backbone.denoiser, trainer.reference.denoiser or trainer.backbone.denoiser}:
        model.register_forward_pre_hook(lambda module, args: rows.append((len(args[0]), torch.is_grad_enabled())))
    frozen = trainer.policy if is_lora else trainer.reference.denoiser
    before = weights(frozen)
    trainer.train()
    assert rows == [(6, False), (4, True)] * 3
    moved = {name for name, value in weights(frozen).items() if not torch.equal(value, before[name])}
    assert all("lora_" in name for name in moved) and bool(moved) == is_lora


# ---- Equivalent runs ----


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, family):
    """Stopped in the middle of an epoch and resumed: the same weights and losses, bit for bit."""
    settings = {"dataset": tiny.pairs(10), "max_steps": 6, "random_flip": True, "center_crop": False}
    whole = make_trainer(tmp_path, PIPELINES[family](), save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, PIPELINES[family](), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert max_difference(weights(whole.model), weights(resumed.model)) == 0
    assert logged(whole, "loss")[3:] == logged(resumed, "loss")[3:]


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    """8 pairs at once, or one at a time and accumulated: the same weights."""
    ends = []
    for batch_size in (8, 1):
        trainer = make_trainer(
            *(tmp_path, None, tiny.pairs(16)),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            optim="sgd",
            learning_rate=0.2,
            max_grad_norm=0.0,
        )
        start = weights(trainer.model)
        trainer.train()
        ends.append(weights(trainer.model))
    assert max_difference(ends[0], ends[1]) <= 1e-5 < max_difference(ends[0], start)


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("sd", {}),
        ("sdxl", {"dropped_words": [0.1, 0.2]}),
        ("sd3", {"noise_source": "inversion", "inversion_steps": 3}),
        ("sd", {"precompute_ref_preds": True}),
        ("flux", {"precompute_ref_preds": True}),
    ],
)
def test_it_trains_the_same_live_and_precomputed(tmp_path, family, case):
    """Every prompt that is asked for is encoded before, no encoder runs in the training, and the losses are the same."""
    by_epoch, runs, calls = case.get("precompute_ref_preds", False), [], []
    for on in (False, True):
        trainer = make_trainer(
            *(tmp_path, PIPELINES[family](), tiny.pairs(6)),
            eval_dataset=tiny.pairs(2),
            precompute=on,
            precompute_dir=str(tmp_path / "cache"),
            max_steps=6,
            **case | {"precompute_ref_preds": on and by_epoch},
        )
        trainer.args.precompute_ref_preds = (
            by_epoch  # a row is noised once in an epoch where predictions are precomputed
        )
        runs.append(trainer)
    for name in runs[1].backbone.encoder_names:
        encoder = getattr(runs[1].backbone.pipeline, name)
        encoder.register_forward_pre_hook(lambda module, args: calls.append(module))
    evaluations = []
    for trainer in runs:
        trainer.train()
        evaluations.append(trainer.evaluate()["eval_loss"])
    assert not calls and len(logged(runs[0], "loss")) == 6
    for name in ("loss", "rewards/margins", "errors/ref_rejected"):
        one, other = (torch.tensor(logged(trainer, name)) for trainer in runs)
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
    assert evaluations[0] == pytest.approx(evaluations[1], abs=2e-4)


def test_what_is_precomputed_depends_on_the_words_that_are_dropped(tmp_path, capsys):
    """Predictions are computed anew for other shares of words, and found again for the same."""
    settings = {"precompute": True, "precompute_ref_preds": True, "precompute_dir": str(tmp_path / "cache")}
    found = []
    for shares in ([0.4, 0.7], [0.1, 0.2], [0.4, 0.7]):
        make_trainer(tmp_path, dropped_words=shares, **settings)
        found.append("Precomputed before: noised rows of epoch 1" in capsys.readouterr().out)
    assert found == [False, False, True]


def test_the_list_of_prompts_is_kept(tmp_path):
    """A million prompts take a minute to degrade, so a second start of the same training reads them, and one of other shares does not."""
    settings = {"precompute": True, "precompute_dir": str(tmp_path / "cache")}
    numbers = []
    for shares in ([0.4, 0.7], [0.4, 0.7], [0.1, 0.2]):
        make_trainer(tmp_path, dropped_words=shares, **settings)
        numbers.append(len(list((tmp_path / "cache").glob("list-of-prompts-*.arrow"))))
    assert numbers == [1, 1, 2]


def test_prompts_without_words_are_counted(tmp_path, caplog):
    """Such a row has the reference's own prediction as the target to leave; it is said how many there are, of a dataset in memory."""
    rows = [
        {**row, "prompt": "" if index == 1 else " " if index == 2 else row["prompt"]}
        for index, row in enumerate(tiny.pairs(6))
    ]
    dataset = Dataset.from_list(rows, features=tiny.pairs(1).features)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, dataset=dataset.select([0, 3, 4]))
        assert "without words" not in caplog.text
        make_trainer(tmp_path, dataset=dataset, eval_dataset=dataset.select([0, 1]))
    assert "2 of the 6 rows of `train_dataset` have a prompt without words" in caplog.text
    assert "1 of the 2 rows of `eval_dataset`" in caplog.text


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_prompts_of_any_type_of_text_are_counted(kind, caplog):
    """An ideographic space is no word either, and a prompt that is missing is refused elsewhere."""
    prompts = pa.array(["a cat", "", "\u3000", None, "猫"], kind)
    with caplog.at_level(logging.WARNING):
        warn_of_prompts_without_words(Dataset(pa.table({"prompt": prompts})), "rows")
    assert "2 of the 5 rows of `rows`" in caplog.text


# ---- What is saved, and what is refused ----


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_saved_lora_reloads_in_diffusers_with_difference_0(tmp_path, family):
    """The file gives the policy's predictions, and the card cites the paper and tells how to train it again."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), learning_rate=0.05)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert load_file(tmp_path / "pytorch_lora_weights.safetensors")
    backbone = load_backbone(PIPELINES[family]())
    backbone.pipeline.load_lora_weights(str(tmp_path))
    expected = tiny.predictions(backbone, trainer.model)
    assert torch.equal(tiny.predictions(backbone, backbone.denoiser), expected)
    card = (tmp_path / "README.md").read_text()
    assert "kim2025ddspo" in card and "| dropped_words |" in card and "trl-diffusion ddspo --config" in card
    assert json.loads((tmp_path / "training.json").read_text())["recipe"]["dropped_words"] == [0.4, 0.7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "`beta` must be positive"),
        ({"dropped_words": [0.5]}, "`dropped_words` must be"),
        ({"prompt_dropout": 0.1}, "`prompt_dropout=0.1` is not possible"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, settings, message):
    """The message names the field, and the reason or what it may be."""
    with pytest.raises(ValueError, match=message):
        DDSPOConfig(str(tmp_path), **settings)
    assert DDSPOConfig(str(tmp_path)).beta == 16000 and DDSPOConfig(str(tmp_path)).dropped_words == [0.4, 0.7]
