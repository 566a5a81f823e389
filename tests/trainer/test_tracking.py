# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import socket

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer


def make_trainer(tmp_path, peft_config=None, **kwargs) -> InstanceDPOTrainer:
    args = InstanceDPOConfig(
        str(tmp_path),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "activation_checkpointing": False,
            **kwargs,
        },
    )
    return InstanceDPOTrainer(tiny.sd_pipeline(), args=args, train_dataset=tiny.pairs(), peft_config=peft_config)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4)], ids=["full", "lora"])
def test_base_and_policy_draw_the_same_before_training_and_differ_after(tmp_path, peft_config):
    """The pictures before training show equal columns; after it, the base's is unchanged and the policy's is not."""
    trainer = make_trainer(
        tmp_path,
        peft_config,
        sample_prompts=["a red circle", "a cat"],
        sample_steps=1,
        num_inference_steps=2,
        report_to="tensorboard",
    )
    trainer.train()
    pictures = {path.stem: np.asarray(Image.open(path)) for path in sorted((tmp_path / "samples").iterdir())}
    assert list(pictures) == ["step-000000", "step-000001", "step-000002"]
    base, policy = slice(8, 264), slice(272, 528)
    rows = slice(32, 32 + 256)  # below the labels
    first, last = pictures["step-000000"], pictures["step-000002"]
    assert np.array_equal(first[rows, base], first[rows, policy])
    assert np.array_equal(first[rows, base], last[rows, base])
    assert not np.array_equal(last[rows, base], last[rows, policy])
    # ... and tensorboard has them, with the model's configuration and the metrics
    (events,) = (tmp_path / "runs").rglob("events*")
    events = EventAccumulator(str(events)).Reload()
    assert [event.step for event in events.Images("samples")] == [0, 1, 2]
    assert {"train/loss", "train/rewards/margins", "train/masks/area"} <= set(events.Tags()["scalars"])


def test_metrics_have_their_names(tmp_path):
    """The logged metrics are TRL's reward names, the errors, and the share of masked area."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    names = set(trainer.state.log_history[0])
    assert names >= {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "errors/chosen",
        "errors/rejected",
        "errors/ref_chosen",
        "errors/ref_rejected",
        "masks/area",
    }


def test_it_trains_outside_of_ci_without_a_network(tmp_path, monkeypatch):
    """With `CI` unset, the constructor and the training open no connection."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    attempts = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: attempts.append(address) or 1 / 0)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: attempts.append(args) or 1 / 0)
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert trainer.state.global_step == 2 and attempts == []


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4)], ids=["full", "lora"])
def test_pushing_uploads_the_weights_and_a_model_card(tmp_path, monkeypatch, peft_config):
    """`push_to_hub` uploads what diffusers loads with a card that names library, dataset, method and settings."""
    commits = []
    repository = type("Repo", (), {"repo_id": "user/sd15-iapo"})()
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: repository)
    monkeypatch.setattr(HfApi, "create_commit", lambda self, name, files, **_: commits.append((name, files)))
    trainer = make_trainer(tmp_path / "sd15-iapo", peft_config)
    trainer.train()
    trainer.push_to_hub(dataset_name="user/pickapic-instance")
    ((name, files),) = commits
    files = {file.path_in_repo for file in files}
    assert name == "user/sd15-iapo" and "README.md" in files
    assert ("pytorch_lora_weights.safetensors" if peft_config else "model_index.json") in files
    card = ModelCard.load(tmp_path / "sd15-iapo" / "README.md")
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    assert card.data.datasets == ["user/pickapic-instance"]
    assert ("lora" in card.data.tags) == (peft_config is not None)
    assert "user/sd15-iapo" in card.text and "| beta | 2000.0 |" in card.text and "CVPR 2026" in card.text
    assert "optimizer steps | 2" in card.text


def test_the_cards_code_runs_as_printed_on_what_was_saved(tmp_path):
    """The card names its base model, and its loading lines are those of a LoRA."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", LoraConfig(r=4))
    trainer.backbone.pipeline.register_to_config(_name_or_path="user/base")
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "user/base" and card.data.to_dict()["base_model_relation"] == "adapter"
    code = card.text.split("```python")[1].split("```")[0]
    code = code.replace('"user/base", dtype=torch.float16', repr(str(tmp_path / "base"))).replace('.to("cuda")', "")
    code = code.replace('"out"', repr(str(tmp_path / "out"))).replace("width=32)", "width=32, num_inference_steps=1)")
    trainer.save_model()
    scope = {}
    exec(code.replace("from_pretrained(", "from_pretrained(", 1), scope)
    assert scope["image"].size == (32, 32)


def test_the_state_of_a_run_can_be_read(tmp_path):
    """The configuration that trackers store is JSON."""
    trainer = make_trainer(tmp_path)
    assert json.loads(trainer.model.config.to_json_string())["sample_size"] == 8
    assert trainer.model.config.to_dict()["sample_size"] == 8
