# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""CPO without an expert: the reference's own predictions, for prompts with attributes or for degraded prompts, as targets."""

import json
import logging
import math

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from peft import PeftModel
from safetensors.torch import load_file

from tests import by_hand, tiny
from tests.tiny import PIPELINES, lora, max_difference, weights
from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer, ComplexPOConfig, ComplexPOTrainer
from trl_diffusion.degraded_prompts import degraded_prompt
from trl_diffusion.losses import complex_po_loss
from trl_diffusion.randomness import keyed_noise
from trl_diffusion.scripts import complex_po


PROMPTS = ["a red circle and a blue square", "a cat and a dog", "a red cat", "a blue square and a dog"]


def images(num_rows: int = 8) -> Dataset:
    """Rows of a prompt and an image, without attributes."""
    rows = [
        {"id": f"row-{index}", "prompt": PROMPTS[index % 4], "image": tiny.image(index)} for index in range(num_rows)
    ]
    return Dataset.from_list(
        rows, features=Features({"id": Value("string"), "prompt": Value("string"), "image": Image()})
    )


@pytest.fixture(scope="module")
def criteria(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("criteria") / "tiny.yaml"
    path.write_text(tiny.CRITERIA)
    return str(path)


def make_trainer(tmp_path, pipeline=None, dataset=None, expert=None, **kwargs) -> ComplexPOTrainer:
    pipeline = pipeline or tiny.sd_pipeline()
    given = {"peft_config": kwargs.pop("peft_config", lora()), "eval_dataset": kwargs.pop("eval_dataset", None)}
    settings = {"target_prompts": "degraded", "beta": 500.0, **tiny.FAST, **tiny.settings(pipeline), **kwargs}
    return ComplexPOTrainer(
        pipeline,
        expert,
        args=ComplexPOConfig(str(tmp_path), **settings),
        train_dataset=images() if dataset is None else dataset,
        **given,
    )


def move(trainer: ComplexPOTrainer) -> None:
    """Lets the policy differ from the reference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    trainer.reference_is_initial_policy = False  # it was moved before its first step


def logged(trainer: ComplexPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- Attributes ----


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("sd", {}),
        ("sd3", {"loss_type": "unstabilized"}),
        ("sdxl", {"attribute_targets": "paired", "target_strength": 1.5, "timestep_weighting": "min_snr"}),
        ("sd_v", {"reverse_preference": True, "policy_condition": "positive"}),
        ("flux", {"prompt_dropout": 0.5}),
    ],
)
def test_attributes_are_asked_as_of_an_expert_that_learned_nothing(tmp_path, criteria, family, case):
    """With an expert whose LoRA is zero, every loss, metric and weight is the same to the last bit."""
    pipeline = PIPELINES[family]()
    settings = {**tiny.FAST, **tiny.settings(pipeline), "learning_rate": 0.0, "max_steps": 1, "criteria": criteria}
    expert = AttributeSFTTrainer(
        pipeline,
        AttributeSFTConfig(str(tmp_path / "expert"), **settings),
        train_dataset=tiny.paintings(),
        peft_config=lora(),
    )
    expert.train()
    expert.save_model()
    zero = load_file(tmp_path / "expert" / "pytorch_lora_weights.safetensors")
    assert all(value.abs().max() == 0 for name, value in zero.items() if "lora_B" in name or "lora.up" in name)
    runs = []
    for given in ({"expert": str(tmp_path / "expert"), "target_prompts": None}, {"target_prompts": "attributes"}):
        trainer = make_trainer(
            *(tmp_path / "out", PIPELINES[family](), tiny.paintings()), criteria=criteria, max_steps=4, **given, **case
        )
        trainer.train()
        runs.append(trainer)
    with_expert, without = runs
    trained = {name: value for name, value in weights(with_expert.model).items() if ".expert." not in name}
    assert max_difference(trained, weights(without.model)) == 0
    assert (
        max_difference(weights(without.model), weights(make_trainer(tmp_path / "out", PIPELINES[family]()).model)) > 0
    )
    timed = ("runtime", "per_second", "total_flos")
    entries = [
        [{name: x for name, x in entry.items() if not any(part in name for part in timed)} for entry in of.state.log_history]
        for of in runs
    ]  # fmt: skip
    assert entries[0] == entries[1]
    assert logged(without, "targets/distance")[-1] > 0


def test_attributes_take_one_adapter(tmp_path, criteria):
    """No expert is in memory, and the reference is asked in one forward of three rows."""
    trainer = make_trainer(tmp_path, dataset=tiny.paintings(), criteria=criteria, target_prompts="attributes")
    assert list(trainer.policy.peft_config) == ["default"]
    rows = []
    trainer.backbone.denoiser.register_forward_pre_hook(
        lambda module, args: rows.append((len(args[0]), torch.is_grad_enabled()))
    )
    trainer.train()
    assert rows == [(6, False), (2, True)] * 3


# ---- Degraded prompts ----


CASES = [
    {},
    {"loss_type": "unstabilized"},
    {"target_strength": 2.0, "reflection_weight": 0.5},
    {"reverse_preference": True, "timestep_weighting": "sigmoid"},
    {"reverse_preference": True, "loss_type": "unstabilized", "target_strength": 1.5},
    {"dropped_words": [0.2, 0.3]},
]


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("family", "case"),
    [*(("sd", case) for case in CASES), ("sdxl", CASES[0]), ("sd3", CASES[2]), ("flux", CASES[1])],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "default",
)
def test_degraded_targets_equal_two_separate_models(tmp_path, family, case, is_lora):
    """The loss of a batch = the formula written out, on the predictions of policy and base as pipelines of diffusers."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), peft_config=lora() if is_lora else None, **case)
    move(trainer)
    trainer.model.train()
    batch = trainer.data_collator([images()[0], images()[1]])
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)

    base = PIPELINES[family]()
    plain = PROMPTS[:2]
    degraded = [degraded_prompt(prompt, case.get("dropped_words", [0.4, 0.7]), 42) for prompt in plain]
    keys = [(42, 0, row_id, "") for row_id in batch["id"]]
    timesteps, noise = trainer.process.sample_timesteps(keys, (8, 8)), keyed_noise(keys, (4, 8, 8))
    posterior_keys = [(42, 0, row_id, "image") for row_id in batch["id"]]
    latents = by_hand.latents(base, batch["image_pixel_values"], posterior_keys)
    noisy, _ = by_hand.noised(base, latents, noise, timesteps)

    @torch.no_grad()
    def predict(denoiser, prompts):
        return by_hand.predict(base, denoiser, noisy, timesteps, prompts)

    denoiser = getattr(base, trainer.backbone.denoiser_name)
    e, e_ref, e_degraded = predict(trainer.policy, plain), predict(denoiser, plain), predict(denoiser, degraded)
    strength = case.get("target_strength", 1.0)
    z_w, z_l = e_ref, e_ref + strength * (e_degraded - e_ref)
    if case.get("reverse_preference"):
        z_w, z_l = z_l, z_w

    def squared(target, prediction):
        return (target - prediction).pow(2).mean(dim=[1, 2, 3])

    snr = trainer.process.snr(timesteps)
    omega = 1 / (1 + snr) if case.get("timestep_weighting") == "sigmoid" else torch.ones(2)
    win = squared(z_w, e) - squared(z_w, e_ref)
    if case.get("loss_type") == "unstabilized":
        lose = -(squared(z_l, e) - squared(z_l, e_ref))
    else:
        z_t = e_ref + case.get("reflection_weight", 1.0) * (e_ref - z_l)
        lose = squared(z_t, e) - squared(z_t, e_ref)
    expected = -torch.nn.functional.logsigmoid(-0.5 * 500.0 * omega * (win + lose))
    assert (expected - math.log(2)).abs().max() > 1e-3
    torch.testing.assert_close(outputs["losses"].detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["stabilized", "unstabilized"])
def test_the_first_term_is_an_anchor(loss_type):
    """
    With z_w = e_ref, the first term's error and gradient are 0 at theta = ref: the gradient is the second term's alone,
    beta (z_l - e_ref) / 2D, by autograd and by finite differences. Further away the first term pulls back to e_ref.
    """
    generator = torch.Generator().manual_seed(0)
    e_ref, apart = torch.randn(2, 2, 4, 3, 3, generator=generator).double()
    z_l, size = e_ref + 0.3 * apart, e_ref[0].numel()
    stabilized = loss_type == "stabilized"
    second = (2 * e_ref - z_l) if stabilized else z_l

    def squared(a, b):
        return (a - b).square().flatten(1).mean(dim=1)

    def loss(e):
        errors = squared(e, e_ref), squared(e, second), squared(e_ref, e_ref), squared(e_ref, second)
        losses, chosen, _ = complex_po_loss(*errors, 100.0, torch.ones(2, dtype=torch.float64), stabilized)
        return losses, chosen

    e = e_ref.clone().requires_grad_()
    losses, chosen = loss(e)
    assert chosen.tolist() == [0, 0] and losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-12)
    gradient = torch.autograd.grad(losses.sum(), e)[0]
    torch.testing.assert_close(gradient, 100.0 * (z_l - e_ref) / (2 * size), atol=1e-12, rtol=1e-9)
    direction = torch.randn(e_ref.shape, generator=generator, dtype=torch.float64)
    ends = [loss(e_ref + step * direction)[0].sum() for step in (1e-5, -1e-5)]
    assert ((ends[0] - ends[1]) / 2e-5).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-6)

    # it is at most 0 wherever the policy goes: -0.5 beta |e - e_ref|^2
    moved = (e_ref + 0.1 * direction).requires_grad_()
    losses, chosen = loss(moved)
    torch.testing.assert_close(chosen, -50.0 * squared(moved.detach(), e_ref), atol=1e-12, rtol=1e-9)
    if stabilized:  # the minimum is half way to the reflection, where both terms pull alike
        minimum = (e_ref + 0.5 * (e_ref - z_l)).requires_grad_()
        assert torch.autograd.grad(loss(minimum)[0].sum(), minimum)[0].abs().max() < 1e-12


def test_the_trainers_first_step_moves_by_the_second_term_alone(tmp_path):
    """At theta = ref the chosen error is exactly 0 in an evaluation, both terms are there, and the target is not."""
    trainer = make_trainer(tmp_path, eval_dataset=images(4), max_steps=6)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval_errors/ref_chosen"] == 0 and before["eval_errors/chosen"] <= 1e-12
    assert before["eval_grad_norms/rejected"] > 100 * before["eval_grad_norms/chosen"]
    assert before["eval_targets/distance"] == pytest.approx(before["eval_errors/ref_rejected"], rel=1e-5)
    assert before["eval_targets/distance"] > 1e-6 and before["eval_targets/coinciding"] == 0
    assert after["eval_rewards/chosen"] < 0 < after["eval_rewards/margins"]
    assert after["eval_errors/rejected"] > after["eval_errors/ref_rejected"]


def test_each_row_has_both_terms(tmp_path):
    """The prompt to go to and the degraded one to leave, or the other way round; another row in the batch changes neither."""
    for reverse in (False, True):
        trainer = make_trainer(tmp_path, reverse_preference=reverse)
        prompts = trainer.degraded_prompts(trainer.data_collator([images()[index] for index in (1, 0, 2)]))
        alone = trainer.degraded_prompts(trainer.data_collator([images()[0]]))
        assert prompts.has_chosen.tolist() == prompts.has_rejected.tolist() == [1, 1, 1]
        better, worse = (prompts.rejected, prompts.chosen) if reverse else (prompts.chosen, prompts.rejected)
        assert prompts.plain == better == [PROMPTS[1], PROMPTS[0], PROMPTS[2]]
        assert worse == [degraded_prompt(prompt, [0.4, 0.7], 42) for prompt in better]
        assert (alone.chosen, alone.rejected) == ([prompts.chosen[1]], [prompts.rejected[1]])


def test_a_step_is_two_forwards_of_two_rows_and_one(tmp_path):
    """The reference's prediction for the prompt is target and reference at once."""
    trainer, rows = make_trainer(tmp_path, target_strength=2.0), []
    trainer.backbone.denoiser.register_forward_pre_hook(
        lambda module, args: rows.append((len(args[0]), torch.is_grad_enabled()))
    )
    trainer.train()
    assert rows == [(4, False), (2, True)] * 3


# ---- Data ----


def test_attributes_are_neither_needed_nor_read(tmp_path):
    """Rows without the columns, and rows with attributes of any tree or of none, train the same."""
    rows = [{**row, "positive_attributes": ["unheard of"], "negative_attributes": []} for row in images()]
    ends = []
    for dataset in (images(), Dataset.from_list(rows), images().to_iterable_dataset()):
        trainer = make_trainer(tmp_path, dataset=dataset, train_sampling_strategy="sequential")
        trainer.train()
        ends.append(weights(trainer.model))
    assert max_difference(ends[0], ends[1]) == max_difference(ends[0], ends[2]) == 0
    with pytest.raises(ValueError, match="lacks the column `image`.*required columns are `prompt`, `image`:"):
        make_trainer(tmp_path, dataset=images().remove_columns("image"))
    with pytest.raises(ValueError, match="lacks the columns `positive_attributes`"):
        make_trainer(tmp_path, target_prompts="attributes")


def test_a_prompt_without_words_teaches_nothing_and_is_told(tmp_path, caplog):
    """Both its targets are the prediction for the empty text."""
    rows = [{**row, "prompt": ""} for row in images(4)]
    trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows, features=images(1).features))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert logged(trainer, "targets/coinciding") == [1, 1, 1]
    assert "the reference's positive and negative predictions are equal" in caplog.text
    assert "A prompt without words has none to lose" in caplog.text


# ---- Equivalent runs ----


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, family, is_lora):
    """Stopped in the middle of an epoch and resumed: the same weights and losses, bit for bit."""
    settings = {"dataset": images(10), "max_steps": 6, "random_flip": True, "peft_config": lora() if is_lora else None}
    whole = make_trainer(tmp_path, PIPELINES[family](), save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, PIPELINES[family](), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert max_difference(weights(whole.model), weights(resumed.model)) == 0
    assert logged(whole, "loss")[3:] == logged(resumed, "loss")[3:]
    changed = make_trainer(tmp_path, PIPELINES[family](), dropped_words=[0.1, 0.2], **settings)
    assert changed.run_record["settings"] != resumed.run_record["settings"]


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    """8 images at once, or one at a time and accumulated: the same weights."""
    ends = []
    for batch_size in (8, 1):
        trainer = make_trainer(
            *(tmp_path, None, images(16)),
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
    ("family", "target_prompts", "case"),
    [
        ("sd", "degraded", {}),
        ("sdxl", "degraded", {"target_strength": 1.5, "reverse_preference": True}),
        ("sd3", "degraded", {"noise_source": "inversion", "inversion_steps": 3}),
        ("sd", "degraded", {"precompute_ref_preds": True}),
        ("sd", "attributes", {"precompute_ref_preds": True, "attribute_targets": "paired"}),
        ("flux", "attributes", {"prompt_dropout": 0.5}),
    ],
)
def test_it_trains_the_same_live_and_precomputed(tmp_path, criteria, family, target_prompts, case):
    """Every prompt that is asked for is encoded before, no encoder runs in the training, and the losses are the same."""
    by_epoch, runs = case.get("precompute_ref_preds", False), []
    of_attributes = {"criteria": criteria} if target_prompts == "attributes" else {}
    rows = tiny.paintings(6) if of_attributes else images(6)
    for on in (False, True):
        trainer = make_trainer(
            *(tmp_path, PIPELINES[family](), rows),
            target_prompts=target_prompts,
            eval_dataset=rows.select([4, 5]),
            precompute=on,
            precompute_dir=str(tmp_path / "cache"),
            max_steps=6,
            **of_attributes,
            **case | {"precompute_ref_preds": on and by_epoch},
        )
        trainer.args.precompute_ref_preds = (
            by_epoch  # a row is noised once in an epoch where predictions are precomputed
        )
        runs.append(trainer)
    assert runs[1].encoder.prompt_cache is not None
    calls = []
    for name in runs[1].backbone.encoder_names:
        encoder = getattr(runs[1].backbone.pipeline, name)
        encoder.register_forward_pre_hook(lambda module, args: calls.append(module))
    evaluations = []
    for trainer in runs:
        trainer.train()
        evaluations.append(trainer.evaluate()["eval_loss"])
    assert not calls and len(logged(runs[0], "loss")) == 6
    for name in ("loss", "drift", "rewards/margins", "targets/distance"):
        one, other = (torch.tensor(logged(trainer, name)) for trainer in runs)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-4)


def test_what_is_precomputed_depends_on_the_words_that_are_dropped(tmp_path, capsys):
    """Predictions are computed anew for other shares of words, and found again for the same."""
    settings = {"precompute": True, "precompute_ref_preds": True, "precompute_dir": str(tmp_path / "cache")}
    found = []
    for shares in ([0.4, 0.7], [0.1, 0.2], [0.4, 0.7]):
        make_trainer(tmp_path, dropped_words=shares, **settings)
        found.append("Precomputed before: noised rows of epoch 1" in capsys.readouterr().out)
    assert found == [False, False, True]


# ---- All weights ----


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_all_weights_train_beside_a_frozen_copy(tmp_path, family):
    """The reference stays what the model was; the model is saved whole."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), peft_config=None, eval_dataset=images(2), learning_rate=1e-4)
    start = weights(trainer.reference.denoiser)
    assert not isinstance(trainer.policy, PeftModel) and max_difference(start, weights(trainer.policy)) == 0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    assert (
        max_difference(start, weights(trainer.reference.denoiser))
        == 0
        < max_difference(start, weights(trainer.policy))
    )
    trainer.save_model()
    assert (tmp_path / "model_index.json").exists()


# ---- What is refused ----


def test_it_must_be_said_what_takes_the_experts_place(tmp_path):
    """Without an expert and without `target_prompts` nothing trains, nor with both."""
    with pytest.raises(ValueError, match="`expert` is missing.*`target_prompts`"):
        make_trainer(tmp_path, target_prompts=None)
    for target_prompts in ("attributes", "degraded"):
        with pytest.raises(ValueError, match=f"`target_prompts='{target_prompts}'`.*Leave out one of the two"):
            make_trainer(tmp_path, expert="user/expert", target_prompts=target_prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_prompts": "plain"}, "`target_prompts` must be 'attributes' or 'degraded'"),
        ({"target_prompts": "degraded", "attribute_targets": "paired"}, "`attribute_targets='paired'` is not possible"),
        ({"target_prompts": "degraded", "max_attributes": 3}, "`max_attributes=3` is not possible"),
        ({"target_prompts": "degraded", "attribute_order": "given"}, "`attribute_order='given'` is not possible"),
        ({"target_prompts": "degraded", "attribute_separator": "; "}, "`attribute_separator='; '` is not possible"),
        ({"target_prompts": "degraded", "policy_condition": "positive"}, "`policy_condition='positive'` is not possible"),
        ({"target_prompts": "degraded", "prompt_dropout": 0.1}, "`prompt_dropout=0.1` is not possible"),
        ({"target_prompts": "degraded", "dropped_words": [0.7, 0.4]}, "`dropped_words` must be"),
        ({"target_prompts": "attributes", "dropped_words": [0.4, 0.7]}, "`dropped_words` has no effect"),
        ({"dropped_words": [0.4, 0.7]}, "`dropped_words` has no effect"),
        ({"target_prompts": "degraded", "dropped_words": 0.5}, "`dropped_words` must be"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(tmp_path, settings, message):
    """The message names the field, and the reason or what it may be."""
    with pytest.raises(ValueError, match=message):
        ComplexPOConfig(str(tmp_path), **settings)


def test_criteria_that_are_not_used_are_named(tmp_path, caplog):
    """A tree beside degraded prompts is no error, as a recipe may be shared, but it is said that nothing reads it."""
    for target_prompts, is_said in (("attributes", False), ("degraded", True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ComplexPOConfig(str(tmp_path), criteria="user.yaml", target_prompts=target_prompts)
        assert ("`criteria='user.yaml'` has no effect" in caplog.text) == is_said


def test_kept_predictions_depend_on_the_words_of_the_tree(tmp_path, criteria):
    """A tree of the same name with another word asks other prompts, also where a collator of the user does not know the tree."""
    other = tmp_path / "other.yaml"
    other.write_text(tiny.CRITERIA.replace("red", "crimson"))
    found = []
    for tree in (criteria, other, criteria):
        trainer = make_trainer(tmp_path, None, tiny.paintings(), target_prompts="attributes", criteria=str(tree))
        found.append(trainer._frozen_fingerprints())
    assert trainer.criteria.name == "tiny" and found[0] == found[2] != found[1]


# ---- Cards ----


@pytest.mark.parametrize(
    ("target_prompts", "said"), [("attributes", "the good attributes"), ("degraded", "some of its words")]
)
def test_the_card_speaks_of_no_expert(tmp_path, criteria, target_prompts, said):
    """It says what was asked in its place, and its recipe trains the same again without one."""
    of_attributes = {"criteria": criteria, "dataset": tiny.paintings()} if target_prompts == "attributes" else {}
    trainer = make_trainer(tmp_path, target_prompts=target_prompts, **of_attributes)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "There was n" in card and said in card and "frozen expert" not in card and "`--expert`" not in card
    recipe = json.loads((tmp_path / "training.json").read_text())["recipe"]
    assert recipe["target_prompts"] == target_prompts and "expert" not in recipe
    assert ("| criteria | not used |" in card) == (target_prompts == "degraded")
    assert ("dropped_words" in recipe) == (target_prompts == "degraded")


# ---- A start at a LoRA, and the command ----


@pytest.mark.parametrize("in_reference", [True, False])
def test_the_reference_of_a_continued_lora_is_asked(tmp_path, in_reference):
    """Targets are the predictions of the LoRA that the training started at, or of the base where the reference is without it."""
    first = make_trainer(tmp_path / "first", learning_rate=0.05)
    first.train()
    first.save_model()
    trainer = make_trainer(
        tmp_path / "second",
        initial_lora=str(tmp_path / "first"),
        initial_lora_in_reference=in_reference,
        peft_config=None,
    )
    base = tiny.sd_pipeline()
    if in_reference:
        base.load_lora_weights(str(tmp_path / "first"))
    batch = trainer.data_collator([images()[0], images()[1]])
    latents, noise = torch.randn(2, 2, 4, 8, 8)
    timesteps = torch.tensor([300, 700])
    noised = trainer.noiser.cached(
        trainer.prepare_batch(batch, latents),
        latents,
        {"timesteps": timesteps[:, None], "noisy_latents": noise[:, None]},
    )
    frozen = trainer.frozen_predictions(trainer.model, noised)
    plain = PROMPTS[:2]
    degraded = [degraded_prompt(prompt, [0.4, 0.7], 42) for prompt in plain]
    with torch.no_grad():
        expected = [by_hand.predict(base, base.unet, noise, timesteps, prompts) for prompts in (plain, degraded)]
    for name, prediction in zip(("ref_pred", "rejected_target"), expected, strict=True):
        torch.testing.assert_close(frozen[name], prediction, atol=1e-5, rtol=1e-4)
    assert torch.equal(frozen["chosen_target"], frozen["ref_pred"])
    trainer.train()


@pytest.mark.parametrize("flags", [["--lora_r", "4"], ["--use_peft", "false"]], ids=["lora", "full"])
def test_the_command_trains_without_an_expert(tmp_path, capsys, flags):
    """`complex-po --target_prompts degraded` trains; without the flag, what is missing is said."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    images(4).to_parquet(tmp_path / "images.parquet")
    common = [
        "--model_name_or_path",
        tmp_path / "model",
        "--dataset_name",
        tmp_path / "images.parquet",
        "--max_steps",
        1,
    ]
    common += ["--report_to", "none", "--disable_tqdm", "true", "--output_dir", tmp_path / "out", *flags]
    parser = complex_po.make_parser()
    complex_po.main(*parser.parse_args_and_config([*map(str, common), "--target_prompts", "degraded"]))
    file = "pytorch_lora_weights.safetensors" if "--lora_r" in flags else "model_index.json"
    assert (tmp_path / "out" / file).exists() and "Training completed." in capsys.readouterr().out
    with pytest.raises(ValueError, match="`--expert` is missing.*`--target_prompts`"):
        complex_po.main(*parser.parse_args_and_config([*map(str, common)]))
