# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""A pipeline in half precision is trained in the precision of the run, whatever of it is half and however it is given."""

import logging

import pytest
import torch
from diffusers import DiffusionPipeline

from tests import tiny
from trl_diffusion import AttributeSFTConfig, AttributeSFTTrainer, InstanceDPOConfig, InstanceDPOTrainer


HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A folder with a pipeline of each family."""
    folders = {family: str(tmp_path_factory.mktemp(family)) for family in ("sd", "sdxl", "sd3", "flux")}
    for family, folder in folders.items():
        tiny.PIPELINES[family]().save_pretrained(folder)
    return folders


def trained(tmp_path, model, family="sd", is_lora=True, ref_model=None, **settings) -> InstanceDPOTrainer:
    """Trains, evaluates and draws."""
    settings = (
        {"max_steps": 1, "use_cpu": True, "num_inference_steps": 1}
        | tiny.settings(tiny.PIPELINES[family]())
        | settings
    )
    args = InstanceDPOConfig(str(tmp_path / "out"), **tiny.FAST | settings)
    data = tiny.pairs(2)
    trainer = InstanceDPOTrainer(
        model,
        ref_model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        peft_config=tiny.lora() if is_lora else None,
    )
    trainer.train()
    assert torch.isfinite(torch.tensor([*tiny.losses(trainer), trainer.evaluate()["eval_loss"]])).all()
    assert len(trainer.sample(["a cat"])) == 1
    return trainer


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("is_lora", [True, False])
def test_half_precision_without_mixed_precision(tmp_path, models, caplog, family, half, is_lora):
    """
    Given as an object or by name, the run is that of the same weights in float32, and says what was cast and what to set.
    """

    def rounded() -> DiffusionPipeline:
        return DiffusionPipeline.from_pretrained(models[family], dtype=HALF[half])

    def errors(trainer: InstanceDPOTrainer) -> list[float]:  # the first loss is ln 2, whatever the model
        return [entry[name] for entry in trainer.state.log_history for name in entry if "errors/" in name]

    found = {}
    for given in ("object", "name"):
        settings = {"model_init_kwargs": {"dtype": half}} if given == "name" else {}
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = trained(tmp_path, models[family] if given == "name" else rounded(), family, is_lora, **settings)
        names = ", ".join(f"`{name}`" for name in trainer.backbone.encoder_names)
        said = (
            f"This run computes in float32. Cast to it from another precision: {names}. Set `bf16=True` or `fp16=True`"
        )
        assert caplog.text.count(said) == 1
        found[given] = errors(trainer)
    pipeline = rounded()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(torch.float32)
    caplog.clear()
    assert errors(trained(tmp_path, pipeline, family, is_lora)) == found["object"] == found["name"] != []
    assert "This run computes" not in caplog.text


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_other_families(tmp_path, models, family):
    trained(tmp_path, DiffusionPipeline.from_pretrained(models[family], dtype=torch.float16), family)


@pytest.mark.parametrize(
    "dtypes",
    [
        {"text_encoder": torch.float16},
        {"vae": torch.float16},
        {"unet": torch.bfloat16},
        {"unet": torch.float16, "vae": torch.bfloat16},
        {"unet": torch.float64, "text_encoder": torch.float64, "vae": torch.float64},
    ],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_components_of_several_precisions(tmp_path, dtypes, bf16):
    """Each combination trains, evaluates and draws, with mixed precision and without."""
    pipeline = tiny.sd_pipeline()
    for name, dtype in dtypes.items():
        getattr(pipeline, name).to(dtype)
    trained(tmp_path, pipeline, bf16=bf16)
    assert pipeline.vae.dtype == (dtypes.get("vae", torch.float32) if bf16 else torch.float32)


def test_the_other_half_precision(tmp_path, models):
    """A pipeline in float16 trains in a run in bfloat16; a VAE that is marked to overflow under autocast may, too."""
    for force_upcast in (True, False):
        pipeline = DiffusionPipeline.from_pretrained(models["sd"], dtype=torch.float16)
        pipeline.vae.register_to_config(force_upcast=force_upcast)
        trainer = trained(tmp_path, pipeline, bf16=True)
        assert pipeline.text_encoder.dtype == torch.bfloat16
        assert pipeline.vae.dtype == (torch.float16 if force_upcast else torch.bfloat16)
    trained(tmp_path, models["flux"], "flux", bf16=True, model_init_kwargs={"dtype": "float16"})
    assert trainer.policy.dtype == torch.bfloat16


def test_encoders_that_are_loaded_again(tmp_path, models):
    """What `precompute` frees comes back in the precision of the run, and the losses are those without."""
    losses = []
    for precompute in (True, False):
        settings = {
            "model_init_kwargs": {"dtype": "float16"},
            "precompute": precompute,
            "precompute_dir": str(tmp_path),
        }
        trainer = trained(tmp_path, models["sd"], max_steps=2, **settings)
        with trainer.backbone.encoders_on_device():
            assert trainer.backbone.pipeline.text_encoder.dtype == trainer.backbone.pipeline.vae.dtype == torch.float32
        losses.append(torch.tensor(tiny.losses(trainer)))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_references_and_experts(tmp_path, models):
    """A reference in half precision is cast as well; attribute SFT trains a pipeline in half precision."""
    tiny.other_unet().save_pretrained(tmp_path / "other")
    other = DiffusionPipeline.from_pretrained(tmp_path / "other", dtype=torch.float16)
    trained(tmp_path, models["sd"], ref_model=other)
    trained(tmp_path, models["sd"], ref_model=str(tmp_path / "other"), model_init_kwargs={"dtype": "fp16"})
    (tmp_path / "tree.yaml").write_text(tiny.CRITERIA)
    args = AttributeSFTConfig(str(tmp_path / "out"), criteria=str(tmp_path / "tree.yaml"), use_cpu=True, **tiny.FAST)
    pipeline = DiffusionPipeline.from_pretrained(models["sd"], dtype=torch.float16)
    AttributeSFTTrainer(pipeline, args=args, train_dataset=tiny.paintings(4), peft_config=tiny.lora()).train()


@pytest.mark.parametrize("spelling", ["float16", "fp16", "half", "torch.float16", "Float16", torch.float16])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_spellings(tmp_path, models, spelling, key):
    """Types and their names, by both names of the argument."""
    args = InstanceDPOConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=True, model_init_kwargs={key: spelling}, **tiny.FAST
    )
    trainer = InstanceDPOTrainer(models["sd"], args=args, train_dataset=tiny.pairs(2))
    assert trainer.backbone.pipeline.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "auto"}, "is 'auto'. Pass 'float32' .'fp32' or 'float'., 'bfloat16' .'bf16'. or 'float16'"),
        ({"dtype": "int8"}, "is 'int8'. Pass 'float32'"),
        ({"torch_dtype": torch.float64}, "is torch.float64. Pass 'float32'"),
        ({"dtype": {"vae": "float8"}}, "for vae is 'float8'. Pass 'float32'"),
        ({"dtype": "fp16", "torch_dtype": "fp32"}, "`dtype` and `torch_dtype` .* differ"),
        ({"dtype": {"default": "fp16", "vea": "fp32"}}, "`dtype` names vea, .* it has .*unet, vae"),
    ],
)
def test_mistakes(tmp_path, models, given, message):
    """Types that nothing can be trained in, and names of components that do not exist."""
    args = InstanceDPOConfig(str(tmp_path / "out"), use_cpu=True, model_init_kwargs=given, **tiny.FAST)
    with pytest.raises(ValueError, match=message):
        InstanceDPOTrainer(models["sd"], args=args, train_dataset=tiny.pairs(2))
