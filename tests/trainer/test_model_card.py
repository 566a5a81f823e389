# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card of each family: its code runs as printed on what was saved, and its settings are those of the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard

from tests import tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer


FAMILIES = {
    "sd": tiny.sd_pipeline,
    "sdxl": tiny.sdxl_pipeline,
    "sd3": tiny.sd3_pipeline,
    "sd3 without T5": lambda: tiny.sd3_pipeline(has_t5=False),
    "flux": tiny.flux_pipeline,
    "schnell": lambda: tiny.flux_pipeline(guidance_embeds=False),
}


def make_trainer(tmp_path: Path, family: str, is_lora: bool, **settings) -> InstanceDPOTrainer:
    if family in ("sd3", "flux", "schnell"):
        settings = {"max_sequence_length": 16} | settings
    args = InstanceDPOConfig(str(tmp_path / "out"), resolution=32, num_inference_steps=2, **tiny.FAST | settings)
    pipeline = FAMILIES[family]()
    pipeline.register_to_config(_name_or_path="user/base")
    return InstanceDPOTrainer(
        pipeline, args=args, train_dataset=tiny.pairs(4), peft_config=tiny.lora() if is_lora else None
    )


def code_of(card: ModelCard) -> str:
    return card.text.split("```python")[1].split("```")[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "reversed lora", "full"])
def test_the_code_of_a_card_samples_what_the_trainer_samples(tmp_path, family, kind):
    """As printed but for the device, the precision, the number of steps and the noise: the same image as `trainer.sample`."""
    trainer = make_trainer(tmp_path, family, kind != "full", reverse_preference=kind == "reversed lora")
    FAMILIES[family]().save_pretrained(tmp_path / "base")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    code = code_of(ModelCard.load(tmp_path / "out" / "README.md"))
    flow = family not in ("sd", "sdxl")
    for printed, here in (
        ('"user/base"', repr(str(tmp_path / "base"))),
        ('"out"', repr(str(tmp_path / "out"))),
        (f"torch.{'bfloat16' if flow else 'float16'}", "torch.float32"),
        ('.to("cuda")', ""),
        ("width=32", "width=32, num_inference_steps=2, generator=torch.Generator().manual_seed(0)"),
    ):
        assert printed in code or printed == ('"user/base"' if kind == "full" else "")
        code = code.replace(printed, here)
    scope = {"torch": torch}
    exec(code, scope)
    image = np.asarray(scope["image"]).astype(int)
    assert image.shape == (32, 32, 3)
    if kind == "reversed lora":
        return  # guided by it, and not sampled from it
    pipeline = trainer.backbone.pipeline
    with trainer.backbone.sampling_with(trainer.accelerator.unwrap_model(trainer.model)):
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, **trainer.backbone.sampling_settings}
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        expected = pipeline(trainer._example_prompt, generator=generator, **settings).images[0]
    assert abs(image - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_settings_of_flow_models(tmp_path, family):
    """They are on the card where they were set, with one sentence on beta; a card of Stable Diffusion has none of it."""
    settings = {"timestep_density": "logit_normal", "logit_mean": 0.5}
    settings |= {"embedded_guidance": 2.0} if family == "flux" else {}
    text = {}
    for name, trainer in (
        ("set", make_trainer(tmp_path, family, True, **settings)),
        ("left out", make_trainer(tmp_path, family, True, max_sequence_length=None)),
        ("sd", make_trainer(tmp_path, "sd", True)),
    ):
        trainer.create_model_card()
        text[name] = ModelCard.load(tmp_path / "out" / "README.md").text
    rows = ["timestep_density | logit_normal", "logit_mean | 0.5", "logit_std | 1.0", "max_sequence_length | 16"]
    for row in [*rows, *(["embedded_guidance | 2.0"] if family == "flux" else [])]:
        assert f"| {row} |" in text["set"]
    assert "mode_scale" not in text["set"]
    for name in ("left out", "sd"):
        assert not any(row.split(" |")[0] in text[name] for row in [*rows, "embedded_guidance"])
    assert ["errors of the velocity" in text[name] for name in text] == [True, True, False]


def fuse(pipeline):
    pipeline.load_lora_weights(lora_layers())
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def lora_layers() -> dict[str, torch.Tensor]:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    return {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}


def invert(pipeline):
    pipeline.load_textual_inversion({"<style>": torch.ones(16)})


def swap(pipeline):
    pipeline.unet = tiny.sd_pipeline(seed=1).unet


@pytest.mark.parametrize("is_lora", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda pipeline: None, ""),
        (fuse, "a LoRA fused into it"),
        (swap, "another unet"),
        (invert, "textual inversions loaded into it"),
        (
            lambda pipeline: (fuse(pipeline), invert(pipeline)),
            "a LoRA fused into it and textual inversions loaded into it",
        ),
    ],
    ids=["as it is", "fused", "swapped", "inversion", "two changes"],
)
def test_a_base_that_was_changed(tmp_path, change, named, is_lora):
    """It is named so, and a LoRA on it has no `base_model` in its metadata, by which the plain base would be loaded for it."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    pipeline.register_to_config(_name_or_path="user/base")
    change(pipeline)
    args = InstanceDPOConfig(str(tmp_path / "out"), **tiny.FAST)
    lora = tiny.lora() if is_lora else None
    trainer = InstanceDPOTrainer(pipeline, args=args, train_dataset=tiny.pairs(4), peft_config=lora)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    relation = (None, None) if named and is_lora else ("user/base", "adapter" if is_lora else "finetune")
    assert (card.data.to_dict().get("base_model"), card.data.to_dict().get("base_model_relation")) == relation
    head = "on [user/base](https://huggingface.co/user/base)" + (f" with {named}." if named else ".")
    assert head in card.text
    assert (f"# The base was trained with {named}:" in card.text) == (is_lora and named != "")
    assert str(tmp_path) not in card.text


def test_the_lora_that_a_training_started_at(tmp_path):
    """A Hub id is named, a folder of this machine is not; how to use it elsewhere is said of a LoRA alone."""
    make_trainer(tmp_path, "sd", is_lora=True).save_model(str(tmp_path / "lora"))
    trainer = make_trainer(tmp_path, "sd", is_lora=False, initial_lora=str(tmp_path / "lora"))
    trainer.create_model_card()
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "The training started at another LoRA, which is not published." in text and str(tmp_path) not in text
    assert "trl-diffusion export-lora out --output" in text
    trainer.args.initial_lora = "user/lora"
    trainer.create_model_card()
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "The training started at [user/lora](https://huggingface.co/user/lora)." in text
    full = make_trainer(tmp_path / "full", "sd", is_lora=False)
    full.create_model_card()
    text = ModelCard.load(tmp_path / "full" / "out" / "README.md").text
    assert "started at" not in text and "export-lora" not in text
