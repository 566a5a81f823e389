# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What of a model that is given by its name is in memory when, and in which precision."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig

from tests import tiny
from tests.tiny import FAST, PIPELINES, lora, max_difference, weights
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)
from trl_diffusion.backbones import load_backbone
from trl_diffusion.backbones.source import FreedComponent
from trl_diffusion.trainer.encoding import BatchEncoder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A folder with a pipeline of each family."""
    folders = {family: str(tmp_path_factory.mktemp(family)) for family in ("sd", "sdxl")}
    for family, folder in folders.items():
        PIPELINES[family]().save_pretrained(folder)
    return folders


def dpo(folder: Path, model, **kwargs) -> InstanceDPOTrainer:
    given = {name: kwargs.pop(name) for name in ("eval_dataset", "peft_config", "ref_model") if name in kwargs}
    settings = {"precompute": True, "precompute_dir": str(folder / "cache"), "beta": 50.0}
    return InstanceDPOTrainer(
        model,
        args=InstanceDPOConfig(**{"output_dir": str(folder / "out"), **FAST, **settings, **kwargs}),
        train_dataset=tiny.pairs(6),
        **given,
    )


def is_freed(trainer, *names: str) -> bool:
    return all(isinstance(vars(trainer.backbone.pipeline)[name], FreedComponent) for name in names)


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, ...]]:
    """Each load, with what it loads, and each encoding, with what has weights in memory meanwhile."""
    noted = []
    load, encode_images, encode_prompts = (
        DiffusionPipeline.from_pretrained,
        BatchEncoder.encode_images,
        BatchEncoder.encode_prompts,
    )

    def with_weights(pipeline) -> tuple[str, ...]:
        modules = {name: part for name, part in vars(pipeline).items() if isinstance(part, torch.nn.Module)}
        return tuple(sorted(name for name, module in modules.items() if not next(module.parameters()).is_meta))

    def noted_load(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        given = [name for name, value in kwargs.items() if isinstance(value, torch.nn.Module)]
        noted.append(("load", *(name for name in with_weights(pipeline) if name not in given)))
        return pipeline

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", noted_load)
    for name, function in (("encode_images", encode_images), ("encode_prompts", encode_prompts)):

        def noted_encoding(self, inputs, name=name, function=function):
            noted.append((name, *with_weights(self.backbone.pipeline)))
            return function(self, inputs)

        monkeypatch.setattr(BatchEncoder, name, noted_encoding)
    return noted


# ---- The order ----


@pytest.mark.parametrize(
    ("family", "encoders"), [("sd", ("text_encoder",)), ("sdxl", ("text_encoder", "text_encoder_2"))]
)
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_encoders_work_before_the_denoiser_is_loaded_and_are_gone_after(
    tmp_path, models, events, family, encoders, peft_config
):
    """The denoiser has no weights while images and prompts are encoded, and no encoder is in memory from then on."""
    trainer = dpo(tmp_path, models[family], peft_config=peft_config)
    encoders = (*encoders, "vae")
    first, *encodings, last = events
    assert (first, last) == (("load", *encoders), ("load", "unet"))
    assert {encoding[0] for encoding in encodings} == {"encode_images", "encode_prompts"}
    assert all(encoding[1:] == encoders for encoding in encodings)
    assert is_freed(trainer, *encoders)
    events.clear()
    trainer.train()
    assert {event[0] for event in events} == {"encode_prompts"}  # which looks them up
    assert all(event[1:] == ("unet",) for event in events) and is_freed(trainer, *encoders)


def test_freed_encoders_are_nowhere_in_memory(tmp_path, models, monkeypatch):
    """Nothing refers to them any more: after precomputing, after samples, and after they were saved."""
    alive, load = [], DiffusionPipeline.from_pretrained

    def noted(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        alive.extend(weakref.ref(part) for part in (pipeline.vae, pipeline.text_encoder) if part is not None)
        return pipeline

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", noted)
    trainer = dpo(tmp_path, models["sd"], num_inference_steps=1)
    assert [part() for part in alive] == [None] * 2
    trainer.sample(["a cat"])
    trainer.save_model()
    gc.collect()
    assert [part() for part in alive] == [None] * 6


def test_without_precompute_everything_is_loaded_at_once(tmp_path, models, events):
    """One load, and the encoders stay."""
    trainer = dpo(tmp_path, models["sd"], precompute=False)
    trainer.train()
    assert [event for event in events if event[0] == "load"] == [("load", "text_encoder", "unet", "vae")]
    assert not trainer.backbone.offloaded


def test_no_weights_of_a_denoiser_are_read_for_its_configuration(models, monkeypatch):
    """The pipeline is what it is with weights, but for these; a denoiser that is asked before it is loaded fails."""
    monkeypatch.setattr(ModelMixin, "from_pretrained", None)  # the VAE's too, which is given
    vae = tiny.vae().eval()
    backbone = load_backbone(models["sd"], without_denoiser=True, vae=vae)
    monkeypatch.undo()
    whole = load_backbone(models["sd"])
    assert all(parameter.is_meta for parameter in backbone.denoiser.parameters())
    for name in ("default_resolution", "size_multiple", "vae_scale_factor", "prompt_limits"):
        assert getattr(backbone, name) == getattr(whole, name)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        backbone.predict(
            backbone.denoiser, torch.zeros(1, 4, 8, 8), torch.tensor([1]), {"prompt_embeds": torch.zeros(1, 12, 16)}
        )
    assert max_difference(weights(backbone.load_denoiser()), weights(whole.denoiser)) == 0
    assert backbone.load_denoiser() is backbone.denoiser  # once
    assert backbone.pipeline.config.keys() == whole.pipeline.config.keys()


def test_a_mistake_in_the_lora_is_told_before_anything_is_encoded(tmp_path, models, events):
    """The denoiser's configuration is enough to know its layers and its precision."""
    for lora_settings, message in (({"target_modules": ["to_z"]}, "to_z"), ({"use_dora": True}, "half precision")):
        with pytest.raises(ValueError, match=message):
            dpo(tmp_path, models["sd"], peft_config=LoraConfig(**lora_settings), bf16=True, use_cpu=True)
    assert events == [("load", "text_encoder", "vae")] * 2


def test_a_loaded_pipeline_without_weights_is_refused():
    """Only a denoiser that is still to be loaded may have none."""
    pipeline = tiny.sd_pipeline()
    pipeline.unet.to("meta")
    with pytest.raises(ValueError, match="`unet` is offloaded.*meta device"):
        load_backbone(pipeline)


# ---- The same training ----


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_the_training_is_that_of_a_loaded_pipeline(tmp_path, models, family, peft_config):
    """Bit for bit in float32: losses, weights, and the precomputed files, which both find."""
    settings = {"peft_config": peft_config, "prompt_dropout": 0.5, "noise_source": "inversion", "inversion_steps": 2}
    loaded = DiffusionPipeline.from_pretrained(models[family], dtype=torch.float32)
    runs, files = [], []
    for model in (models[family], loaded):
        runs.append(dpo(tmp_path, model, **settings))
        files.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()})
    assert files[0] == files[1] and len(files[0]) == 3
    for trainer in runs:
        trainer.train()
    one, other = ([entry for entry in trainer.state.log_history if "loss" in entry] for trainer in runs)
    assert [entry["loss"] for entry in one] == [entry["loss"] for entry in other] and len(one) == 3
    assert max_difference(weights(runs[0].model), weights(runs[1].model)) == 0
    assert not is_freed(runs[1], "vae")  # what the user gave is the user's


def test_a_second_run_encodes_nothing(tmp_path, models, events):
    """The files of the first run are found by the weights that they were made with."""
    dpo(tmp_path, models["sd"])
    events.clear()
    dpo(tmp_path, models["sd"])
    assert events == [("load", "text_encoder", "vae"), ("load", "unet")]


def test_a_run_resumes(tmp_path, models):
    """An interrupted run that is loaded in phases ends on the weights of an uninterrupted one."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_total_limit": 2}
    whole = dpo(tmp_path, models["sd"], **settings)
    whole.train()
    resumed = dpo(tmp_path, models["sd"], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert max_difference(weights(whole.model), weights(resumed.model)) == 0


def test_both_stages_of_cpo(tmp_path, models):
    """Expert and policy train the same as on loaded pipelines; with dropped attributes the text encoder stays."""
    criteria = tmp_path / "tiny.yaml"
    criteria.write_text(tiny.CRITERIA)
    settings = {**FAST, "precompute": True, "precompute_dir": str(tmp_path / "cache"), "criteria": str(criteria)}

    def load(kind: str) -> str | DiffusionPipeline:
        return models["sd"] if kind == "name" else DiffusionPipeline.from_pretrained(models["sd"])

    found = []
    for kind in ("name", "pipeline"):
        expert = AttributeSFTTrainer(
            load(kind),
            args=AttributeSFTConfig(str(tmp_path / f"expert_{kind}"), attribute_dropout=0.5, **settings),
            train_dataset=tiny.paintings(6),
            peft_config=lora(),
        )
        assert kind == "pipeline" or is_freed(expert, "vae") and not is_freed(expert, "text_encoder")
        expert.train()
        policy = ComplexPOTrainer(
            load(kind),
            expert,
            args=ComplexPOConfig(str(tmp_path / f"policy_{kind}"), precompute_ref_preds=True, **settings),
            train_dataset=tiny.paintings(6),
            peft_config=lora(),
        )
        assert kind == "pipeline" or is_freed(policy, "vae", "text_encoder")
        policy.train()
        found.append((tiny.losses(expert), tiny.losses(policy)))
    assert found[0] == found[1] and len(found[0][1]) == 3


# ---- Encoders that come back ----


def test_what_was_freed_is_not_used_by_mistake(tmp_path, models):
    """Each way to ask a freed encoder raises an error that says how to get it back."""
    trainer = dpo(tmp_path, models["sd"])
    backbone = trainer.backbone
    for use in (
        lambda: backbone.encode_prompts(["a cat"]),
        lambda: backbone.encode_images(torch.zeros(1, 3, 32, 32)),
        lambda: backbone.pipeline("a cat", num_inference_steps=1),
        lambda: backbone.pipeline.text_encoder(torch.tensor([[0]])),
        lambda: backbone.pipeline.vae.config,
    ):
        with pytest.raises(RuntimeError, match="freed after precomputing.*encoders_on_device"):
            use()
    with backbone.encoders_on_device(), backbone.encoders_on_device():  # the inner one changes nothing
        own = backbone.pipeline.text_encoder
        assert backbone.encode_prompts(["a cat"])["prompt_embeds"].shape == (1, 12, 16)
        assert not own.training and not any(parameter.requires_grad for parameter in own.parameters())
    assert is_freed(trainer, "vae", "text_encoder")
    with pytest.raises(KeyError):
        with backbone.encoders_on_device():
            raise KeyError("stop")
    assert is_freed(trainer, "vae", "text_encoder")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_samples_are_those_of_a_loaded_pipeline(tmp_path, models, family):
    """In training, and asked for; policy and reference."""
    settings = {"sample_prompts": ["a cat"], "sample_steps": 2, "num_inference_steps": 2, "peft_config": lora()}
    pictures = []
    for model in (models[family], PIPELINES[family]()):
        trainer = dpo(tmp_path, model, **settings)
        trainer.train()
        saved = sorted((tmp_path / "out" / "samples").rglob("*.png"))
        assert len(saved) > 1
        asked = [image.tobytes() for both in (False, True) for image in trainer.sample(["a dog"], with_reference=both)]
        pictures.append(([path.read_bytes() for path in saved], asked))
        shutil.rmtree(tmp_path / "out")
    assert pictures[0] == pictures[1]


def test_rows_that_were_not_precomputed_are_evaluated(tmp_path, models, events):
    """With the metrics of a loaded pipeline. The encoders are loaded once for all batches, and freed after."""
    other = tiny.pairs(5).map(lambda row: {"prompt": f"{row['prompt']} and a dog"})
    expected = dpo(tmp_path, tiny.sd_pipeline(), per_device_eval_batch_size=2).evaluate(other)
    trainer = dpo(tmp_path, models["sd"], per_device_eval_batch_size=2)
    events.clear()
    found = trainer.evaluate(other)
    assert [event for event in events if event[0] == "load"] == [("load", "text_encoder", "vae")]
    assert is_freed(trainer, "vae", "text_encoder")
    for name in ("eval_loss", "eval_errors/chosen", "eval_rewards/margins"):
        assert found[name] == expected[name]


def test_a_reference_is_compared_with_what_was_freed(tmp_path, models):
    """One with another text encoder is refused, one that differs in its denoiser alone is not."""
    other, wrong = tiny.other_unet(), tiny.sd_pipeline(seed=2)
    for name, pipeline in (("other", other), ("wrong", wrong)):
        pipeline.save_pretrained(tmp_path / name)
    trainer = dpo(tmp_path, models["sd"], ref_model=str(tmp_path / "other"))
    assert is_freed(trainer, "vae", "text_encoder")
    assert max_difference(weights(trainer.reference.denoiser), weights(other.unet)) == 0
    with pytest.raises(ValueError, match="`ref_model` does not fit the policy: its `text_encoder` has other weights"):
        dpo(tmp_path, models["sd"], ref_model=str(tmp_path / "wrong"))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("precompute", [False, True])
def test_a_trained_denoiser_is_saved_with_a_whole_pipeline(tmp_path, models, precompute, half):
    """What was frozen is saved as it was loaded, without the rounding of mixed precision."""
    trainer = dpo(tmp_path, models["sdxl"], precompute=precompute, bf16=half, use_cpu=half)
    trainer.train()
    trainer.save_model()
    assert not precompute or is_freed(trainer, "vae", "text_encoder", "text_encoder_2")
    index, published = (
        json.loads((Path(folder) / "model_index.json").read_text()) for folder in (tmp_path / "out", models["sdxl"])
    )
    assert index.items() >= {name: value for name, value in published.items() if name[0] != "_"}.items()
    saved = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=None)
    before = DiffusionPipeline.from_pretrained(models["sdxl"])
    for name in ("vae", "text_encoder", "text_encoder_2"):
        one, other = weights(getattr(saved, name)), weights(getattr(before, name))
        assert max_difference(one, other) == 0 and {value.dtype for value in one.values()} == {torch.float32}
    assert max_difference(weights(saved.unet), weights(trainer.model)) == 0
    assert max_difference(weights(saved.unet), weights(before.unet)) > 0
    trainer.create_model_card()  # needs no encoder


# ---- Precision ----


def dtypes(backbone, *names: str) -> list[torch.dtype]:
    return [getattr(backbone.pipeline, name).dtype for name in names]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_what_is_frozen_is_in_the_type_of_mixed_precision(tmp_path, models, family):
    """Text encoders always, the denoiser under a LoRA, whose weights are float32; the VAE never."""
    half, full = torch.bfloat16, torch.float32
    settings = {"precompute": False, "bf16": True, "use_cpu": True}
    names = ("text_encoder", "vae", "unet")
    trainer = dpo(tmp_path, models[family], peft_config=lora(), **settings)
    assert dtypes(trainer.backbone, *names) == [half, full, half]
    adapter = {parameter.dtype for name, parameter in trainer.model.named_parameters() if "lora_" in name}
    base = {parameter.dtype for name, parameter in trainer.model.named_parameters() if "lora_" not in name}
    assert (adapter, base) == ({full}, {half})
    trainer.train()
    assert all(torch.isfinite(torch.tensor(tiny.losses(trainer))))
    assert dtypes(dpo(tmp_path, models[family], **settings).backbone, *names) == [half, full, full]
    assert dtypes(dpo(tmp_path, models[family], peft_config=lora(), precompute=False).backbone, *names) == [full] * 3
    given = dpo(tmp_path, PIPELINES[family](), peft_config=lora(), **settings)
    assert dtypes(given.backbone, *names) == [full, full, half]


def test_a_denoiser_is_loaded_in_half_precision(tmp_path, models, monkeypatch):
    """It is never in memory in float32 where it stays frozen, as policy and as reference."""
    loaded, load = [], DiffusionPipeline.from_pretrained

    def noted(*args, **kwargs):
        pipeline = load(*args, **kwargs)
        loaded.extend(getattr(pipeline, name).dtype for name in ("unet",) if getattr(pipeline, name) is not None)
        return pipeline

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", noted)
    tiny.other_unet().save_pretrained(tmp_path / "other")
    settings = {"ref_model": str(tmp_path / "other"), "bf16": True, "use_cpu": True, "precompute": False}
    dpo(tmp_path, models["sd"], peft_config=lora(), **settings)
    assert loaded == [torch.bfloat16] * 2
    dpo(tmp_path, models["sd"], **settings)
    assert loaded[2:] == [torch.float32] * 2


def test_in_bf16_phases_change_nothing(tmp_path, models):
    """Bit for bit the training of a pipeline that is loaded in the same precision; the samples too."""
    settings = {"bf16": True, "use_cpu": True, "peft_config": lora(), "num_inference_steps": 2}
    settings["sample_prompts"] = ["a cat"]
    dtype = {"default": torch.bfloat16, "vae": torch.float32}
    found = []
    for model in (models["sd"], DiffusionPipeline.from_pretrained(models["sd"], dtype=dtype)):
        trainer = dpo(tmp_path, model, **settings)
        trainer.train()
        found.append((tiny.losses(trainer), [image.tobytes() for image in trainer.sample(["a dog", "a cat"])]))
    assert found[0] == found[1] and len(found[0][0]) == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"dtype": "bfloat16"}, [torch.bfloat16] * 2),
        ({"torch_dtype": torch.float16}, [torch.bfloat16, torch.float16]),
        ({"dtype": "fp16"}, [torch.bfloat16, torch.float16]),
        ({"torch_dtype": "torch.bfloat16"}, [torch.bfloat16] * 2),
        ({"dtype": {"default": "float32", "vae": "float16"}}, [torch.float32, torch.float16]),
    ],
)
def test_a_precision_that_the_user_gives_goes_first(tmp_path, models, given, expected):
    """
    As a type or by its name, for all components or by component. Text encoders run under autocast, which does not mix the two half
    precisions; a VAE with `force_upcast` runs without.
    """
    settings = {"precompute": False, "bf16": True, "use_cpu": True, "model_init_kwargs": given}
    trainer = dpo(tmp_path, models["sd"], **settings)
    assert dtypes(trainer.backbone, "text_encoder", "vae") == expected
    assert trainer.model.dtype == torch.float32


@pytest.mark.parametrize("wrong", ["half precision", "auto", 16, "Tensor"])
def test_a_precision_that_does_not_exist_is_refused(models, wrong):
    """diffusers would load float32 with a warning."""
    with pytest.raises(ValueError, match=f"`dtype` in `model_init_kwargs` is {wrong!r}. Pass 'float32'"):
        load_backbone(models["sd"], dtype=wrong)
