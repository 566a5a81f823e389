# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from tests import tiny
from tests.tiny import FAMILIES, FAST, FLOWS, PIPELINES, UNETS, lora, max_difference, weights
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.inversion import invert_latents
from trl_diffusion.trainer.noised_batch import NoisedBatch


def make_trainer(folder, pipeline=None, dataset=None, peft_config=None, **kwargs) -> InstanceDPOTrainer:
    given = {name: kwargs.pop(name) for name in ("eval_dataset", "ref_model") if name in kwargs}
    pipeline = pipeline or tiny.sd_pipeline()
    defaults = {"noise_source": "inversion", "inversion_steps": 4, **FAST, **tiny.settings(pipeline)}
    return InstanceDPOTrainer(
        pipeline,
        args=InstanceDPOConfig(str(folder), **{**defaults, **kwargs}),
        train_dataset=tiny.pairs() if dataset is None else dataset,
        peft_config=peft_config,
        **given,
    )


def move_policy(trainer, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def noise(trainer, rows=(0, 1, 2)) -> NoisedBatch:
    """Some rows as the next training step has them."""
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in rows])
    with torch.no_grad():
        return next(trainer.noised_batches(trainer.model, batch))


KINDS = [(family, kind, model) for family in UNETS for kind in ("full", "lora") for model in ("reference", "policy")]
KINDS += [
    ("sd3", "full", "reference"),
    ("sd3", "lora", "policy"),
    ("flux", "lora", "reference"),
    ("flux", "full", "policy"),
]


@pytest.mark.parametrize(("family", "kind", "inversion_model"), KINDS)
def test_before_the_first_step_the_loss_is_ln_2_and_the_margins_are_0(tmp_path, family, kind, inversion_model):
    """Whoever inverts: policy and reference agree to the last bit on what arrives."""
    settings = {"inversion_model": inversion_model, "inversion_eta": 0.1, "eval_dataset": tiny.pairs(2)}
    settings |= {"peft_config": lora() if kind == "lora" else None}
    trainer = make_trainer(tmp_path, PIPELINES[family](), max_steps=2, **settings)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-7) and metrics["eval_rewards/margins"] == 0
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["errors/chosen"] == first["errors/ref_chosen"] > 0
    assert second["rewards/margins"] != 0


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_inversion_moves_with_the_policy_where_the_policy_inverts_and_only_there(tmp_path, peft_config):
    """By the reference the same noised latents after the policy has moved, bit for bit; by the policy others."""
    for inversion_model in ("reference", "policy"):
        trainer = make_trainer(tmp_path, peft_config=peft_config, inversion_model=inversion_model)
        before = noise(trainer)
        move_policy(trainer)
        after = noise(trainer)
        assert torch.equal(before.timesteps, after.timesteps)
        moved = (before.noisy_latents - after.noisy_latents).abs().amax(dim=(1, 2, 3))
        assert moved.max() == 0 if inversion_model == "reference" else moved.min() > 1e-4
        if inversion_model == "reference":
            assert torch.equal(before.frozen["ref_pred"], after.frozen["ref_pred"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_shares_its_timestep_and_each_image_has_its_noise(tmp_path, family):
    """The noise explains the noised latents, and is another for chosen and rejected; random noise is one for both."""
    trainer = make_trainer(tmp_path, PIPELINES[family]())
    pairs = noise(trainer)
    chosen, rejected = pairs.timesteps.chunk(2)
    assert torch.equal(chosen, rejected) and len(set(chosen.tolist())) == 3
    explained = pairs.noise.chunk(2)
    assert (explained[0] - explained[1]).abs().amax(dim=(1, 2, 3)).min() > 1e-2
    again = trainer.process.add_noise(pairs.latents, pairs.noise, pairs.timesteps)
    torch.testing.assert_close(again, pairs.noisy_latents, atol=1e-5, rtol=0)
    random = noise(make_trainer(tmp_path, PIPELINES[family](), noise_source="random"))
    assert torch.equal(*random.noise.chunk(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_image_is_inverted_with_its_own_prompt_and_size(tmp_path, family):
    """A batch's inversion is each image's own walk with its own conditions, by the reference's denoiser."""
    trainer = make_trainer(tmp_path, PIPELINES[family]())
    move_policy(trainer)
    pairs = noise(trainer)
    conditions, backbone, reference = pairs.batch["conditions"], trainer.backbone, trainer.reference.denoiser
    for row in range(6):
        own = {name: value[row : row + 1] for name, value in conditions.items()}
        with torch.no_grad():
            alone = invert_latents(
                lambda x, t, _, own=own: backbone.predict(reference, x, t, own),
                pairs.latents[row : row + 1],
                pairs.timesteps[row : row + 1],
                trainer.process,
                4,
            )
            ref_pred = backbone.predict(reference, alone, pairs.timesteps[row : row + 1], own)
        torch.testing.assert_close(alone[0], pairs.noisy_latents[row], atol=1e-5, rtol=0)
        torch.testing.assert_close(ref_pred[0], pairs.frozen["ref_pred"][row], atol=1e-4, rtol=0)


def test_masks_still_apply(tmp_path):
    """With `w_neg=1` instances change nothing; with 0, what lies in a conflict is out of the loss."""
    ends = {}
    for name, dataset, w_neg in (
        ("plain", tiny.pairs(with_instances=False), 0.0),
        ("one", tiny.pairs(), 1.0),
        ("zero", tiny.pairs(), 0.0),
    ):
        trainer = make_trainer(tmp_path, dataset=dataset, w_neg=w_neg)
        trainer.train()
        ends[name] = weights(trainer.model)
    assert max_difference(ends["plain"], ends["one"]) == 0
    assert max_difference(ends["plain"], ends["zero"]) > 1e-5


@pytest.mark.parametrize("inversion_model", ["reference", "policy"])
@pytest.mark.parametrize("family", ["sd", *FLOWS])
def test_no_gradient_flows_through_the_walk(tmp_path, family, inversion_model):
    """Noised latents and the reference's predictions are constants of the loss, whoever inverts."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), inversion_model=inversion_model)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 1)])
    pairs = next(trainer.noised_batches(trainer.model, batch))
    tensors = [pairs.latents, pairs.noise, pairs.noisy_latents, pairs.frozen["ref_pred"]]
    tensors += [*pairs.batch["conditions"].values(), pairs.batch["masks"]]
    assert not any(tensor.requires_grad for tensor in tensors)
    trainer.compute_loss(trainer.model, batch).backward()
    output = trainer.model.conv_out if family == "sd" else trainer.model.proj_out
    assert output.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in trainer.reference.denoiser.parameters())


def test_a_row_is_noised_anew_in_each_epoch_and_once_in_it(tmp_path):
    """Its timestep and noise follow from seed, epoch and id, not from the step."""
    trainer = make_trainer(tmp_path, inversion_eta=0.1)
    found = []
    for epoch, step in ((0, 0), (0.5, 3), (1.0, 4), (1.75, 7), (2.0, 8)):
        trainer.state.epoch, trainer.state.global_step = epoch, step
        found.append(noise(trainer))
    same = [torch.equal(found[0].noisy_latents, other.noisy_latents) for other in found]
    assert same == [True, True, False, False, False]
    assert torch.equal(found[2].noisy_latents, found[3].noisy_latents)
    assert not torch.equal(found[2].timesteps, found[4].timesteps)


def test_training_meets_each_epochs_noise(tmp_path, monkeypatch):
    """In two epochs a row is noised at two timesteps, which are those of the epochs' keys, also with accumulation."""
    trainer = make_trainer(
        tmp_path, dataset=tiny.pairs(5), max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2
    )
    seen, noised_batches = [], trainer.noised_batches

    def noted(model, inputs):
        for pairs in noised_batches(model, inputs):
            seen.extend(zip(inputs["id"], pairs.timesteps.tolist()[: len(inputs["id"])], strict=True))
            yield pairs

    monkeypatch.setattr(trainer, "noised_batches", noted)
    trainer.train()
    monkeypatch.undo()
    assert len(seen) == 10
    for epoch in (0, 1):
        trainer.state.epoch = epoch
        expected = noise(trainer, range(5)).timesteps[:5].tolist()
        assert dict(seen[5 * epoch :][:5]) == {f"row-{row}": expected[row] for row in range(5)}


def test_eta_adds_randomness_that_is_each_images_own(tmp_path):
    """Another seed gives another walk only with `inversion_eta`, and the two images of a pair get other noise."""
    trainer = make_trainer(tmp_path, inversion_eta=0.1)
    plain = make_trainer(tmp_path)
    pairs, without = noise(trainer), noise(plain)
    difference = (pairs.noisy_latents - without.noisy_latents).chunk(2)
    assert difference[0].abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert not torch.allclose(*difference, atol=1e-4)
    assert torch.equal(noise(trainer).noisy_latents, pairs.noisy_latents)


@pytest.mark.parametrize("family", ["sd", *FLOWS])
def test_a_walk_asks_the_denoiser_as_often_as_it_has_steps(tmp_path, family, monkeypatch):
    """Of a batch, only those that are on their way; then reference and policy once each."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), timestep_range=[300, 1000])
    pairs = noise(trainer)
    calls, predict = [], trainer.backbone.predict
    monkeypatch.setattr(
        trainer.backbone,
        "predict",
        lambda model, x, t, c: (calls.append((model is trainer.reference.denoiser, len(x))), predict(model, x, t, c))[
            1
        ],
    )
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 1, 2)])
    trainer.compute_loss(trainer.model, batch)
    lengths = [len(trainer.process.inversion_timesteps(timestep, 4)) for timestep in pairs.timesteps.tolist()]
    assert len(set(lengths)) > 1
    expected = [(True, sum(step < length for length in lengths)) for step in range(max(lengths))]
    assert calls == [*expected, (True, 6), (False, 6)]


@pytest.mark.parametrize("family", ["sd", *FLOWS])
def test_evaluation_inverts_at_fixed_timesteps_and_repeats_itself(tmp_path, family):
    """No batch size, no repetition and no training of the policy changes the reference's errors."""
    settings = {"eval_dataset": tiny.pairs(5), "inversion_eta": 0.1}
    trainer = make_trainer(tmp_path, PIPELINES[family](), per_device_eval_batch_size=2, **settings)
    first = trainer.evaluate()
    move_policy(trainer)
    second = trainer.evaluate()
    whole = make_trainer(tmp_path, PIPELINES[family](), per_device_eval_batch_size=5, **settings).evaluate()
    assert first["eval_errors/ref_chosen"] == second["eval_errors/ref_chosen"]
    assert first["eval_errors/chosen"] != second["eval_errors/chosen"]
    assert whole["eval_errors/ref_chosen"] == pytest.approx(first["eval_errors/ref_chosen"], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_source": "ddim"}, "`noise_source` must be 'random' or 'inversion'"),
        ({"inversion_model": "base"}, "`inversion_model` must be 'reference' or 'policy'"),
        ({"inversion_steps": 0}, "`inversion_steps` must be at least 1"),
        ({"inversion_eta": -0.1}, "`inversion_eta` must not be negative"),
        ({"inversion_eta": float("nan")}, "`inversion_eta` must"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, settings, message):
    """Every impossible setting raises a ValueError that names the flag."""
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)
