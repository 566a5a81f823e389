# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import logging

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel

from tests import by_hand, tiny
from tests.tiny import FAMILIES, PIPELINES, max_difference, weights
from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer, attribute_features
from trl_diffusion.randomness import keyed_noise


@pytest.fixture(scope="module")
def criteria(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("criteria") / "tiny.yaml"
    path.write_text(tiny.CRITERIA)
    return str(path)


def make_trainer(tmp_path, pipeline, criteria, dataset=None, **kwargs) -> AttributeSFTTrainer:
    trainer_kwargs = {name: kwargs.pop(name) for name in ("peft_config", "eval_dataset") if name in kwargs}
    defaults = {
        "output_dir": str(tmp_path),
        "criteria": criteria,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    return AttributeSFTTrainer(
        pipeline,
        args=AttributeSFTConfig(**{**defaults, **tiny.settings(pipeline), **kwargs}),
        train_dataset=tiny.paintings() if dataset is None else dataset,
        **trainer_kwargs,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_squared_error_for_the_prompt_with_attributes(tmp_path, family, criteria):
    """Loss of a batch = denoising error by parts of diffusers, for the prompt joined with its attributes."""
    trainer = make_trainer(tmp_path, PIPELINES[family](), criteria, dataset=tiny.paintings(4))
    trainer.model.train()
    batch = trainer.data_collator([tiny.paintings(4)[0], tiny.paintings(4)[3]])
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)

    prompts = ["a, red, square, dog", "a and a, blue, circle, cat"]
    assert trainer.prompts(batch) == prompts
    ids, pipeline = batch["id"], trainer.backbone.pipeline
    keys = [(42, 0, row_id, "") for row_id in ids]
    timesteps, noise = trainer.process.sample_timesteps(keys, (8, 8)), keyed_noise(keys, (4, 8, 8))
    posterior_keys = [(42, 0, row_id, "image") for row_id in ids]
    latents = by_hand.latents(pipeline, batch["image_pixel_values"], posterior_keys)
    noisy, target = by_hand.noised(pipeline, latents, noise, timesteps)
    prediction = by_hand.predict(pipeline, trainer.model, noisy, timesteps, prompts)
    expected = (prediction - target).pow(2).mean(dim=[1, 2, 3])
    torch.testing.assert_close(outputs["losses"], expected, atol=1e-5, rtol=1e-5)


def test_a_lora_is_the_default_and_none_trains_all_weights(tmp_path, criteria):
    """Left out, `peft_config` is a LoRA of rank 64; `None` is none."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), criteria)
    assert isinstance(trainer.model, PeftModel) and trainer.model.peft_config["default"].r == 64
    before = weights(trainer.model)
    trainer.train()
    moved = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    full = make_trainer(tmp_path, tiny.sd_pipeline(), criteria, peft_config=None)
    assert not isinstance(full.model, PeftModel) and all(weight.requires_grad for weight in full.model.parameters())


def test_a_pipeline_that_carries_adapters_is_refused(tmp_path, criteria):
    """A second LoRA on top of the first would train what nobody asked for."""
    pipeline = tiny.sd_pipeline()
    make_trainer(tmp_path, pipeline, criteria)
    with pytest.raises(ValueError, match="`unet` carries LoRA adapters"):
        make_trainer(tmp_path, pipeline, criteria)


def test_attributes_are_dropped_one_by_one_by_keyed_draws(tmp_path, criteria):
    """Each attribute is left out with the given probability, in training only, the same way in any batch."""
    row = tiny.paintings(1)[0]
    rows = [{**row, "id": f"row-{index}"} for index in range(600)]
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), criteria, attribute_dropout=0.25)
    collated = {"id": [row["id"] for row in rows], "prompt": ["a"] * 600}
    collated |= {column: [row[column] for row in rows] for column in ("positive_attributes", "negative_attributes")}
    trainer.model.train()
    prompts = trainer.prompts(collated)
    for word in ("red", "square", "dog"):
        assert 0.7 < sum(word in prompt for prompt in prompts) / 600 < 0.8
    # independently: all three with the probability .75^3 = .42
    assert 0.36 < sum(prompt == "a, red, square, dog" for prompt in prompts) / 600 < 0.48
    alone = trainer.prompts({name: values[7:8] for name, values in collated.items()})
    assert alone == prompts[7:8]
    trainer.state.global_step = 1
    assert trainer.prompts(collated) != prompts
    trainer.model.eval()
    assert set(trainer.prompts(collated)) == {"a, red, square, dog"}
    trainer.args.attribute_dropout = 1.0
    trainer.model.train()
    assert set(trainer.prompts(collated)) == {"a"}


@pytest.mark.parametrize(
    "order, expected", [("tree", "a | blue | circle | cat"), ("given", "a | cat | circle | blue")]
)
def test_order_and_separator(tmp_path, criteria, order, expected):
    """`tree` is the order of the criteria, `given` that of the row, positive attributes first."""
    trainer = make_trainer(
        tmp_path, tiny.sd_pipeline(), criteria, attribute_order=order, attribute_separator=" | ", max_attributes=3
    )
    row = {**tiny.paintings(4)[3], "prompt": "a"}
    assert trainer.prompts(trainer.data_collator([row])) == [expected]


def test_what_the_text_encoder_does_not_take_is_said_and_counted(tmp_path, criteria, caplog):
    """Attributes beyond the encoder's length are left out, spread over the dimensions, with one warning and a figure."""
    row = {**tiny.paintings(1)[0], "prompt": "a red circle and a blue square"}  # 7 words of the 10 that fit
    dataset = Dataset.from_list([row] * 4, features=attribute_features())
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), criteria, dataset=dataset, attribute_separator=" ")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.prompts(trainer.data_collator([row])) == ["a red circle and a blue square red square dog"]
    assert "do not all fit into the text encoders" not in caplog.text
    row["prompt"] += " and"
    assert (
        trainer.prompts(trainer.data_collator([row, row]))
        == [
            "a red circle and a blue square and red square"  # one of each dimension
        ]
        * 2
    )
    with caplog.at_level(logging.WARNING):
        trainer.prompts(trainer.data_collator([row]))
    logs = {}
    trainer.model.train()
    trainer.log(logs)
    assert logs["attributes/left_out"] > 0


def test_the_warning_on_length_is_given_once(tmp_path, criteria, caplog):
    """It names the numbers, and is not repeated."""
    row = {**tiny.paintings(1)[0], "prompt": "a red circle and a blue square and"}
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), criteria, attribute_separator=" ")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            trainer.prompts(trainer.data_collator([row]))
    assert caplog.text.count("do not all fit into the text encoders: of 3, 1 are left out") == 1


def test_prompt_dropout_drops_prompt_and_attributes_together(tmp_path, criteria, monkeypatch):
    """What guidance subtracts is the model without any text."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), criteria, prompt_dropout=0.5)
    seen, encode = [], trainer.backbone.encode_prompts
    monkeypatch.setattr(trainer.backbone, "encode_prompts", lambda prompts: (seen.extend(prompts), encode(prompts))[1])
    trainer.train()
    assert None in seen and len(set(seen)) > 1 and all(prompt is None or "," in prompt for prompt in seen)


def test_the_expert_is_saved_with_what_it_was_trained_on(tmp_path, criteria):
    """`attribute_expert.json` beside the LoRA names criteria, form of the prompts and base; the LoRA reloads exactly."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), criteria, peft_config=LoraConfig(r=4, lora_alpha=8))
    trainer.train()
    trainer.save_model()
    described = json.loads((tmp_path / "attribute_expert.json").read_text())
    fingerprint = described.pop("base_fingerprint")
    assert described == {
        "criteria": "tiny",
        "attributes": {"hue": ["red", "blue"], "kind": ["circle", "square"], "pet": ["cat", "dog"]},
        "attribute_order": "tree",
        "attribute_separator": ", ",
    }
    assert len(fingerprint) >= 20 and len(set(fingerprint)) > 15
    pipeline = tiny.sd_pipeline()
    pipeline.load_lora_weights(str(tmp_path))
    inputs = {
        "sample": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(1)),
    }
    trainer.model.eval()
    pipeline.unet.eval()
    with torch.no_grad():
        assert torch.equal(pipeline.unet(**inputs).sample, trainer.model(**inputs).sample)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_gradient_accumulation_equals_a_larger_batch(tmp_path, family, criteria):
    """8 images at once, or one at a time and accumulated: the same weights, dropped attributes included."""
    ends = []
    for batch_size in (8, 1):
        trainer = make_trainer(
            tmp_path,
            PIPELINES[family](),
            criteria,
            dataset=tiny.paintings(16),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            attribute_dropout=0.3,
            peft_config=None,
        )
        start = weights(trainer.model)
        trainer.train()
        ends.append(weights(trainer.model))
    assert max_difference(ends[0], ends[1]) <= 1e-5
    assert max_difference(ends[0], start) > 1e-3


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, family, criteria):
    """Stopped in the middle of an epoch and resumed: the same weights, bit for bit."""
    settings = {"dataset": tiny.paintings(10), "max_steps": 6, "random_flip": True, "prompt_dropout": 0.3}
    settings |= {"center_crop": False, "attribute_dropout": 0.3, "criteria": criteria}
    whole = make_trainer(tmp_path, PIPELINES[family](), save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, PIPELINES[family](), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert max_difference(weights(whole.model), weights(resumed.model)) == 0


@pytest.mark.parametrize("peft_config", [LoraConfig(r=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_samples_are_drawn_beside_the_base(tmp_path, criteria, family, peft_config):
    """Also where all weights are trained: before training the two columns are one."""
    trainer = make_trainer(
        tmp_path,
        PIPELINES[family](),
        criteria,
        peft_config=peft_config,
        sample_prompts=["a, red, cat"],
        num_inference_steps=2,
        guidance_scale=2.0,
    )
    trainer.train()
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step-000000.png", "step-000003.png"}


def test_the_card_shows_a_prompt_with_attributes(tmp_path, criteria):
    """The card names the stage, the criteria and a prompt such as the model was trained on."""
    trainer = make_trainer(tmp_path, tiny.sd_pipeline(), criteria)
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md").text
    assert '"a red bicycle leaning on a stone wall, red, circle"' in card
    assert "| criteria | tiny |" in card and "| attribute_separator | ', ' |" in card  # no path of one's own machine
    assert "arxiv" in card.lower() and "2601.04300" in card and "images per optimizer step | 2" in card
