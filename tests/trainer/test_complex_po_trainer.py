# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import logging
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from tests import by_hand, tiny
from tests.tiny import FAMILIES, FLOWS, PIPELINES, UNETS, lora, max_difference, weights
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    attribute_features,
)
from trl_diffusion.backbones import load_backbone
from trl_diffusion.noising import timestep_weights
from trl_diffusion.randomness import keyed_noise
from trl_diffusion.trainer.noised_batch import NoisedBatch


FAST = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "activation_checkpointing": False,
}


@pytest.fixture(scope="module")
def criteria(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("criteria") / "tiny.yaml"
    path.write_text(tiny.CRITERIA)
    return str(path)


def train_expert(folder, pipeline, criteria, **kwargs) -> AttributeSFTTrainer:
    """An expert whose predictions differ well from the base's."""
    peft_config = kwargs.pop("peft_config", lora(8, 16))
    settings = {**FAST, **tiny.settings(pipeline), **kwargs}
    args = AttributeSFTConfig(str(folder), criteria=criteria, learning_rate=0.05, **settings)
    trainer = AttributeSFTTrainer(pipeline, args, train_dataset=tiny.paintings(), peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def experts(tmp_path_factory, criteria) -> dict[str, str]:
    """A folder with an expert for each family."""
    folders = {family: tmp_path_factory.mktemp(f"expert_{family}") for family in FAMILIES}
    for family, folder in folders.items():
        train_expert(folder, PIPELINES[family](), criteria)
    return {family: str(folder) for family, folder in folders.items()}


def make_trainer(tmp_path, pipeline, expert, criteria, dataset=None, **kwargs) -> ComplexPOTrainer:
    trainer_kwargs = {"peft_config": kwargs.pop("peft_config", lora())}
    trainer_kwargs |= {name: kwargs.pop(name) for name in ("eval_dataset",) if name in kwargs}
    args = {
        "output_dir": str(tmp_path),
        "criteria": criteria,
        "learning_rate": 1e-3,
        **FAST,
        **tiny.settings(pipeline),
    }
    return ComplexPOTrainer(
        pipeline,
        expert,
        args=ComplexPOConfig(**args | kwargs),
        train_dataset=tiny.paintings() if dataset is None else dataset,
        **trainer_kwargs,
    )


def move(trainer: ComplexPOTrainer) -> None:
    """Lets the policy differ from the reference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    trainer.reference_is_initial_policy = False  # it was moved before its first step


def logged(trainer: ComplexPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- The objective ----


@pytest.mark.parametrize("loss_type", ["stabilized", "unstabilized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_first_step_the_loss_is_ln_2(tmp_path, family, loss_type, experts, criteria):
    """Policy equals reference before training: to the rounding of one forward against another."""
    trainer = make_trainer(
        tmp_path, PIPELINES[family](), experts[family], criteria, loss_type=loss_type, eval_dataset=tiny.paintings(4)
    )
    metrics = trainer.evaluate()
    trainer.train()
    for loss, margins in (
        (metrics["eval_loss"], metrics["eval_rewards/margins"]),
        (logged(trainer, "loss")[0], logged(trainer, "rewards/margins")[0]),
    ):
        assert loss == pytest.approx(math.log(2), abs=1e-4) and margins == pytest.approx(0, abs=1e-4)
    assert abs(logged(trainer, "rewards/margins")[1]) > 1e-3
    assert logged(trainer, "drift")[0] < 1e-9 < logged(trainer, "drift")[1]


CASES = [
    {"loss_type": "stabilized"},
    {"loss_type": "unstabilized", "timestep_weighting": "min_snr"},
    {"attribute_targets": "paired", "target_strength": 1.5, "reflection_weight": 0.5},
    {"policy_condition": "positive", "timestep_weighting": "sigmoid"},
    {"reverse_preference": True, "attribute_targets": "paired", "loss_type": "unstabilized", "target_strength": 2.0},
    {"reverse_preference": True, "policy_condition": "positive"},
]


# Every case of every UNet; a flow model has every other one
FAMILY_CASES = [(family, case) for family in UNETS for case in CASES]
FAMILY_CASES += [("sd3", case) for case in CASES[::2]] + [("flux", case) for case in CASES[1::2]]


@pytest.mark.parametrize(
    ("family", "case"), FAMILY_CASES, ids=["-".join(map(str, (f, *case.values()))) for f, case in FAMILY_CASES]
)
def test_adapters_on_one_base_equal_three_separate_models(tmp_path, family, case, experts, criteria):
    """Targets, reference and loss = three pipelines of diffusers and the published formula, written out."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), experts[family], criteria, beta=500.0, **case)
    move(trainer)
    trainer.save_model(str(tmp_path / "policy"))
    trainer.model.train()
    rows = [tiny.paintings(4)[0], tiny.paintings(4)[3]]  # attributes of both kinds
    batch = trainer.data_collator(rows)
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)

    policy, expert, reference = (PIPELINES[family]() for _ in range(3))
    policy.load_lora_weights(str(tmp_path / "policy"))
    expert.load_lora_weights(experts[family])
    if case.get("attribute_targets") == "paired":
        positive = ["a, red, circle, cat", "a and a, red, circle, cat"]
        negative = ["a, blue, square, dog", "a and a, blue, square, dog"]
    else:
        positive, negative = ["a, red", "a and a, circle, cat"], ["a, square, dog", "a and a, blue"]
    plain = ["a", "a and a"]
    condition = positive if case.get("policy_condition") == "positive" else plain
    if case.get("reverse_preference"):
        positive, negative = negative, positive

    ids = batch["id"]
    keys = [(42, 0, row_id, "") for row_id in ids]
    timesteps, noise = trainer.process.sample_timesteps(keys, (8, 8)), keyed_noise(keys, (4, 8, 8))
    posterior_keys = [(42, 0, row_id, "image") for row_id in ids]
    latents = by_hand.latents(reference, batch["image_pixel_values"], posterior_keys)
    noisy, _ = by_hand.noised(reference, latents, noise, timesteps)

    @torch.no_grad()
    def predict(pipeline, prompts):
        denoiser = getattr(pipeline, trainer.backbone.denoiser_name)
        return by_hand.predict(pipeline, denoiser, noisy, timesteps, prompts)

    strength = case.get("target_strength", 1.0)
    e_plain = predict(expert, plain)
    z_w, z_l = (e_plain + strength * (predict(expert, prompts) - e_plain) for prompts in (positive, negative))
    e, e_ref = predict(policy, condition), predict(reference, condition)

    noised = NoisedBatch(trainer.prepare_batch(batch, latents), latents, noise, noisy, timesteps, {})
    frozen = trainer.frozen_predictions(trainer.model, noised)
    assert frozen.keys() == {"chosen_target", "rejected_target", "ref_pred"}
    for ours, separate in zip(frozen.values(), (z_w, z_l, e_ref), strict=True):
        assert (ours - separate).abs().max() <= 1e-5
        assert not ours.requires_grad
    assert (z_w - z_l).abs().max() > 1e-2 and (z_w - e_ref).abs().max() > 1e-2

    def squared(target, prediction):
        return (target - prediction).pow(2).mean(dim=[1, 2, 3])

    omega = timestep_weights(timesteps, trainer.process, case.get("timestep_weighting", "constant"))
    win = squared(z_w, e) - squared(z_w, e_ref)
    if case.get("loss_type") == "unstabilized":
        lose = -(squared(z_l, e) - squared(z_l, e_ref))
    else:
        z_t = e_ref + case.get("reflection_weight", 1.0) * (e_ref - z_l)
        lose = squared(z_t, e) - squared(z_t, e_ref)
    expected = -torch.nn.functional.logsigmoid(-0.5 * 500.0 * omega * (win + lose))
    assert (expected - math.log(2)).abs().max() > 1e-3
    torch.testing.assert_close(outputs["losses"].detach(), expected, atol=1e-4, rtol=1e-4)


def test_a_row_of_one_kind_trains_on_the_term_it_has(tmp_path, experts, criteria):
    """Without negatives the loss is that of z_w alone; metrics average over the rows that have them."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, beta=50.0)
    move(trainer)
    trainer.model.train()
    rows = tiny.paintings(4)
    batch = trainer.data_collator([rows[1], rows[2]])  # positive only, negative only
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    metrics = trainer.meters.averages("train")
    margins = torch.tensor([metrics["rewards/chosen"], -metrics["rewards/rejected"]])
    assert margins.abs().min() > 1e-3
    assert metrics["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-5)
    torch.testing.assert_close(outputs["losses"].detach(), -torch.nn.functional.logsigmoid(margins))
    expected = -25.0 * (metrics["errors/chosen"] - metrics["errors/ref_chosen"])
    assert metrics["rewards/chosen"] == pytest.approx(expected, rel=1e-4)
    assert "targets/distance" not in metrics  # no row has both


def test_a_window_without_negatives_logs_what_there_is(tmp_path, experts, criteria):
    """No average over nothing."""
    dataset = tiny.paintings(8).filter(lambda row: not row["negative_attributes"])
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, dataset=dataset)
    trainer.train()
    assert logged(trainer, "rewards/chosen") and not logged(trainer, "rewards/rejected")
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())


@pytest.mark.parametrize("loss_type", ["stabilized", "unstabilized"])
def test_logged_gradient_norms_are_those_of_autograd(tmp_path, loss_type, experts, criteria, monkeypatch):
    """Norm of what each term contributes to the gradient of a sample's loss with respect to its prediction."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, beta=50.0, loss_type=loss_type)
    move(trainer)
    trainer.model.train()
    predictions, predict = [], trainer.backbone.predict
    monkeypatch.setattr(
        trainer.backbone, "predict", lambda *args: predictions.append(predict(*args)) or predictions[-1]
    )
    terms = {}
    for index, kind in ((1, "chosen"), (2, "rejected")):  # rows with one term only: its gradient is the whole one
        row = tiny.paintings(4)[index]
        _, outputs = trainer.compute_loss(trainer.model, trainer.data_collator([row]), return_outputs=True)
        gradient = torch.autograd.grad(outputs["losses"].sum(), predictions[-1])[0]
        terms[kind] = gradient.norm().item()
    metrics = trainer.meters.averages("train")
    for kind, norm in terms.items():
        assert metrics[f"grad_norms/{kind}"] == pytest.approx(norm, rel=1e-4)


def test_the_unstabilised_loss_drifts_and_the_trainer_says_so(tmp_path, experts, criteria, caplog):
    """At one learning rate, one leaves the region of its targets while accuracies look fine, the other stays."""
    drifts = {}
    for loss_type in ("stabilized", "unstabilized"):
        caplog.clear()
        trainer = make_trainer(
            tmp_path,
            tiny.sd_pipeline(),
            experts["sd"],
            criteria,
            loss_type=loss_type,
            attribute_targets="paired",
            per_device_train_batch_size=4,
            learning_rate=5e-2,
            beta=10.0,
            max_steps=20,
            logging_steps=5,
        )
        with caplog.at_level(logging.WARNING):
            trainer.train()
        drifts[loss_type] = logged(trainer, "drift")
        assert ("times as far from the reference" in caplog.text) == (loss_type == "unstabilized")
    assert caplog.text.count("times as far from the reference") == 1
    assert max(drifts["stabilized"]) < 0.1 and drifts["unstabilized"][-1] > 1
    assert logged(trainer, "rewards/accuracies")[-1] >= 0.7


# ---- What it costs, and what may move ----


@pytest.mark.parametrize("strength, rows", [(1.0, 3), (1.5, 4)])
def test_a_step_is_two_forwards_on_one_base(tmp_path, strength, rows, experts, criteria):
    """Expert and reference share one forward without gradient; in memory is one base and two adapters."""
    pipeline = tiny.sd_pipeline()
    base_size = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    trainer = make_trainer(tmp_path, pipeline, experts["sd"], criteria, target_strength=strength)
    calls = []
    trainer.backbone.denoiser.register_forward_pre_hook(
        lambda module, args: calls.append((len(args[0]), torch.is_grad_enabled()))
    )
    trainer.train()
    assert calls == [(rows * 2, False), (2, True)] * 3

    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    adapters = {
        name: sum(parameter.numel() for key, parameter in trainer.model.named_parameters() if f".{name}." in key)
        for name in ("default", "expert")
    }
    assert trainer.reference.denoiser is None and size == base_size + adapters["default"] + adapters["expert"]
    assert adapters["expert"] == 2 * adapters["default"] > 0  # ranks 8 and 4


@pytest.mark.parametrize("family", ["sd", *FLOWS])
def test_only_the_policys_adapter_moves(tmp_path, family, experts, criteria):
    """Base, expert, VAE and text encoders stay as they were, and get no gradient."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), experts[family], criteria, learning_rate=0.01)
    encoders = [getattr(trainer.backbone.pipeline, name) for name in trainer.backbone.encoder_names]
    before, others = weights(trainer.model), [weights(encoder) for encoder in encoders]
    trainer.train()
    moved = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name and ".default." in name for name in moved)
    assert max(max_difference(weights(encoder), start) for encoder, start in zip(encoders, others, strict=True)) == 0
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".default." in name for name in trainable)


# ---- Equivalent runs ----


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_gradient_accumulation_equals_a_larger_batch(tmp_path, family, experts, criteria):
    """8 images at once, or one at a time and accumulated: the same weights."""
    ends = []
    for batch_size in (8, 1):
        trainer = make_trainer(
            tmp_path,
            PIPELINES[family](),
            experts[family],
            criteria,
            dataset=tiny.paintings(16),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            max_steps=4,
            optim="sgd",
            learning_rate=0.2,
            max_grad_norm=0.0,
            beta=200.0,
            prompt_dropout=0.3,
        )
        start = weights(trainer.model)
        trainer.train()
        ends.append(weights(trainer.model))
    assert max_difference(ends[0], ends[1]) <= 1e-4
    assert max_difference(ends[0], start) > 1e-2


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, family, experts, criteria):
    """Stopped in the middle of an epoch and resumed: the same weights and losses, bit for bit."""
    settings = {"expert": experts[family], "criteria": criteria, "dataset": tiny.paintings(10), "max_steps": 6}
    settings |= {"random_flip": True, "prompt_dropout": 0.3, "center_crop": False, "attribute_targets": "paired"}
    whole = make_trainer(tmp_path, PIPELINES[family](), save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, PIPELINES[family](), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert max_difference(weights(whole.model), weights(resumed.model)) == 0
    assert logged(whole, "loss")[3:] == logged(resumed, "loss")[3:]


def test_gradient_checkpointing_changes_nothing(tmp_path, experts, criteria):
    """Recomputed activations, which mix no adapters, give the same weights."""
    ends = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, activation_checkpointing=checkpointing
        )
        trainer.train()
        assert trainer.backbone.denoiser.is_gradient_checkpointing == checkpointing
        ends.append(weights(trainer.model))
    assert max_difference(*ends) == 0


@pytest.mark.parametrize(
    ("family", "alpha"), [("sd", 4), ("sd", 8), ("sdxl", 4), ("sdxl", 8), ("sd3", 8), ("flux", 8)]
)
def test_a_saved_lora_reloads_in_diffusers_with_difference_0(tmp_path, family, alpha, experts, criteria):
    """The file holds the policy alone, and gives its predictions, without the expert."""
    trainer = make_trainer(
        tmp_path, PIPELINES[family](), experts[family], criteria, peft_config=lora(4, alpha), learning_rate=0.05
    )
    trainer.train()
    trainer.save_model()
    assert not any("expert" in key for key in load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    backbone = load_backbone(PIPELINES[family]())
    backbone.pipeline.load_lora_weights(str(tmp_path))
    expected = tiny.predictions(backbone, trainer.model)
    assert torch.equal(tiny.predictions(backbone, backbone.denoiser), expected)


def test_it_trains_under_bf16_autocast(tmp_path, experts, criteria):
    """Errors are float32, and the first loss is ln 2 but for the rounding of the two forwards."""
    trainer = make_trainer(
        tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, bf16=True, use_cpu=True, beta=10.0, learning_rate=1e-2
    )
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-2)
    trainer.model.train()
    batch = trainer.data_collator([tiny.paintings()[0]])
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs["losses"].dtype == torch.float32


# ---- What the expert is asked ----


def test_prompts_of_the_expert(tmp_path, experts, criteria):
    """Present attributes by kind, or all of them in both forms; the dropped prompt leaves the attributes."""
    row = {**tiny.paintings(4)[3], "prompt": "a"}  # positive: pet, kind; negative: hue
    expected = {
        ("present", False): ("a, circle, cat", "a, blue"),
        ("present", True): ("a, blue", "a, circle, cat"),
        ("paired", False): ("a, red, circle, cat", "a, blue, square, dog"),
        ("paired", True): ("a, blue, square, dog", "a, red, circle, cat"),
    }
    for (targets, reverse), prompts in expected.items():
        trainer = make_trainer(
            tmp_path,
            tiny.sd_pipeline(),
            experts["sd"],
            criteria,
            attribute_targets=targets,
            reverse_preference=reverse,
            prompt_dropout=0.5,
        )
        batch = trainer.data_collator([row])
        trainer.model.eval()
        asked = trainer.expert_prompts(batch)
        assert (asked.plain, asked.chosen, asked.rejected) == (["a"], [prompts[0]], [prompts[1]])
    trainer.model.train()
    seen = {trainer.expert_prompts({**batch, "id": [f"row-{index}"]}).chosen[0] for index in range(20)}
    assert seen == {"a, blue, square, dog", "blue, square, dog"}


@pytest.mark.parametrize("index, sides", [(0, (1, 1)), (1, (1, 0)), (2, (0, 1))])
def test_sides_of_a_row(tmp_path, index, sides, experts, criteria):
    """Present targets have the sides that the row has, paired ones both."""
    for targets, expected in (("present", sides), ("paired", (1, 1))):
        trainer = make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, attribute_targets=targets)
        asked = trainer.expert_prompts(trainer.data_collator([tiny.paintings(4)[index]]))
        assert (asked.has_chosen.item(), asked.has_rejected.item()) == expected
        trainer = make_trainer(
            tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, attribute_targets=targets, reverse_preference=True
        )
        asked = trainer.expert_prompts(trainer.data_collator([tiny.paintings(4)[index]]))
        assert (asked.has_rejected.item(), asked.has_chosen.item()) == expected


# ---- The expert, given in every way, and wrongly ----


def test_a_trained_trainer_is_an_expert_also_on_its_own_pipeline(tmp_path, criteria):
    """Given as a trainer, with the pipeline it trained or another: as from its folder; the base is itself again."""
    pipeline = tiny.sd_pipeline()
    base = weights(pipeline.unet)
    trainer = train_expert(tmp_path / "expert", pipeline, criteria)
    ends = []
    for model, expert in (
        (tiny.sd_pipeline(), str(tmp_path / "expert")),
        (tiny.sd_pipeline(), trainer),
        (pipeline, trainer),
    ):
        policy = make_trainer(tmp_path / "policy", model, expert, criteria)
        policy.train()
        ends.append(weights(policy.model))
    assert max_difference(ends[0], ends[1]) == max_difference(ends[0], ends[2]) == 0
    stripped = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for name, value in ends[2].items()
        if "lora_" not in name
    }
    assert max_difference(base, stripped) == 0
    for use in (trainer.train, trainer.save_model):  # it holds the policy now, which is no expert
        with pytest.raises(ValueError, match="LoRA was taken out of its pipeline"):
            use()
    with pytest.raises(ValueError, match="LoRA was taken out of its pipeline"):
        make_trainer(tmp_path / "policy", tiny.sd_pipeline(), trainer, criteria)


def test_a_mistake_in_the_data_does_not_cost_the_expert(tmp_path, criteria):
    """Its LoRA is taken out of its pipeline only when the rows are fine."""
    pipeline = tiny.sd_pipeline()
    trainer = train_expert(tmp_path / "expert", pipeline, criteria)
    rows = [{**row, "positive_attributes": ["hues"]} for row in tiny.paintings(2)]
    dataset = Dataset.from_list(rows, features=attribute_features())
    with pytest.raises(ValueError, match="the nearest is 'hue'"):
        make_trainer(tmp_path / "policy", pipeline, trainer, criteria, dataset=dataset)
    trainer.save_model(str(tmp_path / "again"))
    make_trainer(tmp_path / "policy", pipeline, trainer, criteria)


def test_an_expert_of_another_base_is_refused(tmp_path, experts, criteria):
    """Other weights of the same architecture, and another architecture."""
    with pytest.raises(ValueError, match="trained on another base than `model`"):
        make_trainer(tmp_path, tiny.sd_pipeline(seed=1), experts["sd"], criteria)
    with pytest.raises(ValueError, match="trained on another base than `model`"):
        make_trainer(tmp_path, tiny.sd_pipeline(), experts["sdxl"], criteria)


def test_an_expert_without_description_must_fit_by_its_shapes(tmp_path, experts, criteria, caplog):
    """A LoRA from elsewhere is taken with a warning, and refused where it does not fit."""
    for family in ("sd", "sdxl"):
        (tmp_path / family).mkdir()
        source = f"{experts[family]}/pytorch_lora_weights.safetensors"
        (tmp_path / family / "pytorch_lora_weights.safetensors").write_bytes(open(source, "rb").read())
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path / "out", tiny.sd_pipeline(), str(tmp_path / "sd"), criteria)
    assert "without attribute_expert.json" in caplog.text
    with pytest.raises(ValueError, match="trained on another base than `model`"):
        make_trainer(tmp_path / "out", tiny.sd_pipeline(), str(tmp_path / "sdxl"), criteria)


def test_the_bases_precision_does_not_matter(tmp_path, experts, criteria):
    """An expert trained in float32 fits the same base held in bfloat16."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, bf16=True, use_cpu=True)
    assert next(trainer.backbone.denoiser.parameters()).dtype == torch.bfloat16


def test_an_expert_of_other_criteria_or_other_prompts_is_refused(tmp_path, experts, criteria):
    """It would be asked what it never learned."""
    other = tmp_path / "other.yaml"
    other.write_text(tiny.CRITERIA.replace("pet:", "animal:"))
    dataset = tiny.paintings(2).map(lambda row: {"positive_attributes": ["hue"], "negative_attributes": []})
    with pytest.raises(ValueError, match="only one of them has 'animal', 'pet'"):
        make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], str(other), dataset=dataset)
    other.write_text(tiny.CRITERIA.replace("red", "crimson"))
    with pytest.raises(ValueError, match=r"'hue' had the forms \['red', 'blue'\], and has \['crimson', 'blue'\]"):
        make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], str(other), dataset=dataset)
    with pytest.raises(ValueError, match=r"trained with `attribute_separator=', '`"):
        make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, attribute_separator="; ")
    with pytest.raises(ValueError, match="trained with `attribute_order='tree'`"):
        make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, attribute_order="given")


def test_only_a_lora_is_an_expert(tmp_path, criteria):
    """All weights are no adapter; nor is an empty folder; nor can the policy be without one."""
    trainer = train_expert(tmp_path / "full", tiny.sd_pipeline(), criteria, peft_config=None)
    with pytest.raises(ValueError, match="train the expert with a `peft_config`"):
        make_trainer(tmp_path, tiny.sd_pipeline(), trainer, criteria)
    with pytest.raises(ValueError, match="`expert` cannot be read: .*holds no LoRA"):
        make_trainer(tmp_path, tiny.sd_pipeline(), str(tmp_path / "full"), criteria)
    dora = LoraConfig(r=4, lora_alpha=4, use_dora=True)
    trainer = train_expert(tmp_path / "dora", tiny.sd_pipeline(), criteria, peft_config=dora)
    with pytest.raises(ValueError, match="`expert` is a DoRA"):
        make_trainer(tmp_path, tiny.sd_pipeline(), trainer, criteria)
    with pytest.raises(ValueError, match="`peft_config` cannot be `None`"):
        make_trainer(tmp_path, tiny.sd_pipeline(), str(tmp_path / "full"), criteria, peft_config=None)


# ---- Bad data ----


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"positive_attributes": [], "negative_attributes": []}, r"1 of the 4 rows of `train_dataset` .* id row-2\."),
        ({"positive_attributes": ["hues"]}, "'hues' is no attribute of the criteria 'tiny'; the nearest is 'hue'"),
        (
            {"positive_attributes": ["hue"], "negative_attributes": ["hue"]},
            "`hue` as positive and as negative at once",
        ),
    ],
    ids=["none", "unknown", "both"],
)
def test_bad_rows_are_named_at_start_up(tmp_path, columns, message, experts, criteria):
    """Before the model has seen a batch."""
    rows = list(tiny.paintings(4))
    rows[2] = {**rows[2], **columns}
    dataset = Dataset.from_list(rows, features=attribute_features())
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, dataset=dataset)


def test_a_stream_is_checked_as_it_comes(tmp_path, experts, criteria):
    """A row without attributes stops the training at its batch."""
    rows = [
        *tiny.paintings(2),
        {**tiny.paintings(1)[0], "id": "bare", "positive_attributes": [], "negative_attributes": []},
    ]
    dataset = Dataset.from_list(rows, features=attribute_features()).to_iterable_dataset()
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, dataset=dataset)
    with pytest.raises(ValueError, match="'bare'.*neither positive nor negative"):
        trainer.train()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.0}, "`beta` must be positive"),
        ({"target_strength": -1.0}, "`target_strength` must be positive"),
        ({"reflection_weight": -0.5}, "`reflection_weight` must not be negative"),
        ({"loss_type": "unstabilized", "reflection_weight": 0.5}, "`reflection_weight=0.5` has no effect"),
        ({"loss_type": "hinge"}, "`loss_type` must be 'stabilized' or 'unstabilized'"),
        ({"attribute_targets": "all"}, "`attribute_targets` must be 'present' or 'paired'"),
        ({"timestep_weighting": "snr"}, "`timestep_weighting` must be 'constant', 'min_snr' or 'sigmoid'"),
        ({"policy_condition": "negative"}, "`policy_condition` must be"),
        ({"attribute_order": "random"}, "`attribute_order` must be"),
        ({"max_attributes": 0}, "`max_attributes` must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, settings, message):
    """The message names the field and what it may be."""
    with pytest.raises(ValueError, match=message):
        ComplexPOConfig(str(tmp_path), **settings)


def test_the_card_of_a_reversed_model_says_what_it_is_for(tmp_path, experts, criteria):
    """Its code draws with the reversed adapter where guidance subtracts."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), experts["sd"], criteria, reverse_preference=True)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert 'negative_preference_guidance(pipeline, positive=None, negative="reversed")' in card
    assert "| attribute_targets | present |" in card
    assert "| criteria | tiny |" in card and "| expert | not published |" in card
    assert "\n\n## How it was trained\n" in card
    code = card.split("```python")[1].split("```")[0]
    compile(code, "card", "exec")
    assert json.dumps(trainer.args.to_dict())  # trackers write it
