# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, namedtuple
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import CLIPTextModel

from tests import tiny
from tests.tiny import FAST, FLOWS, PIPELINES, lora, max_difference, weights
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    instance_pair_features,
)
from trl_diffusion.backbones import StableDiffusionBackbone
from trl_diffusion.data import caching
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.trainer import prompt_list
from trl_diffusion.trainer.attributes import EXPERT_FILE_NAME
from trl_diffusion.trainer.fingerprints import tokenizer_fingerprint
from trl_diffusion.trainer.noised_batch import Noiser


ROOT = Path(__file__).parents[2]


def iapo(folder, pipeline=None, dataset=None, precompute=True, **kwargs) -> InstanceDPOTrainer:
    names = ("eval_dataset", "data_collator", "peft_config", "ref_model", "callbacks")
    given = {name: kwargs.pop(name) for name in names if name in kwargs}
    pipeline = pipeline or tiny.sd_pipeline()
    settings = {"precompute": precompute, "precompute_dir": str(folder / "cache"), "beta": 50.0, "inversion_steps": 4}
    settings |= tiny.settings(pipeline)
    return InstanceDPOTrainer(
        pipeline,
        args=InstanceDPOConfig(**{"output_dir": str(folder), **FAST, **settings, **kwargs}),
        train_dataset=tiny.pairs(6) if dataset is None else dataset,
        **given,
    )


@pytest.fixture(scope="module")
def criteria(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("criteria") / "tiny.yaml"
    path.write_text(tiny.CRITERIA)
    return str(path)


def expert_trainer(folder, criteria, pipeline=None, dataset=None, precompute=True, **kwargs) -> AttributeSFTTrainer:
    pipeline = pipeline or tiny.sd_pipeline()
    settings = {"precompute": precompute, "precompute_dir": str(folder / "cache"), "criteria": criteria}
    settings |= tiny.settings(pipeline)
    return AttributeSFTTrainer(
        pipeline,
        args=AttributeSFTConfig(str(folder), **{**FAST, **settings, **kwargs}),
        train_dataset=tiny.paintings(6) if dataset is None else dataset,
        peft_config=lora(),
    )


@pytest.fixture(scope="module")
def experts(tmp_path_factory, criteria) -> dict[str, str]:
    """A folder with an expert for each family."""
    folders = {family: tmp_path_factory.mktemp(f"expert_{family}") for family in ("sd", "sdxl", *FLOWS)}
    for family, folder in folders.items():
        trainer = expert_trainer(folder, criteria, PIPELINES[family](), precompute=False, learning_rate=0.05)
        trainer.train()
        trainer.save_model()
    return {family: str(folder) for family, folder in folders.items()}


def cpo(folder, expert, criteria, pipeline=None, dataset=None, precompute=True, **kwargs) -> ComplexPOTrainer:
    eval_dataset = kwargs.pop("eval_dataset", None)
    pipeline = pipeline or tiny.sd_pipeline()
    settings = {"precompute": precompute, "precompute_dir": str(folder / "cache"), "criteria": criteria, "beta": 50.0}
    settings |= tiny.settings(pipeline)
    return ComplexPOTrainer(
        pipeline,
        expert,
        args=ComplexPOConfig(str(folder), **{**FAST, **settings, **kwargs}),
        train_dataset=tiny.paintings(6) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        peft_config=lora(),
    )


def logs(trainer, *names: str) -> list[list[float]]:
    return [[entry[name] for name in names] for entry in trainer.state.log_history if names[0] in entry]


def encoder_calls(pipeline) -> dict[str, int]:
    """Counts the images that the VAE encodes and the prompts that the text encoders encode, from now on."""
    counts, encode = Counter(), pipeline.vae.encode

    def noted(pixel_values, *args, **kwargs):
        counts["vae"] += len(pixel_values)
        return encode(pixel_values, *args, **kwargs)

    pipeline.vae.encode = noted
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).register_forward_pre_hook(
                lambda module, args, kwargs, name=name: counts.update(
                    {name: len(args[0] if args else kwargs["input_ids"])}
                ),
                with_kwargs=True,
            )
    return counts


def work(capsys) -> dict[str, bool]:
    """What was printed since the last call: each thing that was needed, and whether any of it was missing."""
    said = capsys.readouterr().out
    done = dict.fromkeys(re.findall(r"^Precomputed before: (.*), [\d,]+ rows in", said, re.M), False)
    return done | dict.fromkeys(re.findall(r"^Precomputing (.*): [\d,]+ of [\d,]+ rows are", said, re.M), True)


def computed(capsys) -> set[str]:
    return {name for name, was_missing in work(capsys).items() if was_missing}


IMAGES, PROMPTS, INVERSIONS = "images of train_dataset", "prompts", "noised rows of epoch 1"


# ---- Precomputed equals live ----


def assert_same_batches(live, precomputed, epochs=(0, 1), tolerance: float = 5e-6):
    """Latents, conditions, masks, noised latents and the reference's predictions of some rows, in each epoch."""
    timesteps = []
    for epoch in epochs:
        found = []
        for trainer in (live, precomputed):
            trainer.model.train()
            trainer.state.epoch, trainer.state.global_step = epoch, epoch
            batch = trainer.data_collator([trainer.train_dataset[row] for row in (3, 0, 1)])
            with torch.no_grad():
                with trainer.accelerator.autocast():
                    noised = next(trainer.noised_batches(trainer.model, batch))._asdict()
            conditions, masks = noised.pop("batch").values()
            found.append({"masks": masks, **conditions, **noised.pop("frozen"), **noised})
        one, other = found
        assert one.keys() == other.keys()
        assert torch.equal(one["timesteps"], other["timesteps"]) and torch.equal(one["masks"], other["masks"])
        for name in one:
            # The noise follows from the noised latents by dividing by s_t, which is 0.03 at the first timestep
            largest = {"noise": 35 * tolerance, "latents": min(1e-6, tolerance)}.get(name, tolerance)
            difference = (one[name].float() - other[name].float()).abs().max().item()
            assert difference <= largest, (name, difference)
        timesteps += one["timesteps"].tolist()
    assert len(set(timesteps)) > 2


AUGMENTED = {"prompt_dropout": 0.5, "random_flip": True, "center_crop": False}


@pytest.mark.parametrize(
    ("family", "kind", "source"),
    [
        ("sd", "full", "inversion"),
        ("sd", "lora", "inversion_eta"),
        ("sd", "lora", "random"),
        ("sd_v", "full", "inversion_eta"),
        ("sd_v", "lora", "inversion"),
        ("sdxl", "full", "random"),
        ("sdxl", "full", "inversion_eta"),
        ("sdxl", "lora", "inversion"),
        ("sd3", "full", "inversion_eta"),
        ("sd3", "lora", "random"),
        ("flux", "full", "random"),
        ("flux", "lora", "inversion"),
    ],
)
def test_a_step_gets_the_same_live_and_precomputed(tmp_path, family, kind, source):
    """Latents, text and image conditions, masks, noised latents and the reference's predictions, to the rounding of other batches."""
    settings = AUGMENTED | {"peft_config": lora() if kind == "lora" else None, "max_steps": 6, "inversion_steps": 4}
    settings |= {"noise_source": source.split("_")[0], "inversion_eta": 0.1 if source.endswith("eta") else 0.0}
    live, precomputed = (iapo(tmp_path, PIPELINES[family](), precompute=on, **settings) for on in (False, True))
    assert len(precomputed.noised_caches) == (0 if source == "random" else 2)
    assert_same_batches(live, precomputed)


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_in_bf16_a_step_gets_the_same_live_and_precomputed(tmp_path, peft_config):
    """To bf16's rounding."""
    settings = AUGMENTED | {"peft_config": peft_config, "noise_source": "inversion", "bf16": True, "use_cpu": True}
    settings |= {"max_steps": 6, "per_device_eval_batch_size": 3}
    live, precomputed = (iapo(tmp_path, precompute=on, **settings) for on in (False, True))
    assert_same_batches(live, precomputed, tolerance=3e-2)


def test_another_reference_inverts_and_predicts(tmp_path):
    """With `ref_model`, what is precomputed is that model's."""
    settings = {"noise_source": "inversion", "max_steps": 6}
    trainers = [iapo(tmp_path, precompute=on, ref_model=tiny.other_unet(), **settings) for on in (False, True)]
    assert_same_batches(*trainers)


@pytest.mark.parametrize(
    ("family", "kind", "source"),
    [
        ("sd", "full", "inversion"),
        ("sd", "lora", "random"),
        ("sdxl", "full", "random"),
        ("sdxl", "lora", "inversion"),
        ("flux", "full", "random"),
    ],
)
def test_training_for_two_epochs_is_the_same_live_and_precomputed(tmp_path, family, kind, source):
    """The same losses and errors, step by step, also with an evaluation between."""
    settings = AUGMENTED | {"peft_config": lora() if kind == "lora" else None, "noise_source": source}
    settings |= {"inversion_steps": 3, "max_steps": -1, "num_train_epochs": 2}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny.pairs(3)}
    runs = [iapo(tmp_path, PIPELINES[family](), precompute=on, **settings) for on in (False, True)]
    for trainer in runs:
        trainer.train()
    for names in (("loss", "errors/chosen", "errors/ref_rejected", "masks/area"), ("eval_loss", "eval_errors/chosen")):
        one, other = (torch.tensor(logs(trainer, *names)) for trainer in runs)
        assert len(one) == (6 if names[0] == "loss" else 3)
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0)
    losses = torch.tensor(logs(runs[0], "loss"))
    assert (losses[1:] - math.log(2)).abs().max() > 1e-3
    errors = torch.tensor(logs(runs[0], "errors/ref_rejected"))
    assert (errors - errors.roll(3)).abs().min() > 1e-3  # other noise in the second epoch


CPO_SETTINGS = {
    "plain": {},
    "strength": {"target_strength": 1.5},
    "positive": {"policy_condition": "positive", "target_strength": 1.5},
    "reversed": {"reverse_preference": True, "policy_condition": "positive"},
    "dropout": {"prompt_dropout": 0.5, "target_strength": 1.5},
    "inversion": {"noise_source": "inversion", "inversion_steps": 3},
    "ref_preds": {"precompute_ref_preds": True, "target_strength": 1.5, "prompt_dropout": 0.5},
    "paired": {"attribute_targets": "paired", "prompt_dropout": 0.5, "reverse_preference": True},
    "few": {"max_attributes": 1, "attribute_order": "given", "attribute_separator": " and "},
}


CPO_FAMILIES = [("sdxl" if setting in ("strength", "dropout") else "sd", setting) for setting in CPO_SETTINGS]
CPO_FAMILIES += [("sd3", "inversion"), ("flux", "ref_preds")]


@pytest.mark.parametrize(("family", "setting"), CPO_FAMILIES)
def test_cpo_trains_the_same_live_and_precomputed(tmp_path, experts, criteria, family, setting):
    """Every prompt that training and evaluation ask for is in the cache, and the losses are the same."""
    settings = {"random_flip": True, "center_crop": False, "max_steps": -1, "num_train_epochs": 2}
    settings |= {"eval_dataset": tiny.paintings(8).select([6, 7]), **CPO_SETTINGS[setting]}
    expert = experts[family]
    if setting == "few":  # an expert that says that it was trained so
        shutil.copytree(expert, tmp_path / "expert")
        expert = tmp_path / "expert"
        path = expert / EXPERT_FILE_NAME
        described = {"attribute_order": "given", "attribute_separator": " and "}
        path.write_text(json.dumps(json.loads(path.read_text()) | described))
    by_epoch = settings.pop("precompute_ref_preds", False)
    runs = [
        cpo(
            tmp_path,
            str(expert),
            criteria,
            PIPELINES[family](),
            precompute=on,
            precompute_ref_preds=on and by_epoch,
            **settings,
        )
        for on in (False, True)
    ]
    runs[0].args.precompute_ref_preds = by_epoch  # a row is noised once in an epoch where predictions are precomputed
    calls = encoder_calls(runs[1].backbone.pipeline)
    evaluations = []
    for trainer in runs:
        trainer.train()
        evaluations.append(trainer.evaluate()["eval_loss"])
    assert not calls
    names = ("loss", "drift", "rewards/margins")
    one, other = (torch.tensor(logs(trainer, *names)) for trainer in runs)
    assert len(one) == 6
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-4)


@pytest.mark.parametrize("attribute_dropout", [0.0, 0.5])
def test_the_expert_trains_the_same_live_and_precomputed(tmp_path, criteria, attribute_dropout):
    """Where attributes are dropped the text encoder is asked in training; else no encoder is."""
    settings = {"attribute_dropout": attribute_dropout, "prompt_dropout": 0.3, "random_flip": True, "max_steps": 6}
    runs = [expert_trainer(tmp_path, criteria, precompute=on, **settings) for on in (False, True)]
    calls = encoder_calls(runs[1].backbone.pipeline)
    for trainer in runs:
        trainer.train()
    one, other = (torch.tensor(logs(trainer, "loss", "attributes/left_out")) for trainer in runs)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert calls["vae"] == 0 and (calls["text_encoder"] > 0) == (attribute_dropout > 0)
    assert (runs[1].encoder.prompt_cache is None) == (attribute_dropout > 0)


def test_gradient_accumulation_with_inversion_equals_a_larger_batch(tmp_path):
    """8 pairs at once or one at a time, live or precomputed: the same weights."""
    ends = []
    for batch_size, precompute in ((8, False), (1, False), (8, True), (1, True)):
        trainer = iapo(
            tmp_path,
            dataset=tiny.pairs(16),
            precompute=precompute,
            noise_source="inversion",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            inversion_steps=3,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            beta=20.0,
        )
        start = weights(trainer.model)
        trainer.train()
        ends.append(weights(trainer.model))
    assert max(max_difference(ends[0], end) for end in ends[1:]) <= 1e-4
    assert max_difference(ends[0], start) > 1e-2


def test_accumulation_over_the_end_of_an_epoch_uses_each_epochs_own_noise(tmp_path):
    """5 rows in batches of 2 with 2 accumulations leave a half step at the end of each epoch."""
    settings = {"dataset": tiny.pairs(5), "noise_source": "inversion", "gradient_accumulation_steps": 2}
    settings |= {"max_steps": 6}
    runs = [iapo(tmp_path, precompute=on, **settings) for on in (False, True)]
    assert len(runs[1].noised_caches) == 3
    for trainer in runs:
        trainer.train()
    one, other = (torch.tensor(logs(trainer, "loss", "errors/ref_chosen")) for trainer in runs)
    torch.testing.assert_close(one, other, atol=2e-4, rtol=0)


RESUMED = [("sd", kind, save_steps) for kind in ("live", "precomputed") for save_steps in (4, 5)]


# Within an epoch, and between two
@pytest.mark.parametrize(("family", "kind", "save_steps"), [*RESUMED, ("flux", "precomputed", 4)])
def test_a_resumed_run_with_inversion_is_the_uninterrupted_one(tmp_path, family, kind, save_steps):
    """The same weights and losses, bit for bit."""
    settings = AUGMENTED | {"dataset": tiny.pairs(10), "max_steps": 8, "noise_source": "inversion"}
    settings |= {
        "inversion_eta": 0.1,
        "precompute": kind == "precomputed",
        "peft_config": lora(),
        "inversion_steps": 4,
    }
    whole = iapo(tmp_path, PIPELINES[family](), save_strategy="steps", save_steps=save_steps, **settings)
    whole.train()
    resumed = iapo(tmp_path, PIPELINES[family](), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{save_steps}"))
    assert logs(resumed, "loss")[save_steps:] == logs(whole, "loss")[save_steps:]
    assert max_difference(weights(whole.model), weights(resumed.model)) == 0


# ---- The encoders ----


@pytest.mark.parametrize("family", ["sd", "sdxl", *FLOWS])
def test_each_image_and_each_prompt_is_encoded_once_and_none_in_training(tmp_path, family):
    """12 images of train_dataset, 4 of eval_dataset, and 3 prompts; of each kind one more, to tell its size."""
    pipeline = PIPELINES[family]()
    calls = encoder_calls(pipeline)
    trainer = iapo(tmp_path, pipeline, prompt_dropout=0.5, eval_dataset=tiny.pairs(2), num_train_epochs=2, max_steps=6)
    assert calls["vae"] in (12 + 2 + 4 + 2, 12 + 4)
    for name in trainer.backbone.text_encoder_names:
        assert calls[name] in (3, 4)
    calls.clear()
    trainer.train()
    trainer.evaluate()
    assert not calls
    assert set(trainer.backbone.offloaded) == set(trainer.backbone.encoder_names)


def test_a_prompt_of_many_rows_is_encoded_once_in_a_live_batch(tmp_path):
    """The text encoder sees each different prompt of a batch, and each row gets its own."""
    trainer = iapo(tmp_path, precompute=False)
    calls = encoder_calls(trainer.backbone.pipeline)
    prompts = ["a cat", "a dog", "a cat", "", "a dog", "a cat"]
    together = trainer.encoder.encode_prompts(prompts)["prompt_embeds"]
    assert calls == {"text_encoder": 3}
    for prompt, embedding in zip(prompts, together, strict=True):
        alone = trainer.encoder.encode_prompts([prompt])["prompt_embeds"][0]
        torch.testing.assert_close(embedding, alone, atol=1e-6, rtol=0)
    calls.clear()
    trainer.encoder.encode_prompts(["a cat"] * 4)
    assert calls == {"text_encoder": 1}


def test_samples_are_made_with_precomputed_data(tmp_path):
    """The pictures are those of a live run: the encoders come back for sampling."""
    pictures = []
    for precompute in (False, True):
        output_dir = tmp_path / f"run-{precompute}"
        settings = {"sample_prompts": ["a cat"], "num_inference_steps": 2, "output_dir": str(output_dir)}
        iapo(tmp_path, precompute=precompute, **settings).train()
        pictures.append([path.read_bytes() for path in sorted((output_dir / "samples").glob("*.png"))])
    assert pictures[0][0] == pictures[1][0] and len(pictures[0]) == len(pictures[1]) == 2


def test_a_saved_pipeline_is_whole(tmp_path):
    """Full training saves the encoders that it did not need."""
    trainer = iapo(tmp_path)
    trainer.train()
    trainer.save_model()
    saved = type(trainer.backbone.pipeline).from_pretrained(tmp_path)
    assert max_difference(weights(saved.vae), weights(tiny.sd_pipeline().vae)) == 0


# ---- What is encoded again ----


def all_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cache").glob("*.arrow")}


@pytest.mark.parametrize("fail_at", [2, 4, 7])
def test_an_interrupted_precomputation_goes_on(tmp_path, monkeypatch, fail_at):
    """Files of 2 rows; the VAE fails, is repaired, and the files are those of an uninterrupted run."""
    monkeypatch.setattr(caching, "ROWS_PER_FILE", 2)
    settings = {"noise_source": "inversion", "per_device_eval_batch_size": 1, "dataset": tiny.pairs(7), "max_steps": 4}
    iapo(tmp_path / "whole", **settings)
    whole = all_files(tmp_path / "whole")
    pipeline = tiny.sd_pipeline()
    encode, calls = pipeline.vae.encode, []

    def failing(pixel_values):
        if len(calls) == 2 * fail_at:
            raise RuntimeError("the power fails")
        calls.append(len(pixel_values))
        return encode(pixel_values)

    pipeline.vae.encode = failing
    with pytest.raises(RuntimeError, match="the power fails"):
        iapo(tmp_path / "cut", pipeline, **settings)
    finished = len(all_files(tmp_path / "cut"))
    assert finished == (fail_at - 1) // 2
    pipeline = tiny.sd_pipeline()
    calls = encoder_calls(pipeline)
    iapo(tmp_path / "cut", pipeline, **settings)
    assert calls["vae"] in (2 * (7 - 2 * finished), 2 * (7 - 2 * finished) + 2)
    again = all_files(tmp_path / "cut")
    assert again.keys() == whole.keys()
    assert all(again[name] == whole[name] for name in whole)


def test_an_interrupted_inversion_goes_on(tmp_path, monkeypatch):
    """The denoiser fails in the second file of the first epoch: images, prompts and the first file stay."""
    monkeypatch.setattr(caching, "ROWS_PER_FILE", 2)
    settings = {"noise_source": "inversion", "per_device_eval_batch_size": 1, "dataset": tiny.pairs(5)}
    iapo(tmp_path / "whole", **settings)
    noise, calls = Noiser.__call__, []

    def failing(self, *args):
        if len(calls) == 4:
            raise RuntimeError("the power fails")
        calls.append(None)
        return noise(self, *args)

    monkeypatch.setattr(Noiser, "__call__", failing)
    with pytest.raises(RuntimeError, match="the power fails"):
        iapo(tmp_path, **settings)
    assert len([name for name in all_files(tmp_path) if name.startswith("noised-rows")]) == 1
    calls = [None] * 10
    pipeline = tiny.sd_pipeline()
    encoded = encoder_calls(pipeline)
    iapo(tmp_path, pipeline, **settings)
    assert len(calls) in (10 + 3, 10 + 4) and not encoded
    assert all_files(tmp_path) == all_files(tmp_path / "whole")


def test_a_second_trainer_encodes_nothing(tmp_path, capsys):
    """Also one that trains another way: a LoRA, another learning rate, beta, masks, batch."""
    settings = {"noise_source": "inversion", "eval_dataset": tiny.pairs(2), "max_steps": 6}
    iapo(tmp_path, **settings)
    assert computed(capsys) == {IMAGES, "images of eval_dataset", PROMPTS, INVERSIONS, "noised rows of epoch 2"}
    pipeline = tiny.sd_pipeline()
    calls = encoder_calls(pipeline)
    iapo(tmp_path, pipeline, **settings)
    assert not calls and computed(capsys) == set()
    for change in (
        {"peft_config": lora()},
        {"learning_rate": 1e-4, "beta": 7.0, "w_neg": -1.0, "mask_overlap": "covering", "reverse_preference": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 3},
        {"noise_source": "random"},
        {"inversion_model": "policy"},
        {"sample_prompts": ["a cat"]},
    ):
        iapo(tmp_path, **settings | change)
        assert computed(capsys) == set(), change


def changed_pipeline(what: str):
    pipeline = tiny.sd_pipeline()
    with torch.no_grad():
        if what in ("vae", "text_encoder"):
            for weight in getattr(pipeline, what).parameters():
                weight.mul_(1.01)
        elif what == "scale":
            pipeline.vae.register_to_config(scaling_factor=0.5)
        elif what == "schedule":
            pipeline.scheduler = tiny.scheduler(prediction_type="epsilon", num_train_timesteps=900)
        elif what == "prediction_type":
            pipeline.scheduler = tiny.scheduler(prediction_type="v_prediction")
        elif what == "text_encoder_activation":
            config = copy.deepcopy(pipeline.text_encoder.config)
            config.hidden_act = "relu"
            encoder = CLIPTextModel(config)
            encoder.load_state_dict(pipeline.text_encoder.state_dict())
            pipeline.text_encoder = encoder
        elif what == "padding":
            pipeline.tokenizer.pad_token = "a</w>"
        elif what == "heads":
            unet = type(pipeline.unet).from_config({**pipeline.unet.config, "attention_head_dim": 2})
            unet.load_state_dict(pipeline.unet.state_dict())
            pipeline.unet = unet
    return pipeline


ALL = {IMAGES, PROMPTS, INVERSIONS}
CHANGES = {
    "seed": ({"seed": 1}, {INVERSIONS}, {IMAGES}),
    "seed_of_crops": ({"seed": 1, "center_crop": False}, {IMAGES, INVERSIONS}, set()),
    "resolution": ({"resolution": 64}, {IMAGES, INVERSIONS}, set()),
    "center_crop": ({"center_crop": False}, {IMAGES, INVERSIONS}, set()),
    "random_flip": ({"random_flip": True}, {IMAGES, INVERSIONS}, set()),
    "buckets": ({"aspect_ratio_buckets": True}, {IMAGES, INVERSIONS}, set()),
    "prompt_dropout": ({"prompt_dropout": 0.5}, {PROMPTS, INVERSIONS}, set()),
    "timestep_range": ({"timestep_range": [0, 500]}, {INVERSIONS}, set()),
    "inversion_steps": ({"inversion_steps": 3}, {INVERSIONS}, set()),
    "inversion_eta": ({"inversion_eta": 0.2}, {INVERSIONS}, set()),
    "reference": ({"ref_model": "another"}, {INVERSIONS}, set()),
    "size_conditions": ({"size_conditions": "original"}, set(), {INVERSIONS}),
    "bf16": ({"bf16": True, "use_cpu": True}, ALL, set()),
    "prompts": ({"dataset": "other prompts"}, ALL, set()),
    "instances": ({"dataset": "other instances"}, {IMAGES}, {INVERSIONS}),
    "vae": ({}, {IMAGES, INVERSIONS}, set()),
    "scale": ({}, {IMAGES, INVERSIONS}, set()),
    "text_encoder": ({}, {PROMPTS, INVERSIONS}, set()),
    "text_encoder_activation": ({}, {PROMPTS, INVERSIONS}, set()),
    "padding": ({}, {PROMPTS, INVERSIONS}, set()),
    "schedule": ({}, {INVERSIONS}, set()),
    "prediction_type": ({}, {INVERSIONS}, set()),
    "heads": ({}, {INVERSIONS}, set()),
}


BASE = {"noise_source": "inversion", "inversion_steps": 4}


@pytest.fixture(scope="module")
def base_cache(tmp_path_factory) -> Path:
    """The files of a training that the changes below change."""
    folder = tmp_path_factory.mktemp("base")
    iapo(folder, **BASE)
    return folder / "cache"


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_what_depends_on_a_change_is_encoded_again(tmp_path, base_cache, capsys, change):
    """All that a change of settings, data or weights can alter, and little else; the result is the live one."""
    shutil.copytree(base_cache, tmp_path / "cache")
    computed(capsys)
    settings, needed, allowed = CHANGES.get(change, ({}, set(), set()))
    settings = BASE | settings
    if "ref_model" in settings:
        settings["ref_model"] = tiny.other_unet()
    if settings.get("dataset") == "other prompts":
        settings["dataset"] = tiny.pairs(6).map(lambda row: {"prompt": row["prompt"] + " and a red"})
    if settings.get("dataset") == "other instances":
        settings["dataset"] = tiny.pairs(6).map(lambda row: {"instances": row["instances"][:1]})
    batch_size = {"per_device_train_batch_size": 1} if change == "buckets" else {}
    again = iapo(tmp_path, changed_pipeline(change), **settings | batch_size)
    found = computed(capsys)
    assert needed <= found <= needed | allowed
    live = iapo(tmp_path, changed_pipeline(change), precompute=False, **settings | batch_size)
    if change != "buckets":
        assert_same_batches(live, again, epochs=(0,), tolerance=3e-2 if change == "bf16" else 5e-6)


FLOW_CHANGES = {
    "tokens": ("sd3", {"max_sequence_length": 8}, {PROMPTS, INVERSIONS}),
    "density": ("sd3", {"timestep_density": "logit_normal"}, {INVERSIONS}),
    "guidance": ("flux", {"embedded_guidance": 3.5}, {INVERSIONS}),
    "shift": ("sd3", {}, {INVERSIONS}),
    "t5": ("flux", {}, {PROMPTS, INVERSIONS}),
}


@pytest.mark.parametrize("change", FLOW_CHANGES)
def test_what_depends_on_a_change_of_a_flow_model_is_encoded_again(tmp_path, capsys, change):
    """Its tokens, density, guidance and shift, and T5; the result is the live one."""
    family, settings, needed = FLOW_CHANGES[change]
    iapo(tmp_path, PIPELINES[family](), **BASE)
    computed(capsys)

    def changed():
        pipeline = tiny.sd3_pipeline(shift=5.0) if change == "shift" else PIPELINES[family]()
        if change == "t5":
            with torch.no_grad():
                for weight in pipeline.text_encoder_2.parameters():
                    weight.mul_(1.1)
        return pipeline

    again = iapo(tmp_path, changed(), **BASE | settings)
    assert computed(capsys) == needed
    live = iapo(tmp_path, changed(), precompute=False, **BASE | settings)
    assert_same_batches(live, again, epochs=(0,))


def test_new_prompts_to_evaluate_on_leave_the_inversions_alone(tmp_path, capsys):
    """Inversions are of the training rows and their prompts."""
    iapo(tmp_path, noise_source="inversion")
    computed(capsys)
    eval_dataset = tiny.pairs(2).map(lambda row: {"prompt": "a blue dog"})
    iapo(tmp_path, noise_source="inversion", eval_dataset=eval_dataset)
    said = capsys.readouterr().out
    assert set(re.findall(r"^Precomputing (.*): [\d,]+ of", said, re.M)) == {"images of eval_dataset", PROMPTS}
    assert "Precomputing prompts: 1 of 3 rows are missing" in said


def test_more_epochs_add_their_own_inversions_only(tmp_path, capsys):
    """A longer training finds the first epochs there."""
    iapo(tmp_path, noise_source="inversion", max_steps=6)
    computed(capsys)
    trainer = iapo(tmp_path, noise_source="inversion", max_steps=-1, num_train_epochs=2.5)
    assert computed(capsys) == {"noised rows of epoch 3"} and len(trainer.noised_caches) == 3
    visited = trainer.noised_caches[2].dataset["id"][:]
    assert len(visited) == 4  # of 6, in two steps
    first, third = (trainer.noised_caches[epoch][visited]["timesteps"] for epoch in (0, 2))
    assert not torch.equal(first, third)
    trainer.train()
    assert trainer.state.global_step == 8


@pytest.mark.parametrize("source", ["order", "weights", "criteria"])
def test_the_experts_files_follow_what_its_prompts_are_made_of(tmp_path, criteria, capsys, source):
    """Another order of the attributes, other words for them: other prompts, and the losses of a live run."""
    expert_trainer(tmp_path, criteria, dataset=tiny.paintings(8))
    assert computed(capsys) == {IMAGES, PROMPTS}
    settings = {}
    if source == "order":
        settings = {"attribute_order": "given"}
    elif source == "criteria":
        path = tmp_path / "tiny.yaml"
        path.write_text(tiny.CRITERIA.replace("positive: red, negative: blue", "positive: blue, negative: red"))
        criteria = str(path)
    pipelines = [tiny.sd_pipeline(seed=1 if source == "weights" else 0) for _ in range(2)]
    runs = [
        expert_trainer(tmp_path, criteria, pipeline, tiny.paintings(8), precompute=on, **settings)
        for pipeline, on in zip(pipelines, (False, True), strict=True)
    ]
    assert PROMPTS in computed(capsys)
    for trainer in runs:
        trainer.train()
    torch.testing.assert_close(torch.tensor(logs(runs[0], "loss")), torch.tensor(logs(runs[1], "loss")))


def encodings_of_all_trainers(folder, criteria: str, expert: str) -> int:
    """Precomputes for all trainers in one folder, and counts what their encoders had to encode."""
    pipelines = [PIPELINES[name]() for name in ("sd", "sdxl", "sd", "sd")]
    calls = [encoder_calls(pipeline) for pipeline in pipelines]
    pairs, paintings = tiny.pairs(2), tiny.paintings(4)
    iapo(folder, pipelines[0], pairs, noise_source="inversion", inversion_steps=2, prompt_dropout=0.5, max_steps=1)
    iapo(folder, pipelines[1], pairs.remove_columns("id"))
    expert_trainer(folder, criteria, pipelines[2], paintings)
    cpo(folder, expert, criteria, pipelines[3], paintings, target_strength=1.5)
    return sum(sum(each.values()) for each in calls)


SCRIPT = """
import sys
from pathlib import Path
from tests.trainer.test_precompute import encodings_of_all_trainers

print("found", hash("the same"), encodings_of_all_trainers(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
"""


def test_another_python_process_finds_the_files(tmp_path, criteria, experts):
    """Whatever the order in which it hashes strings: what it computes is named the same, for all trainers."""
    assert encodings_of_all_trainers(tmp_path, criteria, experts["sd"]) > 0
    files = sorted(all_files(tmp_path))
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), criteria, experts["sd"]]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment
    )
    other_hash, num_encodings = re.search(r"found (-?\d+) (\d+)", output.stdout.decode()).groups()
    assert int(other_hash) != hash("the same")
    assert (int(num_encodings), sorted(all_files(tmp_path))) == (0, files)


def test_a_pipeline_from_another_folder_finds_the_files(tmp_path, capsys):
    """The weights count, not where they lie."""
    for name in ("one", "other"):
        tiny.sd_pipeline().save_pretrained(tmp_path / name)
    iapo(tmp_path, str(tmp_path / "one"), noise_source="inversion")
    assert computed(capsys) == ALL
    iapo(tmp_path, str(tmp_path / "other"), noise_source="inversion")
    assert computed(capsys) == set()


# ---- Datasets ----


def varied(rows: int = 6) -> Dataset:
    """Rows with 0 to 3 instances."""
    instance = tiny.pairs(2)[1]["instances"]
    return tiny.pairs(rows).map(lambda row, index: {"instances": (2 * instance)[: index % 4]}, with_indices=True)


def transformed(batch):
    return {**batch, "prompt": [f"{prompt} and a red" for prompt in batch["prompt"]]}


DATASETS = {
    "counts": varied,
    "no_instances": lambda: tiny.pairs(6, with_instances=False),
    "empty_instances": lambda: tiny.pairs(6).map(lambda row: {"instances": []}),
    "extra_columns": lambda: tiny.pairs(6).add_column("source", ["x"] * 6).add_column("score", [{"a": 1.0}] * 6),
    "integer_ids": lambda: tiny.pairs(6).remove_columns("id").add_column("id", [5, 3, 99, 0, 1, 2]),
    "no_ids": lambda: tiny.pairs(6).remove_columns("id"),
    "transform": lambda: tiny.pairs(6).with_transform(transformed),
    "shuffled": lambda: tiny.pairs(12).shuffle(seed=0).select(range(6)),
    "torch_format": lambda: tiny.pairs(6, with_instances=False).with_format("torch"),
    "one_prompt": lambda: tiny.pairs(6).map(lambda row: {"prompt": "a cat"}),
    "empty_prompts": lambda: tiny.pairs(6).map(lambda row: {"prompt": ""}),
}


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_of_every_kind_give_what_they_give_live(tmp_path, monkeypatch, name):
    """Instances of different counts or none, further columns, other ids, transforms: in files of 4 rows."""
    monkeypatch.setattr(caching, "ROWS_PER_FILE", 4)
    settings = {"noise_source": "inversion", "inversion_steps": 3, "prompt_dropout": 0.5}
    live, precomputed = (iapo(tmp_path, dataset=DATASETS[name](), precompute=on, **settings) for on in (False, True))
    assert_same_batches(live, precomputed, epochs=(0,))
    for trainer in (live, precomputed):
        trainer.train()
    one, other = (
        torch.tensor(logs(trainer, "loss", "errors/chosen", "masks/area")) for trainer in (live, precomputed)
    )
    torch.testing.assert_close(one, other, atol=2e-4, rtol=0)


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("column", ["tensors", "training_size", "chosen_latents_mean"])
def test_a_further_column_with_a_name_of_ours_is_ignored(tmp_path, column, precompute):
    """Further columns are ignored, whatever they are called."""
    settings = {"precompute": precompute, "aspect_ratio_buckets": True, "max_steps": 3}
    dataset = tiny.pairs(6).map(lambda row: {"rejected": row["chosen"]})  # of two sizes
    plain = iapo(tmp_path, dataset=dataset, **settings)
    named = iapo(tmp_path, dataset=dataset.add_column(column, [[1, 2]] * 6), **settings)
    for trainer in (plain, named):
        trainer.train()
    torch.testing.assert_close(*(torch.tensor(logs(trainer, "errors/chosen")) for trainer in (plain, named)))


def test_workers_read_what_is_precomputed(tmp_path):
    """The same losses with a process that reads ahead."""
    runs = [iapo(tmp_path, noise_source="inversion", dataloader_num_workers=number) for number in (0, 1)]
    for trainer in runs:
        trainer.train()
    torch.testing.assert_close(*(torch.tensor(logs(trainer, "loss")) for trainer in runs))


def test_one_row_trains(tmp_path):
    """The smallest dataset, for several epochs."""
    trainer = iapo(tmp_path, dataset=tiny.pairs(1), noise_source="inversion", max_steps=3)
    assert len(trainer.noised_caches) == 3
    trainer.train()
    assert all(math.isfinite(loss) for (loss,) in logs(trainer, "loss"))


def test_several_datasets_to_evaluate_on_are_encoded_each(tmp_path):
    """Under their names, which may be of several words and paths."""
    datasets = {"first": tiny.pairs(2), "second one": tiny.pairs(3), "group/third": tiny.pairs(1)}
    live, precomputed = (iapo(tmp_path, precompute=on, eval_dataset=datasets).evaluate() for on in (False, True))
    for name in datasets:
        key = f"eval_{name}_errors/chosen"
        assert live[key] == pytest.approx(precomputed[key], abs=1e-6)


def test_a_trainer_without_datasets_has_nothing_to_precompute(tmp_path):
    """It can be made, as it can without `precompute`."""
    args = InstanceDPOConfig(str(tmp_path), **FAST, precompute=True, precompute_dir=str(tmp_path / "cache"))
    InstanceDPOTrainer(tiny.sd_pipeline(), args=args)


def test_only_an_evaluation_can_be_precomputed(tmp_path):
    """Without a train_dataset."""
    metrics = []
    for precompute in (False, True):
        settings = FAST | {"precompute": precompute, "precompute_dir": str(tmp_path / "cache")}
        args = InstanceDPOConfig(str(tmp_path), noise_source="inversion", **settings)
        trainer = InstanceDPOTrainer(tiny.sd_pipeline(), args=args, eval_dataset=tiny.pairs(3))
        metrics.append(trainer.evaluate()["eval_errors/chosen"])
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_a_dataset_that_was_not_precomputed_is_evaluated_like_any_other(tmp_path, family):
    """`evaluate` of another dataset, whose prompts no cache holds, gives what it gives without `precompute`."""
    other = tiny.pairs(3).map(
        lambda row, index: {"prompt": ["a blue dog", row["prompt"]][index % 2]}, with_indices=True
    )
    live = iapo(tmp_path, PIPELINES[family](), precompute=False).evaluate(other)
    trainer = iapo(tmp_path, PIPELINES[family]())
    calls = encoder_calls(trainer.backbone.pipeline)
    metrics = trainer.evaluate(other)
    assert metrics.keys() == live.keys()
    for name in set(live) - TIMES:
        assert metrics[name] == pytest.approx(live[name], abs=1e-6), name
    assert calls["vae"] == 6 and calls["text_encoder"] > 0
    assert set(trainer.backbone.offloaded) == set(trainer.backbone.encoder_names)
    calls.clear()
    trainer.train()
    assert not calls


TIMES = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time", "epoch"}


def what_is_found(folder, *kinds: str) -> tuple:
    """Losses, evaluations, metrics and weights of a training and an evaluation, each on rows in memory or on a stream."""
    datasets = [
        rows.to_iterable_dataset() if kind == "stream" else rows
        for rows, kind in zip((tiny.pairs(6), tiny.pairs(3)), kinds, strict=True)
    ]
    settings = {"precompute": False, "train_sampling_strategy": "sequential", "max_steps": 2}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    trainer = iapo(folder, dataset=datasets[0], eval_dataset=datasets[1], **settings)
    trainer.train()
    metrics = {name: value for name, value in trainer.evaluate().items() if name not in TIMES}
    evaluations = torch.tensor(logs(trainer, "eval_loss", "eval_errors/chosen", "eval_rewards/margins"))
    return logs(trainer, "loss"), evaluations, metrics, weights(trainer.model)


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory) -> tuple:
    return what_is_found(tmp_path_factory.mktemp("memory"), "memory", "memory")


@pytest.mark.parametrize("train", ["memory", "stream"])
@pytest.mark.parametrize("evaluation", ["memory", "stream"])
def test_streams_and_rows_in_memory_mix(tmp_path, in_memory, train, evaluation):
    """Train on one and evaluate on the other: the weights and metrics are those of rows in memory."""
    one, other = in_memory, what_is_found(tmp_path, train, evaluation)
    assert one[0] == other[0] and len(one[0]) == 2 and max_difference(one[3], other[3]) == 0
    assert torch.equal(one[1], other[1]) and len(one[1]) == 3
    assert one[2] == other[2]


def test_the_size_that_is_expected_is_what_a_dataset_takes(tmp_path, monkeypatch, capsys):
    """Images and inversions of 150 pairs at 64 x 64: what is said is within 5 % of what is written."""
    said, expected = caching.precompute_dataset, {}
    usage = namedtuple("Usage", "total used free")

    class Free(int):
        """A number of bytes that notes what it is compared with."""

        def __lt__(self, size):
            expected[len(expected)] = size
            return False

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, Free(10**12)))
    assert said is caching.precompute_dataset
    iapo(tmp_path, dataset=tiny.pairs(150), resolution=64, noise_source="inversion", inversion_steps=2, max_steps=1)
    names = re.findall(r"^Precomputing (.*): [\d,]+ of", capsys.readouterr().out, re.M)
    assert names == [IMAGES, PROMPTS, INVERSIONS]
    for name, size in zip(names, expected.values(), strict=True):
        written = sum(path.stat().st_size for path in (tmp_path / "cache").glob(f"{name.replace(' ', '-')}-*.arrow"))
        if name != PROMPTS:  # two rows, of which the file's own header is a good part
            assert size == pytest.approx(written, rel=0.05), name


# ---- In 16 bit ----


def test_latents_in_16_bit_take_half_the_space(tmp_path):
    """Beside those in 32 bit, whose files they do not take; latents differ by their rounding, and training goes on."""
    trainers = [iapo(tmp_path, precompute_dtype=dtype, resolution=64) for dtype in ("float32", "float16", "float32")]
    rows = [trainer.data_collator([trainer.train_dataset[row] for row in range(3)]) for trainer in trainers]
    assert rows[0]["chosen_latents_mean"].dtype == rows[2]["chosen_latents_mean"].dtype == torch.float32
    assert rows[1]["chosen_latents_mean"].dtype == rows[1]["rejected_latents_std"].dtype == torch.float16
    for name in ("chosen_latents_mean", "rejected_latents_std"):
        torch.testing.assert_close(rows[1][name].float(), rows[0][name], rtol=2**-11, atol=2**-24)
    keys = [(0, name, row_id) for name in "cr" for row_id in rows[0]["id"]]
    exact, rounded = (trainer.encoder.sample_latents(row, keys) for trainer, row in zip(trainers, rows[:2]))
    assert rounded.dtype == torch.float32 and 0 < (exact - rounded).abs().max() < 4e-3
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cache").glob("images-*.arrow"))
    moments = 6 * 2 * 2 * 4 * 16 * 16  # pairs, images, mean and deviation, numbers
    assert len(sizes) == 2 and sizes[1] - sizes[0] == pytest.approx(2 * moments, rel=0.02)
    trainers[1].train()
    assert all(math.isfinite(loss) for (loss,) in logs(trainers[1], "loss"))


@pytest.mark.parametrize("source", ["random", "inversion"])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_latents_in_16_bit_train_under_mixed_precision(tmp_path, family, source):
    """Under autocast to bfloat16, latents in float16 give the losses of those in float32 to bfloat16's rounding."""
    found, settings = [], {"bf16": True, "use_cpu": True, "noise_source": source, "inversion_steps": 1, "beta": 5.0}
    for dtype in ("float32", "float16"):
        trainer = iapo(tmp_path, PIPELINES[family](), precompute_dtype=dtype, peft_config=lora(), **settings)
        trainer.train()
        found.append(torch.tensor(logs(trainer, "loss", "errors/chosen")))
    torch.testing.assert_close(*found, atol=2e-2, rtol=2e-2)


def test_another_type_of_stored_latents_is_refused(tmp_path):
    """bfloat16 has too few digits."""
    with pytest.raises(ValueError, match="`precompute_dtype` must be 'float32' or 'float16', got 'bfloat16'"):
        InstanceDPOConfig(str(tmp_path), precompute_dtype="bfloat16")


# ---- What a second start does not do ----


def test_a_second_start_makes_no_prompt_again(tmp_path, experts, criteria, monkeypatch):
    """The prompts of CPO, which take long to make, are kept: of those of a few rows alone it is seen that they are there."""
    monkeypatch.setattr(prompt_list, "NUM_CHECKED_ROWS", 2)
    asked, prompts_of = [], ComplexPOTrainer.prompts_of
    monkeypatch.setattr(ComplexPOTrainer, "prompts_of", lambda self, row: asked.append(row) or prompts_of(self, row))
    given = (tmp_path, experts["sd"], criteria)
    caches = []
    for expected in (8, 2, 2):
        asked.clear()
        caches.append(cpo(*given, dataset=tiny.paintings(8), max_steps=4).encoder.prompt_cache)
        assert len(asked) == expected
    assert caches[0].dataset["prompt"][:] == caches[1].dataset["prompt"][:]
    for setting in ({"max_attributes": 1}, {"attribute_targets": "paired"}, {"prompt_dropout": 0.5}):
        asked.clear()
        cpo(*given, dataset=tiny.paintings(8), max_steps=4, **setting)
        assert len(asked) == 8, setting
    asked.clear()
    cpo(*given, dataset=tiny.paintings(8).select(range(7, -1, -1)), max_steps=4)
    assert len(asked) == 8


def test_kept_prompts_that_are_not_those_of_the_rows_are_made_again(tmp_path, experts, criteria):
    """As where a subclass makes others than its settings say."""

    class Other(ComplexPOTrainer):
        def prompts_of(self, row):
            return [f"{prompt} !" for prompt in super().prompts_of(row)]

    trainer = cpo(tmp_path, experts["sd"], criteria)
    args = trainer.args
    other = Other(tiny.sd_pipeline(), experts["sd"], args, train_dataset=tiny.paintings(6), peft_config=lora())
    kept = set(other.encoder.prompt_cache.dataset["prompt"][:])
    assert kept == {f"{prompt} !" for prompt in trainer.encoder.prompt_cache.dataset["prompt"][:]}


@pytest.mark.parametrize("rows", [2000, 4000])
def test_a_prompt_is_asked_for_once_however_many_rows_have_it(rows):
    """Of a column of texts, each that differs; in order, null last."""
    asked = []
    dataset = Dataset.from_dict({"prompt": [f"prompt {row % 50}" for row in range(rows)]})
    listed = prompt_list.list_prompts(
        [dataset, dataset], ["prompt"], lambda row: asked.append(row) or [row["prompt"], None]
    )
    assert len(asked) == 2 * 50
    assert listed.to_pylist() == [*sorted(f"prompt {number}" for number in range(50)), None]


def test_a_tokenizer_is_told_by_what_it_makes_of_texts():
    """Not by what it was asked last; another word, another limit, another padding is another one."""
    one, other = tiny.tokenizer(), tiny.tokenizer()
    fingerprint = tokenizer_fingerprint(one)
    one("a cat", padding="max_length", truncation=True)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other) == fingerprint
    other.model_max_length = 10
    assert tokenizer_fingerprint(other) != fingerprint
    other = tiny.tokenizer()
    other.add_tokens(["elephant"])
    assert tokenizer_fingerprint(other) != fingerprint
    assert tokenizer_fingerprint(tiny.t5_tokenizer()) != fingerprint


# ---- Mistakes ----


def test_a_stream_is_refused(tmp_path):
    """For training and for evaluation, by name."""
    with pytest.raises(ValueError, match="`train_dataset` is a stream.*without `precompute`"):
        iapo(tmp_path, dataset=tiny.pairs().to_iterable_dataset())
    with pytest.raises(ValueError, match="`eval_dataset` is a stream.*without `precompute`"):
        iapo(tmp_path, eval_dataset=tiny.pairs().to_iterable_dataset())


def test_ids_that_come_twice_are_refused(tmp_path):
    """Also numbers that are strings elsewhere."""
    dataset = tiny.pairs(6).remove_columns("id").add_column("id", ["0", "1", "2", "1", "4", "0"])
    with pytest.raises(ValueError, match="`train_dataset` has 6 rows with only 4 different ids"):
        iapo(tmp_path, dataset=dataset)


def test_an_own_collator_is_refused(tmp_path):
    """Its work cannot be done beforehand."""
    collator = InstancePairCollator(32)
    with pytest.raises(ValueError, match="`precompute` needs the trainer's own collator"):
        iapo(tmp_path, data_collator=lambda rows: collator(rows))


def test_a_full_disk_is_named_with_the_setting(tmp_path, monkeypatch):
    """Before anything is written."""
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 90, 10))
    with pytest.raises(ValueError, match="Precomputing images of train_dataset needs .* GB.*`precompute_dir`"):
        iapo(tmp_path)
    assert not all_files(tmp_path)


def test_an_unreadable_image_is_named(tmp_path):
    """As in a live training, before it."""
    broken = [{"bytes": b"no image", "path": None}] * 6
    dataset = tiny.pairs(6).remove_columns("chosen").add_column("chosen", broken)
    with pytest.raises(ValueError, match="column `chosen` of the row with id 'row-0' cannot be read"):
        iapo(tmp_path, dataset=dataset)


def test_what_a_short_training_does_not_reach_is_said_and_not_encoded(tmp_path, capsys):
    """How many rows of how many are encoded is in the line of the images."""
    iapo(tmp_path, dataset=tiny.pairs(8), max_steps=2)
    assert f"{IMAGES}: 4 of 4 rows are missing" in (said := capsys.readouterr().out)
    assert said.count("The dataset has 8, and the others are not needed.") == 1
    iapo(tmp_path, dataset=tiny.pairs(8), max_steps=4)
    assert f"{IMAGES}: 4 of 8 rows are missing" in (said := capsys.readouterr().out)
    assert "are not needed" not in said


def test_an_epoch_beyond_those_that_were_precomputed_is_inverted_live(tmp_path):
    """Trained on for longer than was asked when the trainer was made, the losses are those of a live run."""
    found = []
    for precompute in (True, False):
        trainer = iapo(tmp_path, precompute=precompute, noise_source="inversion", max_steps=3, logging_steps=1)
        trainer.args.max_steps = 5  # of 3 an epoch
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(trainer.train_dataset) == 6 and trainer.args.per_device_train_batch_size == 2
    assert len(found[0]) == 5 and found[0] == pytest.approx(found[1], abs=1e-4)


# ---- The reference's predictions ----


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_step_with_precomputed_predictions_asks_the_policy_alone(tmp_path, peft_config, monkeypatch):
    """Over two epochs, loss and margins are those that the reference gives when asked, and it is not asked."""
    trainer = iapo(tmp_path, precompute_ref_preds=True, max_steps=6, logging_steps=1, peft_config=peft_config)
    assert len(trainer.noised_caches) == 2
    calls, predict = [], trainer.backbone.predict

    def counted(*args):
        calls.append(torch.is_grad_enabled())
        return predict(*args)

    monkeypatch.setattr(trainer.backbone, "predict", counted)
    trainer.train()
    assert calls == [True] * 6
    first, *rest = trainer.state.log_history[:6]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and first["rewards/margins"] == pytest.approx(
        0, abs=1e-3
    )

    asked = iapo(tmp_path, precompute_ref_preds=True, max_steps=6, logging_steps=1, peft_config=peft_config)
    asked.noised_caches = []
    asked.train()
    for entry, other in zip(rest, asked.state.log_history[1:6], strict=True):
        for name in ("loss", "rewards/margins", "errors/ref_chosen", "masks/area"):
            assert entry[name] == pytest.approx(other[name], abs=1e-3)
    assert len({entry["errors/ref_chosen"] for entry in (first, *rest)}) == 6  # epochs have other noise


def test_predictions_that_cannot_be_precomputed_are_refused(tmp_path):
    """Without `precompute`, and where the policy inverts."""
    with pytest.raises(ValueError, match="needs `precompute=True`"):
        InstanceDPOConfig(str(tmp_path), precompute_ref_preds=True)
    settings = {"noise_source": "inversion", "inversion_model": "policy"}
    with pytest.raises(ValueError, match="not possible where the policy inverts"):
        InstanceDPOConfig(str(tmp_path), precompute=True, precompute_ref_preds=True, **settings)


# ---- Prompts whose padding is masked ----


@pytest.fixture
def masked(monkeypatch) -> None:
    """The family of Stable Diffusion masks the padding of prompts, and gives as many tokens as a prompt has."""

    def encode_prompts(backbone, prompts):
        embeds = encode_padded(backbone, prompts)["prompt_embeds"]
        lengths = torch.tensor([2 + len((prompt or "").split()) for prompt in prompts])
        kept = torch.arange(embeds.shape[1])[None] < lengths[:, None]
        return {"prompt_embeds": (embeds * kept[..., None])[:, : lengths.max()], "prompt_lengths": lengths}

    encode_padded = StableDiffusionBackbone.encode_prompts
    monkeypatch.setattr(StableDiffusionBackbone, "encode_prompts", encode_prompts)
    monkeypatch.setattr(StableDiffusionBackbone, "padded_conditions", ("prompt_embeds",))


def test_masked_prompts_are_stored_at_their_own_length(tmp_path, masked):
    """Where a family gives `prompt_lengths`, padding is not stored, and a batch is padded to its longest prompt as live."""
    live, cached = (iapo(tmp_path, precompute=precompute, prompt_dropout=0.5).encoder for precompute in (False, True))
    prompts = [None, "a cat and a dog", "a red circle and a blue square"]
    stored = [cached.prompt_cache[[prompt]]["prompt_embeds"].shape[1] for prompt in prompts]
    assert stored == [2, 7, 9]
    for batch in (prompts, prompts[:2], prompts[:1]):
        one, other = live.encode_prompts(batch), cached.encode_prompts(batch)
        assert one.keys() == other.keys() == {"prompt_embeds", "prompt_lengths"}
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)


def prompts_of_all_lengths(rows: int) -> Dataset:
    """Pairs whose prompts differ, with one to ten words."""
    words = [" ".join(tiny.WORDS[(row // 8**place) % 8] for place in range(1 + row % 10)) for row in range(rows)]
    return tiny.pairs(rows).map(lambda row, index: {"prompt": words[index]}, with_indices=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "masked"])
def test_text_is_stored_in_the_precision_of_its_encoder(tmp_path, request, family, dtype):
    """Of encoders in 16 bit every condition is stored in 16 bits, and comes back with the bits that it has live."""
    if family == "masked":
        request.getfixturevalue("masked")
    pipeline = PIPELINES["sd" if family == "masked" else family]()
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).to(dtype)
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    settings = {half: True, "use_cpu": True, "per_device_eval_batch_size": 1, "prompt_dropout": 0.5}
    encoder = iapo(tmp_path, pipeline, peft_config=lora(), **settings).encoder
    cache, prompts = encoder.prompt_cache, ["a cat and a dog", None, "a red circle and a blue square"]
    encoder.prompt_cache = None
    for prompt in prompts:
        stored, live = cache[[prompt]], encoder.encode_prompts([prompt])
        assert stored.keys() == live.keys()
        for name, value in live.items():
            assert value.dtype == (torch.int64 if name == "prompt_lengths" else dtype), name
            assert stored[name].dtype == value.dtype and torch.equal(stored[name], value.cpu()), name
    padded = cache[prompts]
    assert torch.equal(padded["prompt_embeds"][0, : stored["prompt_embeds"].shape[1]], padded["prompt_embeds"][0])


# ---- What is said before ----


UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def said_sizes(said: str) -> dict[str, float]:
    """The bytes that are expected of each kind."""
    found = re.findall(r"^Precomputing (.*): [\d,]+ of [\d,]+ rows are missing, about ([\d.,]+) (\w+) in ", said, re.M)
    return {name: float(number.replace(",", "")) * UNITS[unit] for name, number, unit in found}


SIZES = {
    "sd": {},
    "flux": {"family": "flux"},
    "sdxl": {"family": "sdxl", "precompute_dtype": "float16"},
    "masked": {},
    "part": {"max_steps": 5},
    "buckets": {"aspect_ratio_buckets": True},
    "inversion": {"noise_source": "inversion", "inversion_steps": 1},
    "few": {"rows": 3, "max_steps": 1},
    "masks": {"precompute_dtype": "float16"},
    "masks in buckets": {"precompute_dtype": "float16", "aspect_ratio_buckets": True, "resolution": 48},
}


def some_with_masks(pairs: Dataset) -> Dataset:
    """The pairs, of which every third, but not the first, has twenty instances of which one or two have masks in one image."""
    rows = []
    for number, row in enumerate(pairs):
        if number % 3 == 1:
            row["instances"] = [dict(instance) for instance in row["instances"] * 10]
            for instance in row["instances"][: 1 + number % 2]:
                instance |= {"rejected_box": None, "rejected_mask": Image.new("1", row["rejected"].size, 1)}
        rows.append(row)
    return Dataset.from_list(rows, features=instance_pair_features(masks=True))


@pytest.mark.parametrize("case", SIZES)
def test_what_is_said_of_the_size_is_what_is_written(tmp_path, request, capsys, case):
    """Images, prompts and predictions: within a tenth of what their files have, of many rows and of few, of all lengths and shapes."""
    if case == "masked":
        request.getfixturevalue("masked")
    settings = {"max_steps": -1, "num_train_epochs": 1, "precompute_ref_preds": True, "resolution": 64, **SIZES[case]}
    dataset, pipeline = prompts_of_all_lengths(settings.pop("rows", 60)), PIPELINES[settings.pop("family", "sd")]()
    if case == "buckets":  # two sizes, one of which is much smaller
        settings["resolution"] = 48
    if case.startswith("masks"):
        dataset = some_with_masks(dataset)
    trainer = iapo(tmp_path, pipeline, dataset, eval_dataset=tiny.pairs(4), **tiny.settings(pipeline) | settings)
    said = said_sizes(capsys.readouterr().out)
    assert said.keys() == {IMAGES, "images of eval_dataset", PROMPTS, INVERSIONS}
    for name, size in said.items():
        files = (tmp_path / "cache").glob(f"{re.sub('[^A-Za-z0-9_]+', '-', name)}-*.arrow")
        assert size == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1), name
    assert len(trainer.noised_caches) == 1


def test_the_size_is_said_before_anything_is_encoded(tmp_path, monkeypatch, capsys):
    """All that is known beforehand: when the first file is written, all lines of images and prompts are there."""
    said, write = [], caching.write_files
    monkeypatch.setattr(caching, "write_files", lambda *args: said.append(capsys.readouterr().out) or write(*args))
    iapo(tmp_path, eval_dataset=tiny.pairs(2), noise_source="inversion", inversion_steps=1, max_steps=6)
    assert list(said_sizes(said[0])) == [IMAGES, "images of eval_dataset", PROMPTS]
    assert said[1] == said[2] == ""
    assert list(said_sizes(said[3])) == [INVERSIONS, "noised rows of epoch 2"]


@pytest.mark.parametrize("kind", ["images", "prompts", "noised"])
def test_a_disk_that_is_too_small_for_a_kind_is_told_before_it(tmp_path, monkeypatch, kind):
    """Also where what comes before would fit alone; then neither is encoded."""
    settings = {"noise_source": "inversion", "inversion_steps": 1, "dataset": prompts_of_all_lengths(20)}
    iapo(tmp_path / "whole", **settings)
    sizes = {
        part: sum(path.stat().st_size for path in (tmp_path / "whole" / "cache").glob(f"{part}-*.arrow"))
        for part in ("images", "prompts", "noised")
    }
    usage = namedtuple("Usage", "total used free")
    before = {"images": 0, "prompts": sizes["images"], "noised": 0}
    free = {part: 0.8 * sizes[part] + before[part] if part == kind else 10**9 for part in sizes}
    each = iter(free.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 0, int(next(each))))
    name = {"images": IMAGES, "prompts": PROMPTS, "noised": INVERSIONS}[kind]
    with pytest.raises(ValueError, match=f"Precomputing {name} needs .* GB.*, and the disk of .*`precompute_dir`"):
        iapo(tmp_path, **settings)
    assert bool(all_files(tmp_path)) == (kind == "noised")
