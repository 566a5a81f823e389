# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is saved and pushed is whole, and tells nothing of the machine."""

import json
import logging
import os
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("trl_diffusion.hub.get_token", lambda: None)


def make_trainer(folder: Path, model: str | DiffusionPipeline | None = None, is_lora: bool = True, **settings):
    args = InstanceDPOConfig(
        str(folder), **{**tiny.FAST, "max_steps": 2, "use_cpu": True, "resolution": 32, **settings}
    )
    evaluates = settings.get("load_best_model_at_end")
    return InstanceDPOTrainer(
        model or tiny.sd_pipeline(),
        args=args,
        train_dataset=tiny.pairs(4),
        eval_dataset=tiny.pairs(2) if evaluates else None,
        peft_config=tiny.lora() if is_lora else None,
    )


BEST = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "full"])
def test_no_file_of_a_training_holds_a_path(tmp_path, is_lora):
    """Weights, checkpoints, card, samples and TensorBoard's files do not contain where the model or the output lies."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    settings = {"sample_prompts": ["a cat"], "sample_steps": 1, "num_inference_steps": 1, "report_to": "tensorboard"}
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "model"), is_lora, **BEST, **settings)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) > 10 and any("tfevents" in file.name for file in files)
    assert [file for file in files if str(tmp_path).encode() in file.read_bytes()] == []


def test_a_saved_pipeline_keeps_the_hub_id_that_it_comes_from(tmp_path):
    """Of where a model was loaded from, `model_index.json` keeps a Hub id, and the components nothing."""
    pipeline = tiny.sd_pipeline()
    pipeline.register_to_config(_name_or_path="user/base")
    pipeline.vae.register_to_config(_name_or_path="/cache/snapshots/0/vae")
    trainer = make_trainer(tmp_path, pipeline, is_lora=False)
    trainer.save_model()
    assert json.loads((tmp_path / "model_index.json").read_text())["_name_or_path"] == "user/base"
    assert "_name_or_path" not in json.loads((tmp_path / "vae" / "config.json").read_text())
    assert DiffusionPipeline.from_pretrained(tmp_path).config["_name_or_path"]  # and it still loads


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(tmp_path):
    """A run that is resumed elsewhere still knows its best checkpoint, although no file holds its path."""
    first = make_trainer(tmp_path / "here", **BEST)
    first.train()
    best = Path(first.state.best_model_checkpoint).name
    assert best == "checkpoint-1"
    os.rename(tmp_path / "here", tmp_path / "there")
    second = make_trainer(tmp_path / "there", **BEST)
    second.train(resume_from_checkpoint=str(tmp_path / "there" / "checkpoint-1"))
    assert second.state.best_model_checkpoint == str(tmp_path / "there" / best)


def test_without_a_token_the_configuration_says_how_to_log_in(tmp_path, caplog):
    """`push_to_hub` without a token is said before anything is loaded."""
    caplog.set_level(logging.WARNING, "trl_diffusion")
    InstanceDPOConfig(str(tmp_path), push_to_hub=True, hub_token="hf_given", use_cpu=True)
    assert "hf auth login" not in caplog.text
    InstanceDPOConfig(str(tmp_path), push_to_hub=True, use_cpu=True)
    assert "hf auth login" in caplog.text


def refused(*args, **kwargs):
    request = httpx2.Request("POST", "https://huggingface.co/api/repos/create")
    raise HfHubHTTPError("403 Forbidden: you may not.", response=httpx2.Response(403, request=request))


@pytest.mark.parametrize("token", [None, "hf_given"])
def test_a_push_that_fails_has_saved_before(tmp_path, monkeypatch, token):
    """Without a token, or where the Hub refuses, the weights are saved, and the error says where and what to do."""
    monkeypatch.setattr(HfApi, "create_repo", refused)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="403 Forbidden" if token else "hf auth login") as caught:
        trainer.push_to_hub(token=token)
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_what_a_checkpoint_pushes(tmp_path, monkeypatch, strategy):
    """`hub_strategy` decides what is pushed with each checkpoint; pickled arguments, which hold the token, are never there."""
    pushed = []

    def create_commit(self, repo_id, operations, **kwargs):
        names = {operation.path_in_repo for operation in operations}
        pushed.append(names)
        for operation in operations:
            with operation.as_file() as file:
                assert str(tmp_path).encode() not in file.read()

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *args, **kwargs: [])
    repository = type("Repository", (), {"repo_id": "user/out"})
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: repository)
    settings = {**BEST, "push_to_hub": True, "hub_token": "hf_given", "hub_strategy": strategy}
    make_trainer(tmp_path / "out", **settings).train()
    folders = {"every_save": [{""}] * 2, "checkpoint": [{"", "last-checkpoint"}] * 2, "end": []}
    folders["all_checkpoints"] = [{"", "checkpoint-1"}, {"", "checkpoint-2"}]
    lora, card = "pytorch_lora_weights.safetensors", {"README.md", "comfyui/out.safetensors"}
    for names, expected in zip(pushed, folders[strategy], strict=True):
        assert {os.path.dirname(name) for name in names if name.endswith(lora)} == expected
        assert card <= names and not any(name.endswith(".bin") for name in names)
