# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from datasets import Dataset, load_dataset
from diffusers import DiffusionPipeline, PixArtSigmaPipeline
from peft import LoHaConfig, LoraConfig

from tests import by_hand, tiny
from tests.tiny import FAMILIES, FAST, FLOWS, PIPELINES, lora, losses, max_difference, weights
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import load_backbone
from trl_diffusion.data.transforms import normalize_pixels
from trl_diffusion.randomness import keyed_noise


def make_trainer(tmp_path, pipeline, dataset=None, peft_config=None, **kwargs) -> InstanceDPOTrainer:
    eval_dataset = kwargs.pop("eval_dataset", None)
    data_collator = kwargs.pop("data_collator", None)
    defaults = {"output_dir": str(tmp_path), **FAST, **tiny.settings(pipeline)}
    return InstanceDPOTrainer(
        pipeline,
        args=InstanceDPOConfig(**{**defaults, **kwargs}),
        data_collator=data_collator,
        train_dataset=tiny.pairs() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )


# Of all families all weights or a LoRA, of those of flows one of both: for laws that take a while to show
KINDS = [("sd", None), ("sd", lora()), ("sd3", None), ("flux", lora())]
KIND_IDS = ["sd-full", "sd-lora", "sd3-full", "flux-lora"]


# ---- The objective ----


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_the_first_step_the_loss_is_ln_2_and_the_margins_are_0(tmp_path, family, peft_config):
    """Policy equals reference before training, to the last bit, in training and in evaluation."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), peft_config=peft_config, eval_dataset=tiny.pairs(3))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["eval_rewards/margins"] == 0
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["errors/chosen"] == first["errors/ref_chosen"] > 0
    assert second["rewards/margins"] != 0


@pytest.mark.parametrize(
    ("family", "size_conditions"), [*((family, "target") for family in FAMILIES), ("sdxl", "original")]
)
def test_the_loss_is_the_published_formula_on_keyed_noise(tmp_path, family, size_conditions):
    """Loss of a batch = Diffusion-DPO by parts of diffusers, on noise and timestep that the pair shares."""
    settings = {"w_neg": 1.0, "beta": 500.0, "size_conditions": size_conditions}
    trainer = make_trainer(tmp_path, PIPELINES[family](), dataset=tiny.pairs(2), **settings)
    with torch.no_grad():  # let the policy differ from the reference
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trainer.model.train()
    trainer.reference_is_initial_policy = False  # the policy was moved before its first step
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)

    ids, pipeline = batch["id"], trainer.backbone.pipeline
    keys = [(42, 0, row_id, "") for row_id in ids]
    timesteps, noise = trainer.process.sample_timesteps(keys, (8, 8)), keyed_noise(keys, (4, 8, 8))
    assert len(set(timesteps.tolist())) == len(ids)
    squared = {"policy": [], "reference": []}
    for column in ("chosen", "rejected"):
        posterior_keys = [(42, 0, row_id, column) for row_id in ids]
        latents = by_hand.latents(pipeline, batch[f"{column}_pixel_values"], posterior_keys)
        noisy, target = by_hand.noised(pipeline, latents, noise, timesteps)
        time_ids = None
        if size_conditions == "original":
            sizes = [batch[f"{column}_original_sizes"], batch[f"{column}_crop_top_lefts"]]
            time_ids = torch.cat([*sizes, torch.full((len(ids), 2), 32)], dim=1)
        for name, denoiser in (("policy", trainer.model), ("reference", trainer.reference.denoiser)):
            prediction = by_hand.predict(pipeline, denoiser, noisy, timesteps, batch["prompt"], time_ids)
            squared[name].append((prediction - target).pow(2).mean(dim=[1, 2, 3]))
    model_diff = squared["policy"][0] - squared["policy"][1]
    ref_diff = squared["reference"][0] - squared["reference"][1]
    expected = -torch.nn.functional.logsigmoid(-0.5 * 500.0 * (model_diff - ref_diff))
    assert (expected - math.log(2)).abs().min() > 1e-3
    torch.testing.assert_close(outputs["losses"], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, expected.mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_w_neg_1_is_training_without_instances(tmp_path, family):
    """With `w_neg=1` the instances change nothing; with `w_neg=0` they do."""
    ends = {}
    for name, dataset, w_neg in (
        ("plain", tiny.pairs(with_instances=False), 0.0),
        ("one", tiny.pairs(), 1.0),
        ("zero", tiny.pairs(), 0.0),
    ):
        trainer = make_trainer(tmp_path, PIPELINES[family](), dataset=dataset, w_neg=w_neg)
        trainer.train()
        ends[name] = weights(trainer.model)
    assert max_difference(ends["plain"], ends["one"]) == 0
    assert max_difference(ends["plain"], ends["zero"]) > 1e-5


def test_masks_reach_each_image_of_the_pair(tmp_path):
    """The mask of an image is made from its own boxes, on the latent grid, with unit mean."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), dataset=tiny.pairs(2), mask_overlap="covering")
    row = tiny.pairs(2)[1]  # 32x48 and 48x32 pixels: the centre crop moves both boxes, each its own way
    batch = trainer.data_collator([row])
    masks = dict(
        zip(trainer.image_columns, trainer.prepare_batch(batch, torch.empty(2, 4, 8, 8))["masks"], strict=True)
    )
    for column, box in (("chosen", [14, 0, 30, 22]), ("rejected", [2, 14, 23, 31])):
        mask = masks[column]
        inside = torch.zeros(32, 32)
        inside[box[1] : box[3], box[0] : box[2]] = 1
        covered = inside.reshape(8, 4, 8, 4).mean(dim=(1, 3)) == 1
        # the other instance agrees with the label: where it overlaps, the average of the two is above 0
        assert mask[covered].min() == 0 and mask.mean().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", ["sd", *FLOWS])
def test_what_lies_in_a_conflict_sends_no_gradient(tmp_path, family):
    """
    With `w_neg=0` the gradient of the loss with respect to what the denoiser returns is exactly 0 at the positions of a box in
    conflict, and nowhere else: also where the denoiser returns a sequence of patches, which the box cuts through.
    """
    box = [4, 8, 20, 28]  # in latents the columns 1 to 4 and the rows 2 to 6
    instances = [{"label": "x", "chosen_box": box, "rejected_box": box, "preference": "rejected"}]
    row = {**tiny.pairs(1)[0], "instances": instances, "chosen": tiny.image(0, 32), "rejected": tiny.image(1, 32)}
    trainer = make_trainer(tmp_path, PIPELINES[family](), dataset=Dataset.from_list([row], tiny.pairs(1).features))
    trainer.model.train()
    outputs = []
    trainer.model.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    (gradient,) = torch.autograd.grad(loss, outputs[-1])
    if family == "flux":
        gradient = by_hand.unpacked(gradient)
    assert gradient.shape == (2, 4, 8, 8)
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[2:7, 1:5] = False
    assert torch.equal(gradient != 0, outside.expand_as(gradient))


def test_sdxl_is_told_the_size_that_is_trained_at(tmp_path):
    """time_ids = (h, w, 0, 0, h, w), as a pipeline is told where it samples, whatever size an image had."""
    trainer = make_trainer(tmp_path, tiny.sdxl_pipeline())
    batch = trainer.data_collator([tiny.pairs()[0], tiny.pairs()[1]])
    for height, width in ((8, 8), (6, 10)):
        conditions = trainer.prepare_batch(batch, torch.empty(4, 4, height, width))["conditions"]
        assert conditions["time_ids"].tolist() == [[4 * height, 4 * width, 0, 0, 4 * height, 4 * width]] * 4


def test_sdxl_can_be_told_each_images_own_size_and_crop(tmp_path):
    """With `size_conditions="original"`, time_ids = (original size, crop top left, target size), each (height, width)."""
    trainer = make_trainer(tmp_path, tiny.sdxl_pipeline(), size_conditions="original")
    batch = trainer.data_collator([tiny.pairs()[0], tiny.pairs()[1]])
    conditions = trainer.prepare_batch(batch, torch.empty(4, 4, 8, 8))["conditions"]
    assert conditions["time_ids"].tolist() == [
        [32, 40, 0, 4, 32, 32],
        [48, 32, 8, 0, 32, 32],
        [40, 32, 4, 0, 32, 32],
        [32, 48, 0, 8, 32, 32],
    ]


# ---- What may move, and what may not ----


@pytest.mark.parametrize("family", ["sd", *FLOWS])
def test_full_training_moves_the_policy_and_never_the_reference(tmp_path, family):
    """The frozen copy, the VAE and the text encoders stay as they were."""
    trainer = make_trainer(tmp_path, PIPELINES[family]())
    encoders = [getattr(trainer.backbone.pipeline, name) for name in trainer.backbone.encoder_names]
    frozen = [trainer.reference.denoiser, *encoders]
    before, policy = [weights(module) for module in frozen], weights(trainer.model)
    trainer.train()
    assert max(max_difference(weights(module), start) for module, start in zip(frozen, before, strict=True)) == 0
    assert max_difference(weights(trainer.model), policy) > 1e-4


@pytest.mark.parametrize("family", ["sd", *FLOWS])
def test_lora_training_moves_the_adapters_only_and_keeps_no_second_model(tmp_path, family):
    """The base under a LoRA stays as it was, and the reference costs no parameter."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), peft_config=lora())
    assert trainer.reference.denoiser is None
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)


@pytest.mark.parametrize("family", ["sd", *FLOWS])
def test_four_pairs_are_learned_by_heart(tmp_path, family):
    """Seen 20 times at one timestep and noise each, the policy prefers the chosen image of every pair."""
    trainer = make_trainer(
        tmp_path,
        PIPELINES[family](),
        dataset=tiny.pairs(4, with_instances=False),
        peft_config=lora(8, 8),
        per_device_train_batch_size=4,
        max_steps=20,
        learning_rate=3e-3,
        beta=200.0,
    )
    trainer.randomness.moment = lambda: 0
    trainer.train()
    assert trainer.state.log_history[-2]["rewards/accuracies"] == 1
    assert losses(trainer)[-1] < 0.5


def test_another_reference_is_the_one_compared_to(tmp_path):
    """With `ref_model`, the errors of the reference are that model's."""
    args = InstanceDPOConfig(str(tmp_path), report_to="none", disable_tqdm=True)
    other = tiny.other_unet()
    trainer = InstanceDPOTrainer(tiny.sd_pipeline(), other, args, eval_dataset=tiny.pairs(2), peft_config=lora())
    metrics = trainer.evaluate()
    assert metrics["eval_errors/chosen"] != metrics["eval_errors/ref_chosen"]
    swapped = InstanceDPOTrainer(tiny.other_unet(), args=args, eval_dataset=tiny.pairs(2), peft_config=lora())
    assert swapped.evaluate()["eval_errors/chosen"] == pytest.approx(metrics["eval_errors/ref_chosen"], abs=1e-6)


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_the_model_cannot_be_its_own_reference(tmp_path, peft_config):
    """A reference that shares its weights with the policy would never differ from it."""
    pipeline, args = tiny.sd_pipeline(), InstanceDPOConfig(str(tmp_path), report_to="none")
    with pytest.raises(ValueError, match="`ref_model` is the pipeline that is trained"):
        InstanceDPOTrainer(pipeline, pipeline, args, peft_config=peft_config)


# ---- Equivalent runs ----


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_gradient_accumulation_equals_a_larger_batch(tmp_path, family):
    """8 pairs at once, or one at a time and accumulated: the same weights."""
    ends = []
    for batch_size in (8, 1):
        trainer = make_trainer(
            tmp_path,
            PIPELINES[family](),
            dataset=tiny.pairs(16),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            max_steps=4,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            beta=20.0,
        )
        start = weights(trainer.model)
        trainer.train()
        ends.append(weights(trainer.model))
    assert max_difference(ends[0], ends[1]) <= 1e-4
    assert max_difference(ends[0], start) > 1e-2


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["sd", *FLOWS])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, family, peft_config):
    """Stopped in the middle of an epoch and resumed: the same weights and losses, bit for bit."""
    settings = {"dataset": tiny.pairs(10), "max_steps": 6, "random_flip": True, "prompt_dropout": 0.3}
    settings |= {"center_crop": False, "peft_config": peft_config}
    whole = make_trainer(tmp_path, PIPELINES[family](), save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, PIPELINES[family](), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert max_difference(weights(whole.model), weights(resumed.model)) == 0
    assert losses(whole)[3:] == losses(resumed)[3:]


@pytest.mark.parametrize(("family", "peft_config"), KINDS, ids=KIND_IDS)
def test_gradient_checkpointing_changes_nothing(tmp_path, family, peft_config):
    """Recomputed activations give the same weights, and are really recomputed."""
    ends = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path, PIPELINES[family](), peft_config=peft_config, activation_checkpointing=checkpointing
        )
        trainer.train()
        assert trainer.backbone.denoiser.is_gradient_checkpointing == checkpointing
        ends.append(weights(trainer.model))
    assert max_difference(*ends) == 0


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_evaluation_repeats_itself_and_does_not_touch_the_training(tmp_path, family):
    """Evaluation is at fixed timesteps and noise: no batch size, no repetition and no training step changes it."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), per_device_eval_batch_size=2, eval_dataset=tiny.pairs(5))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_errors/chosen"] == second["eval_errors/chosen"]
    whole = make_trainer(tmp_path, PIPELINES[family](), per_device_eval_batch_size=5, eval_dataset=tiny.pairs(5))
    assert whole.evaluate()["eval_errors/chosen"] == pytest.approx(first["eval_errors/chosen"], abs=1e-6)
    trainer.train()
    evaluating = make_trainer(
        tmp_path, PIPELINES[family](), eval_strategy="steps", eval_steps=1, eval_dataset=tiny.pairs(5)
    )
    evaluating.train()
    assert max_difference(weights(trainer.model), weights(evaluating.model)) == 0
    evals = [entry for entry in evaluating.state.log_history if "eval_loss" in entry]
    assert len(evals) == 3 and evals[0]["eval_loss"] != evals[2]["eval_loss"]


def test_evaluation_visits_8_fixed_timesteps(tmp_path, monkeypatch):
    """The timesteps of an evaluation are the middles of 8 equal shares of the range."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), eval_dataset=tiny.pairs(2), timestep_range=[0, 800])
    seen, predict = [], trainer.backbone.predict
    monkeypatch.setattr(
        trainer.backbone,
        "predict",
        lambda model, x, t, c: (seen.append(t.unique().tolist()), predict(model, x, t, c))[1],
    )
    trainer.evaluate()
    assert seen == [[t] for t in (50, 150, 250, 350, 450, 550, 650, 750) for _ in ("reference", "policy")]


def test_evaluation_of_several_datasets_names_each(tmp_path):
    """Every metric of each evaluation dataset is returned under its name."""
    trainer = make_trainer(
        tmp_path, tiny.sd_pipeline(), eval_dataset={"first": tiny.pairs(2), "second": tiny.pairs(3)}
    )
    metrics = trainer.evaluate()
    assert metrics["eval_first_errors/chosen"] != metrics["eval_second_errors/chosen"]
    assert metrics["eval_first_loss"] == pytest.approx(math.log(2), abs=1e-6)


# ---- Saving: what diffusers loads ----


SAVED = ["sd", "sdxl", *FLOWS]


@pytest.mark.parametrize("alpha", [4, 8])
@pytest.mark.parametrize("family", SAVED)
def test_a_saved_lora_reloads_in_diffusers_with_difference_0(tmp_path, family, alpha):
    """`load_lora_weights` on a fresh base gives the trained denoiser, at alpha = r and at alpha = 2 r."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), peft_config=lora(4, alpha), learning_rate=0.05)
    trainer.train()
    trainer.save_model()
    backbone = load_backbone(PIPELINES[family]())
    before = tiny.predictions(backbone, backbone.denoiser)
    backbone.pipeline.load_lora_weights(tmp_path)
    expected = tiny.predictions(backbone, trainer.model)
    assert (tiny.predictions(backbone, backbone.denoiser) - expected).abs().max() == 0
    assert (before - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", SAVED)
def test_saved_weights_reload_in_diffusers_with_difference_0(tmp_path, family):
    """`from_pretrained` gives the trained pipeline."""
    trainer = make_trainer(tmp_path, PIPELINES[family]())
    trainer.train()
    trainer.save_model()
    backbone = load_backbone(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(backbone.pipeline) is type(trainer.backbone.pipeline)
    expected = tiny.predictions(backbone, trainer.model)
    assert (tiny.predictions(backbone, backbone.denoiser) - expected).abs().max() == 0
    assert not list(tmp_path.rglob("*.bin"))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    """`load_best_model_at_end` brings back the weights of the best evaluation."""
    trainer = make_trainer(
        tmp_path,
        tiny.sd_pipeline(),
        peft_config=lora(),
        learning_rate=0.05,
        eval_dataset=tiny.pairs(2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="rewards/margins",
    )
    trainer.train()
    evals = [entry["eval_rewards/margins"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(max(evals), rel=1e-5)


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path):
    """Resuming full training from a LoRA checkpoint says what is wrong."""
    make_trainer(tmp_path, tiny.sd_pipeline(), peft_config=lora(), save_strategy="steps", save_steps=3).train()
    with pytest.raises(ValueError, match="`unet` folder.*with `peft_config`"):
        make_trainer(tmp_path, tiny.sd_pipeline()).train(resume_from_checkpoint=True)


# ---- Precision and optimizers ----


@pytest.mark.parametrize(("family", "peft_config"), KINDS, ids=KIND_IDS)
def test_bf16_keeps_errors_in_float32_and_the_first_margin_at_0(tmp_path, family, peft_config):
    """Under bf16 autocast the errors are float32, and policy and reference still agree to the last bit."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), peft_config=peft_config, bf16=True, use_cpu=True, beta=5000)
    recorded = []
    trainer.record = lambda metrics: recorded.append(metrics) or InstanceDPOTrainer.record(trainer, metrics)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    assert trainer.state.log_history[2]["rewards/margins"] != 0
    errors = next(metrics["errors/chosen"] for metrics in recorded if "errors/chosen" in metrics)
    assert errors.dtype == torch.float32 and not torch.equal(errors, errors.bfloat16().float())
    trainable = [parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert set(trainable) == {torch.float32}


@pytest.mark.parametrize("optim", ["adafactor", "adamw_bnb_8bit"])
def test_other_optimizers_train(tmp_path, optim):
    """Adafactor and 8-bit AdamW, named by `optim`, move the weights."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), optim=optim, max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    assert max_difference(weights(trainer.model), before) > 0


# ---- Data ----


def test_streamed_rows_train_like_rows_in_memory(tmp_path):
    """An IterableDataset in the same order gives the same weights."""
    ends = []
    for dataset in (tiny.pairs(), tiny.pairs().to_iterable_dataset()):
        trainer = make_trainer(tmp_path, tiny.sd_pipeline(), dataset=dataset, train_sampling_strategy="sequential")
        trainer.train()
        ends.append(weights(trainer.model))
    assert max_difference(*ends) == 0


def test_a_folder_of_parquet_and_a_folder_of_weights_train(tmp_path):
    """Model and dataset by path; an extra column is no matter."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    tiny.pairs().add_column("source", ["somewhere"] * 8).to_parquet(tmp_path / "data" / "train.parquet")
    dataset = load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "model"), dataset=dataset)
    trainer.train()
    in_memory = make_trainer(tmp_path / "out", tiny.sd_pipeline())
    in_memory.train()
    assert losses(trainer) == losses(in_memory)


def test_prompt_dropout_replaces_prompts_by_the_unconditional_branch(tmp_path):
    """Each prompt is dropped with the given probability, in training only; `None` stands for the unconditional branch."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), prompt_dropout=0.25)
    ids = [f"row-{index}" for index in range(2000)]
    trainer.model.train()
    seen = trainer.randomness.drop_prompts(["a cat"] * 2000, ids)
    assert seen.count(None) + seen.count("a cat") == 2000
    assert 0.2 < seen.count(None) / 2000 < 0.3
    trainer.model.eval()
    assert trainer.randomness.drop_prompts(["a cat"] * 2000, ids) == ["a cat"] * 2000


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_dropped_prompt_is_what_guidance_subtracts(tmp_path, family):
    """Its conditions are the negative ones that the pipeline makes itself: zeros for SDXL, the empty prompt's else."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), prompt_dropout=1.0)
    batch = trainer.data_collator([tiny.pairs()[0], tiny.pairs()[1]])
    trainer.model.train()
    conditions = trainer.prepare_batch(batch, torch.empty(4, 4, 8, 8))["conditions"]
    encoded = trainer.backbone.pipeline.encode_prompt(
        "a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    names = ("prompt_embeds", "text_embeds") if family == "sdxl" else ("prompt_embeds",)
    for name, unconditional in zip(names, encoded[1::2], strict=True):
        assert torch.equal(conditions[name], unconditional.expand_as(conditions[name]))
        assert (unconditional.abs().max() == 0) == (family == "sdxl")


def test_reversed_preference_negates_the_margin(tmp_path):
    """On the same masked errors, the loss is -log sigma(-margin) where it was -log sigma(margin)."""
    kwargs = {"peft_config": lora()}
    reversed_trainer = make_trainer(tmp_path, tiny.sd_pipeline(), reverse_preference=True, **kwargs)
    batch = reversed_trainer.data_collator(list(tiny.pairs(4)))
    plain_trainer = make_trainer(tmp_path, tiny.sd_pipeline(), **kwargs)
    for trainer in (reversed_trainer, plain_trainer):
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        trainer.model.train()
        trainer.reference_is_initial_policy = False  # the policy was moved before its first step
    loss, reversed_outputs = reversed_trainer.compute_loss(reversed_trainer.model, batch, return_outputs=True)
    loss, plain_outputs = plain_trainer.compute_loss(plain_trainer.model, batch, return_outputs=True)
    # sigma(m) + sigma(-m) = 1
    total = (-reversed_outputs["losses"]).exp() + (-plain_outputs["losses"]).exp()
    torch.testing.assert_close(total, torch.ones(4))
    assert (plain_outputs["losses"] - reversed_outputs["losses"]).abs().min() > 1e-3


@pytest.mark.parametrize("w_neg", [0.0, -1.0])
@pytest.mark.parametrize("mask_overlap", ["mean", "covering"])
def test_degenerate_instances_train_without_nan(tmp_path, mask_overlap, w_neg):
    """No instances, ties only, a conflict over the whole image, a box that the crop cuts away, a pixel's box."""

    def instance(box, preference):
        return {"label": "x", "chosen_box": box, "rejected_box": box, "preference": preference}

    instances = [
        [],
        [instance([2, 2, 30, 30], "tie")],
        [instance([0, 0, 64, 32], "rejected")],
        [instance([0, 0, 8, 32], "rejected"), instance([60, 0, 64, 32], "chosen")],
        [instance([31, 15, 32, 16], "rejected")],
    ]
    dataset = Dataset.from_dict(
        {
            "prompt": ["a cat"] * 5,
            "chosen": [tiny.image(index, 64, 32) for index in range(5)],
            "rejected": [tiny.image(9 + index, 64, 32) for index in range(5)],
            "instances": instances,
        }
    )
    trainer = make_trainer(
        tmp_path,
        tiny.sd_pipeline(),
        dataset=dataset,
        per_device_train_batch_size=5,
        w_neg=w_neg,
        mask_overlap=mask_overlap,
    )
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert all(value.isfinite().all() for value in weights(trainer.model).values())
    batch = trainer.data_collator([{"id": "2", **dataset[2]}])
    masks = trainer.prepare_batch(batch, torch.empty(2, 4, 8, 8))["masks"]
    assert masks[0].unique().tolist() == ([0.0] if w_neg == 0 else [-1.0])


# ---- Mistakes ----


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_and_names_the_rows(tmp_path):
    """NaN in one row: a ValueError with its id, and the weights as they were before the step."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), per_device_train_batch_size=4, gradient_accumulation_steps=2)
    collate = trainer.data_collator

    def poisoned(rows):
        batch = collate(rows)
        batch["chosen_pixel_values"] = normalize_pixels(batch["chosen_pixel_values"])
        if "row-5" in batch["id"]:
            batch["chosen_pixel_values"][batch["id"].index("row-5")] = float("nan")
        return batch

    trainer.data_collator = poisoned
    before = weights(trainer.model)
    with pytest.raises(ValueError, match="step 1, for the rows with id row-5. The optimizer has not made this step"):
        trainer.train()
    assert max_difference(weights(trainer.model), before) == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"w_neg": 1.5}, "`w_neg` must be at most 1"),
        ({"w_neg": float("nan")}, "`w_neg` must be at most 1"),
        ({"beta": 0.0}, "`beta` must be positive"),
        ({"mask_overlap": "max"}, "`mask_overlap` must be 'mean' or 'covering'"),
        ({"prompt_dropout": 1.5}, "`prompt_dropout` is a probability"),
        ({"timestep_range": [500, 100]}, "`timestep_range` must be two numbers"),
        ({"timestep_range": [0, 2000]}, "this model has the timesteps 0 to 999 only"),
        ({"resolution": 30}, "`resolution` is 30, which is no multiple of 4"),
        ({"resolution": 0}, "`resolution` must be a positive number"),
        ({"sample_steps": 0}, "`sample_steps` must be at least 1"),
        ({"remove_unused_columns": True}, "`remove_unused_columns=True` would drop"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, kwargs, message):
    """Every impossible setting raises a ValueError that names the flag."""
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny.sd_pipeline(), **kwargs)


def test_a_family_that_is_not_supported_is_named_with_those_that_are(tmp_path):
    """PixArt is refused until there is a backbone for it."""
    pipeline = PixArtSigmaPipeline(None, None, None, None, None)
    supported = "`StableDiffusionPipeline`, `StableDiffusionXLPipeline`, `StableDiffusion3Pipeline`, `FluxPipeline`"
    with pytest.raises(ValueError, match=f"`PixArtSigmaPipeline`.*{supported}"):
        make_trainer(tmp_path, pipeline)


def test_adapters_that_cannot_be_saved_for_diffusers_are_refused(tmp_path):
    """Only a LoRA has a file format that diffusers reads, and none may be on the denoiser already."""
    with pytest.raises(ValueError, match="`peft_config` must be a `peft.LoraConfig`"):
        make_trainer(tmp_path, tiny.sd_pipeline(), peft_config=LoHaConfig(target_modules=["to_q"]))
    pipeline = tiny.sd_pipeline()
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="`unet` carries LoRA adapters"):
        make_trainer(tmp_path, pipeline)


def test_a_prompt_dataset_is_refused(tmp_path):
    """A dataset without pairs is told which columns are missing."""
    with pytest.raises(ValueError, match="`train_dataset` lacks the columns `chosen`, `rejected`; it has `prompt`"):
        make_trainer(tmp_path, tiny.sd_pipeline(), dataset=Dataset.from_dict({"prompt": ["a cat"]}))


def test_checkpointing_is_on_by_default_under_both_of_its_names(tmp_path, recwarn):
    """As in TRL activations are recomputed unless switched off, by the new name or by the old one."""
    assert InstanceDPOConfig(str(tmp_path)).activation_checkpointing
    assert not [warning for warning in recwarn if "gradient_checkpointing" in str(warning.message)]
    assert not InstanceDPOConfig(str(tmp_path), activation_checkpointing=False).activation_checkpointing
    with pytest.warns(FutureWarning):
        assert not InstanceDPOConfig(str(tmp_path), gradient_checkpointing=False).activation_checkpointing
