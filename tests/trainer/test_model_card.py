# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card of each family: its code runs as printed on what was saved, and its settings are those of the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
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
