# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What trainers push to the Hub: which files, with which parameters, and that plain diffusers loads what arrived."""

import json
import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, snapshot_download
from peft import get_peft_model_state_dict

from tests import tiny
from tests.families import FAMILIES
from tests.hub.pointing import waiting
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    Criteria,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)
from trl_diffusion.trainer.publishing import model_files


SETTINGS = {**tiny.FAST, "max_steps": 2, "use_cpu": True, "resolution": 32, "hub_token": "hf_user"}
SAVES = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
HOST = "secret-host-7f3a.example"


@pytest.fixture(autouse=True)
def no_sleep(hub, monkeypatch):
    monkeypatch.setattr("trl_diffusion.hub.time", waiting(hub.waits))


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "trl_diffusion")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("trl_diffusion")]


def iapo(folder: Path, model=None, is_lora: bool = True, peft=None, **settings) -> InstanceDPOTrainer:
    model = model or tiny.sd_pipeline()
    settings = tiny.settings(model) | settings if isinstance(model, DiffusionPipeline) else settings
    args = InstanceDPOConfig(str(folder), **{**SETTINGS, **settings})
    return InstanceDPOTrainer(
        model, args=args, train_dataset=tiny.pairs(4), peft_config=(peft or tiny.lora()) if is_lora else None
    )


@pytest.fixture
def criteria(tmp_path) -> str:
    path = tmp_path / "criteria" / "secret.yaml"
    path.parent.mkdir()
    path.write_text(f"# kept in {tmp_path}\n{tiny.CRITERIA}")
    return str(path)


def expert(folder: Path, criteria: str, model=None, **settings) -> AttributeSFTTrainer:
    args = AttributeSFTConfig(str(folder), criteria=criteria, **{**SETTINGS, **settings})
    return AttributeSFTTrainer(
        model or tiny.sd_pipeline(), args=args, train_dataset=tiny.paintings(4), peft_config=tiny.lora()
    )


def leave_files(folder: Path) -> None:
    """What users and other programs leave where they train."""
    for name in (
        *(".env", "nohup.out", "notes.txt", "data.parquet", "training_args.bin", "other.safetensors", "wandb/run/log"),
        *(
            "precompute/cache.arrow",
            "images/me.png",
            "samples/old.png",
            "runs/notes.txt",
            "unet/.env",
            "unet/mine.json",
        ),
        *("unet/other.safetensors", "vae/notes.txt", "checkpoint-1/notes.txt", "checkpoint-1/training_args.bin"),
        *("checkpoint-9/pytorch_lora_weights.safetensors", "comfyui/mine.safetensors", "criteria.yaml"),
        *("attribute_expert.json", "runs/mine/events.out.tfevents.1.host", ".push-old/unet/config.json"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"left behind")


def images(pipeline: DiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    size |= tiny.settings(pipeline)
    size.pop("resolution", None)
    return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **size).images


def check_nothing_of_this_machine(files: dict[str, bytes], *secrets: str) -> None:
    for name, content in files.items():
        for secret in (HOST, "hf_user", "left behind", str(Path.cwd()), *secrets):
            assert secret.encode() not in content and secret not in name, (name, secret)


PIPELINE = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *("text_encoder/config.json", "text_encoder/model.safetensors"),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
}
LORA = {"pytorch_lora_weights.safetensors", "comfyui/out.safetensors"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "run_record.json"}


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "whole"])
def test_what_is_pushed_is_a_list(hub, tmp_path, monkeypatch, is_lora):
    """Weights, card, curves and the last checkpoint arrive, nothing that was left in the folder does, and no file tells the machine."""
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setenv("USER", "secret_user")
    monkeypatch.setenv("LOGNAME", "secret_user")
    monkeypatch.chdir(tmp_path)
    root = Path("secret_folder") if is_lora else tmp_path / "secret_folder"
    tiny.sd_pipeline().save_pretrained(root / "base")
    leave_files(root / "out")
    trainer = iapo(
        *(root / "out", str(root / "base"), is_lora),
        **SAVES,
        hub_strategy="checkpoint",
        report_to="tensorboard",
        sample_prompts=["a cat"],
        num_inference_steps=1,
        model_init_kwargs={"vae": str(root / "base" / "vae")} if is_lora else None,
    )
    trainer.train()
    (root / "out" / "images" / "more.png").write_bytes(b"more")
    (root / "out" / "evaluation.json").write_text("{}")
    card = (root / "out" / "README.md").read_text()
    card += "\n![](images/more.png) <img src='samples/step-000002.png'> images/none.png images/../.env.png"
    monkeypatch.setattr(trainer, "create_model_card", lambda **_: (root / "out" / "README.md").write_text(card))
    trainer.push_to_hub()
    files = hub.files("user/out")
    weights = LORA if is_lora else PIPELINE
    curves = {name for name in files if name.startswith("runs/")}
    trained = {name for name in weights if name.startswith(("pytorch_lora", "unet/"))}
    saved = {f"last-checkpoint/{name}" for name in trained | STATE}
    beside = {"README.md", "training.json", "training.yaml", "evaluation.json", ".gitattributes"}
    pictures = {"images/more.png", "samples/step-000002.png", "images/curves.png"}
    pictures |= {"images/sample-0.png", "images/sample-0-base.png", "images/teaser.webp"}
    assert files.keys() == weights | curves | saved | beside | pictures
    (curve,) = curves
    assert curve.rpartition(".tfevents.")[2].replace(".", "").isdigit() and len(curve.split("/")) == 3
    check_nothing_of_this_machine(files, str(tmp_path), "secret_user", "secret_folder")
    assert [path for path in (root / "out").iterdir() if path.name.startswith(".push")] == []
    assert not hub.unknown


def test_an_expert_comes_with_its_description_and_its_criteria(hub, tmp_path, criteria):
    """What a CPO training needs of an expert is pushed, the criteria without the comments of the file; another training reads it."""
    trainer = expert(tmp_path / "expert", criteria)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("user/expert")
    expected = {".gitattributes", "README.md", "training.json", "training.yaml", "images/curves.png"}
    expected |= {"pytorch_lora_weights.safetensors", "comfyui/expert.safetensors"}
    assert files.keys() == expected | {"attribute_expert.json", "criteria.yaml"}
    check_nothing_of_this_machine(files, str(tmp_path))
    fetched = hf_hub_download("user/expert", "criteria.yaml")
    assert Criteria.load(fetched) == trainer.criteria == Criteria.load(criteria)
    args = ComplexPOConfig(str(tmp_path / "cpo"), criteria=fetched, **SETTINGS)
    cpo = ComplexPOTrainer(
        tiny.sd_pipeline(), expert="user/expert", args=args, train_dataset=tiny.paintings(4), peft_config=tiny.lora()
    )
    ours, theirs = (
        get_peft_model_state_dict(trainer.policy),
        get_peft_model_state_dict(cpo.policy, adapter_name="expert"),
    )
    assert tiny.max_difference(dict(ours), dict(theirs)) == 0
    cpo.train()
    cpo.push_to_hub(model_name="Painter", tags="paintings")
    files = hub.files("user/cpo")
    assert "criteria.yaml" in files and "attribute_expert.json" not in files
    loaded = tiny.sd_pipeline()
    loaded.load_lora_weights("user/cpo")
    assert np.array_equal(images(loaded), images(cpo.pipeline()))


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_a_lora_loads_in_plain_diffusers(hub, tmp_path, family):
    """`load_lora_weights("user/name")` picks the LoRA, not the file for ComfyUI nor a checkpoint's, and draws the trainer's images."""
    trainer = iapo(tmp_path / "out", tiny.PIPELINES[family](), **SAVES, hub_strategy="all_checkpoints")
    trainer.train()
    trainer.push_to_hub()
    names = [name for name in hub.files("user/out") if name.endswith(".safetensors")]
    assert len(names) == 4
    plain = tiny.PIPELINES[family]()
    before = images(plain)
    plain.load_lora_weights("user/out")
    drawn = images(plain)
    assert np.array_equal(drawn, images(trainer.pipeline())) and not np.array_equal(drawn, before)


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_all_weights_load_in_plain_diffusers(hub, tmp_path, family):
    """`DiffusionPipeline.from_pretrained("user/name")` draws the trainer's images."""
    trainer = iapo(tmp_path / "out", tiny.PIPELINES[family](), is_lora=False)
    trainer.train()
    trainer.push_to_hub()
    loaded = DiffusionPipeline.from_pretrained("user/out")
    assert np.array_equal(images(loaded), images(trainer.pipeline()))
    assert not np.array_equal(images(loaded), images(tiny.PIPELINES[family]()))


@pytest.mark.parametrize("is_lora", [True, False], ids=["lora", "whole"])
def test_a_run_resumes_from_the_checkpoint_on_the_hub(hub, tmp_path, is_lora):
    """A run of 4 steps that was stopped after 2 goes on from `last-checkpoint` to the weights of the run that was not stopped."""
    settings = {"lr_scheduler_type": "constant"}
    straight = iapo(tmp_path / "straight", is_lora=is_lora, **settings, max_steps=4)
    straight.train()
    iapo(tmp_path / "out", is_lora=is_lora, **settings, **SAVES, hub_strategy="checkpoint").train()
    assert json.loads(hub.files("user/out")["last-checkpoint/trainer_state.json"])["global_step"] == 2
    fetched = Path(snapshot_download("user/out", allow_patterns="last-checkpoint/*")) / "last-checkpoint"
    resumed = iapo(tmp_path / "resumed", is_lora=is_lora, **settings, max_steps=4)
    resumed.train(resume_from_checkpoint=str(fetched))
    assert tiny.max_difference(tiny.weights(straight.policy), tiny.weights(resumed.policy)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_list_has_all_files_of_a_pipeline(tmp_path, family):
    """Of every family, whatever diffusers and transformers save is pushed."""
    FAMILIES[family].make().save_pretrained(tmp_path)
    saved = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert model_files(tmp_path, is_lora=False).keys() == saved


def test_the_list_has_shards_and_older_tokenizers(tmp_path):
    """Files that large or older models consist of are pushed; those of components that a pipeline is without are not."""
    names = [
        *("transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "transformer/config.json"),
        *(
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            "text_encoder/model-00001-of-00002.safetensors",
        ),
        *("text_encoder/model.safetensors.index.json", "tokenizer/spiece.model", "tokenizer/special_tokens_map.json"),
        *(
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
            "tokenizer/chat_template.jinja",
            "tokenizer/added_tokens.json",
        ),
        *("feature_extractor/preprocessor_config.json", "text_encoder/generation_config.json"),
    ]
    for name in (
        *names,
        "image_encoder/config.json",
        "tokenizer/log.txt",
        "transformer/a.bin",
        "transformer/b.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    components = {name.split("/")[0]: ["library", "Class"] for name in names}
    index = {"_class_name": "Pipeline", "force_zeros": True, **components, "image_encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert model_files(tmp_path, is_lora=False).keys() == {*names, "model_index.json"}
