# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""LoRAs on bases of 4 and 8 bits, by bitsandbytes' own kernels for the CPU; what they cost on a GPU is measured by `tests.gpu`."""

import dataclasses
import json
import logging
import math
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
import trl
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from tests import quantized, tiny
from tests.quantized import EIGHT, FOUR, KINDS, NESTED
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)
from trl_diffusion.backbones import load_backbone
from trl_diffusion.backbones import quantization as module_under_test
from trl_diffusion.backbones.quantization import dequantized, describe_quantization, quantized_layers
from trl_diffusion.backbones.source import FreedComponent
from trl_diffusion.scripts.utils import get_model
from trl_diffusion.trainer.adapters import AdapterMixer, with_adapter
from trl_diffusion.trainer.fingerprints import (
    base_fingerprint,
    module_fingerprint,
    same_base,
    same_quantized_base,
)
from trl_diffusion.trainer.lora import base_checksums
from trl_diffusion.trainer.model_config import ModelConfig
from trl_diffusion.trainer.run_record import compare_runs


HOW = {"4": "4 bits (nf4)", "4-nested": "4 bits (fp4, nested)", "8": "8 bits"}


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with quantized.quantizing_on_the_cpu():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A folder with a pipeline of each family."""
    folders = {family: str(tmp_path_factory.mktemp(family)) for family in ("sd", "sd3", "flux")}
    for family, folder in folders.items():
        tiny.PIPELINES[family]().save_pretrained(folder)
    return folders


def dpo(folder: Path, model, family="sd3", config=FOUR, **settings) -> InstanceDPOTrainer:
    given = {"peft_config": tiny.lora(), "ref_model": None}
    given |= {name: settings.pop(name) for name in given if name in settings}
    defaults = {"output_dir": str(folder / "out"), "use_cpu": True, "beta": 50.0, "max_steps": 2}
    defaults |= {"model_init_kwargs": {"quantization_config": config} if config is not None else None}
    if settings.get("precompute"):
        defaults["precompute_dir"] = str(folder / "cache")
    args = tiny.FAST | tiny.settings(tiny.PIPELINES[family]()) | defaults | settings
    return InstanceDPOTrainer(model, args=InstanceDPOConfig(**args), train_dataset=tiny.pairs(4), **given)


def quantized_pipeline(folder: str, config=FOUR, **kwargs) -> DiffusionPipeline:
    """As a user loads it with diffusers alone."""
    library = diffusers.BitsAndBytesConfig(**config["quant_kwargs"])
    name = "unet" if (Path(folder) / "unet").exists() else "transformer"
    mapping = PipelineQuantizationConfig(quant_mapping={name: library})
    return DiffusionPipeline.from_pretrained(folder, quantization_config=mapping, dtype=torch.float32, **kwargs)


def lora_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tiny.weights(trainer.policy).items() if "lora_" in name}


# ---- Training ----


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lora_is_trained_and_the_base_stays(tmp_path, models, family, kind, precision):
    """The first loss is ln 2, the LoRA moves, not a bit of the base does, and everything but linear layers has the run's type."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    trainer = dpo(
        *(tmp_path, models[family], family, KINDS[kind]),
        bf16=precision == "bf16",
        activation_checkpointing=True,
        num_inference_steps=1,
    )
    name = trainer.backbone.denoiser_name
    layers = quantized_layers(trainer.policy)
    assert trainer.backbone.quantization == {name: f"{HOW[kind]} in {len(layers)} layers"} and len(layers) > 20
    held = {id(layer.weight) for layer in layers.values()}
    rest = {weight.dtype for key, weight in trainer.policy.named_parameters() if id(weight) not in held}
    assert rest == {dtype, torch.float32}  # the LoRA is float32
    if kind != "8":
        assert {layer.compute_dtype for layer in layers.values()} == {dtype}
    before, lora = base_checksums(trainer.policy), lora_weights(trainer)
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert tiny.max_difference(lora, lora_weights(trainer)) > 1e-4
    after = base_checksums(trainer.policy)
    biases = {f"{layer.removeprefix('base_model.model.')}.bias".replace(".base_layer", "") for layer in layers}
    assert {
        key for key in before if before[key] != after[key]
    } <= biases  # bitsandbytes casts these to its input's type
    assert len(trainer.sample(["a cat"], with_reference=True)) == 1


def test_gradients_are_those_of_the_weights_that_4_bits_stand_for(tmp_path, models):
    """Losses and LoRA equal those on a base in full precision with the same weights, to float32 rounding, after two steps."""
    four = dpo(tmp_path, models["sd3"])
    pipeline = tiny.sd3_pipeline()
    for name, layer in quantized_layers(load_backbone(models["sd3"], quantization_config=FOUR).denoiser).items():
        pipeline.transformer.get_submodule(name).weight.data = dequantized(layer).float()
    full = dpo(tmp_path, pipeline, config=None)
    for trainer in (four, full):
        trainer.train()
    assert tiny.losses(four) == pytest.approx(tiny.losses(full), abs=1e-5)
    one, other = lora_weights(four), lora_weights(full)
    assert one.keys() == other.keys() and tiny.max_difference(one, other) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
def test_a_run_resumes(tmp_path, models, kind, optim):
    """An interrupted run ends on the weights of an uninterrupted one, with 8-bit optimizer state too."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "optim": optim}
    settings |= {
        "peft_config": LoraConfig(r=256, lora_alpha=4)
    }  # bitsandbytes holds smaller tensors' state in 32 bits
    whole = dpo(tmp_path, models["sd3"], config=KINDS[kind], **settings)
    whole.train()
    if optim == "adamw_bnb_8bit":
        states = whole.optimizer.optimizer.state.values()
        assert {torch.uint8} < {state["state1"].dtype for state in states} | {None}
    resumed = dpo(tmp_path, models["sd3"], config=KINDS[kind], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert tiny.max_difference(lora_weights(whole), lora_weights(resumed)) == 0
    assert tiny.losses(whole) == tiny.losses(resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_lora_on_a_fresh_base(tmp_path, models, kind):
    """Only the LoRA is saved; plain diffusers loads it into the base, quantised again, and every prediction is the same."""
    trainer = dpo(tmp_path, models["sd3"], config=KINDS[kind])
    trainer.train()
    trainer.save_model()
    assert {path.suffix for path in (tmp_path / "out").glob("*.safetensors")} == {".safetensors"}
    assert not (tmp_path / "out" / "transformer").exists()
    fresh = quantized_pipeline(models["sd3"], KINDS[kind])
    fresh.load_lora_weights(tmp_path / "out")
    backbone = trainer.backbone
    with torch.no_grad():
        expected = tiny.predictions(backbone, trainer.policy)
        assert torch.equal(tiny.predictions(backbone, fresh.transformer), expected)
    card = (tmp_path / "out").joinpath("README.md")
    trainer.create_model_card()
    assert f"`transformer` while training | held in {HOW[kind]} in " in card.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_all_three_trainers(tmp_path, models, kind):
    """Expert and policy are adapters on one quantised base; CPO's first loss is ln 2; one mixed forward is the separate ones."""
    criteria = tmp_path / "tiny.yaml"
    criteria.write_text(tiny.CRITERIA)
    settings = tiny.FAST | tiny.settings(tiny.sd3_pipeline()) | {"use_cpu": True, "criteria": str(criteria)}
    settings |= {"model_init_kwargs": {"quantization_config": KINDS[kind]}, "max_steps": 2, "learning_rate": 0.05}
    given = {"train_dataset": tiny.paintings(4), "peft_config": tiny.lora()}
    expert = AttributeSFTTrainer(models["sd3"], args=AttributeSFTConfig(str(tmp_path / "expert"), **settings), **given)
    expert.train()
    expert.save_model()
    args = ComplexPOConfig(str(tmp_path / "policy"), beta=50.0, **settings)
    policy = ComplexPOTrainer(models["sd3"], str(tmp_path / "expert"), args=args, **given)
    policy.train()
    assert tiny.losses(policy)[0] == pytest.approx(math.log(2), abs=1e-4)

    mixer = policy.mixer
    assert isinstance(mixer, AdapterMixer) and len(mixer.layers) > 10
    assert {type(layer).__name__ for layer in mixer.layers} == {"Linear8bitLt" if kind == "8" else "Linear4bit"}
    assert all(isinstance(layer, LoraLayer) for layer in mixer.layers)

    @torch.no_grad()
    def predict(rows: slice) -> torch.Tensor:
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        conditions = policy.backbone.encode_prompts(["a red circle", "a cat and a dog"])
        timesteps = torch.tensor([10, 700])
        conditions = {name: value[rows] for name, value in conditions.items()}
        return policy.backbone.predict(policy.policy, latents[rows], timesteps[rows], conditions)

    policy.policy.eval()
    with mixer.mixing([("expert", 1), (None, 1)]):
        mixed = predict(slice(0, 2))
    with with_adapter(mixer.layers, "expert"):
        of_expert = predict(slice(0, 1))
    with with_adapter(mixer.layers, None):
        of_base = predict(slice(1, 2))
    assert torch.allclose(mixed, torch.cat([of_expert, of_base]), atol=1e-4)
    assert (mixed[0] - predict(slice(0, 1))[0]).abs().max() > 1e-3  # the policy's own adapter is another one


# ---- Loading ----


@pytest.mark.parametrize("kind", KINDS)
def test_phased_loading(tmp_path, models, kind):
    """With `precompute` the denoiser arrives quantised after the encoders are freed, and trains as without."""
    with_encoders = KINDS[kind] | {"components_to_quantize": ["transformer", "text_encoder_3"]}
    settings = {"config": with_encoders, "noise_source": "inversion", "inversion_steps": 2, "num_inference_steps": 1}
    trainer = dpo(tmp_path, models["sd3"], precompute=True, **settings)
    assert isinstance(vars(trainer.backbone.pipeline)["text_encoder_3"], FreedComponent)
    assert describe_quantization(trainer.policy).startswith(HOW[kind])
    trainer.train()
    plain = dpo(tmp_path, models["sd3"], **settings)
    plain.train()
    assert tiny.losses(trainer) == pytest.approx(tiny.losses(plain), abs=1e-4)
    assert trainer.sample(["a cat"])
    with trainer.backbone.encoders_on_device():
        assert describe_quantization(trainer.backbone.pipeline.text_encoder_3).startswith(HOW[kind])


@pytest.mark.parametrize("precompute", [False, True])
def test_no_component_is_loaded_in_full_by_mistake(tmp_path, models, monkeypatch, precompute):
    """Each load of a component that is quantised has its settings; the others have none."""
    given = []
    for kind in (
        diffusers.SD3Transformer2DModel,
        transformers.T5EncoderModel,
        transformers.CLIPTextModelWithProjection,
    ):
        own = kind.from_pretrained.__func__

        def noted(cls, *args, own=own, **kwargs):
            given.append((cls.__name__, type(kwargs.get("quantization_config")).__name__))
            return own(cls, *args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(noted))
    config = FOUR | {"components_to_quantize": ["transformer", "text_encoder_3"]}
    dpo(tmp_path, models["sd3"], config=config, precompute=precompute)
    assert sorted(given) == [
        *[("CLIPTextModelWithProjection", "NoneType")] * 2,
        ("SD3Transformer2DModel", "BitsAndBytesConfig"),
        ("T5EncoderModel", "BitsAndBytesConfig"),
    ]


def test_every_way_to_write_it(models):
    """An object of diffusers, its arguments, or configurations of single components: the same layers with the same weights."""
    kwargs = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    ways = [
        FOUR,
        {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"bnb_4bit_quant_type": "nf4"}},
        FOUR | {"components_to_quantize": "transformer"},
        PipelineQuantizationConfig(quant_backend="bitsandbytes_4bit", quant_kwargs=kwargs),
        PipelineQuantizationConfig(quant_mapping={"transformer": diffusers.BitsAndBytesConfig(**kwargs)}),
        PipelineQuantizationConfig(quant_mapping={"transformer": transformers.BitsAndBytesConfig(**kwargs)}),
        {"quant_mapping": {"transformer": kwargs | {"bnb_4bit_compute_dtype": "bf16"}}},
    ]
    denoisers = [load_backbone(models["sd3"], quantization_config=way).denoiser for way in ways]
    assert len({json.dumps(base_checksums(denoiser), sort_keys=True) for denoiser in denoisers}) == 1
    types = [next(iter(quantized_layers(denoiser).values())).compute_dtype for denoiser in denoisers]
    assert types == [torch.float32] * 6 + [torch.bfloat16]


def test_layers_may_be_left_out(models):
    """`llm_int8_skip_modules` keeps layers in full, each time that a component is loaded, and is not written into."""
    skipped = ["proj_out"]
    config = {
        "quant_backend": "bitsandbytes_4bit",
        "quant_kwargs": {"load_in_4bit": True, "llm_int8_skip_modules": skipped},
    }
    for _ in range(2):
        assert type(load_backbone(models["sd3"], quantization_config=config).denoiser.proj_out) is torch.nn.Linear
    assert skipped == ["proj_out"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_pipeline_that_is_quantised(tmp_path, models, kind):
    """It is trained under a LoRA as the same model by its name; in bf16 what is no quantised layer is cast."""
    losses = []
    for model, config in ((quantized_pipeline(models["sd3"], KINDS[kind]), None), (models["sd3"], KINDS[kind])):
        trainer = dpo(tmp_path, model, config=config)
        trainer.train()
        losses.append(tiny.losses(trainer))
    assert losses[0] == losses[1]
    half = dpo(tmp_path, quantized_pipeline(models["sd3"], KINDS[kind]), config=None, bf16=True)
    assert half.policy.get_base_model().proj_out.bias.dtype == torch.bfloat16
    half.train()
    assert tiny.losses(half)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precompute", [False, True])
def test_a_folder_of_quantised_weights(tmp_path, models, kind, precompute):
    """A pipeline that was saved in 4 or 8 bits is trained as it is, and not without a LoRA."""
    folder = tmp_path / "saved"
    quantized_pipeline(models["sd3"], KINDS[kind]).save_pretrained(folder)
    trainer = dpo(tmp_path, str(folder), config=None, precompute=precompute)
    assert describe_quantization(trainer.policy).startswith(HOW[kind])
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    with pytest.raises(ValueError, match="`transformer` is held in .*quantised weights cannot be trained.*--use_peft"):
        dpo(tmp_path, str(folder), config=None, precompute=precompute, peft_config=None)


def test_all_weights_with_a_quantised_encoder(tmp_path, models):
    """What is saved is the whole pipeline with encoders in full; a loaded pipeline has none to save, and is refused."""
    config = EIGHT | {"components_to_quantize": ["text_encoder"]}
    trainer = dpo(tmp_path, models["sd"], "sd", config, peft_config=None)
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    original = load_file(Path(models["sd"]) / "text_encoder" / "model.safetensors")
    assert saved.keys() == original.keys() and all(torch.equal(saved[name], original[name]) for name in saved)
    assert trainer.backbone.quantization.keys() == {"text_encoder"}
    mapping = {"text_encoder": transformers.BitsAndBytesConfig(load_in_8bit=True)}
    given = PipelineQuantizationConfig(quant_mapping=mapping)
    pipeline = DiffusionPipeline.from_pretrained(models["sd"], quantization_config=given, dtype=torch.float32)
    with pytest.raises(ValueError, match="`text_encoder` is held in 8 bits.*saved so.*by its name"):
        dpo(tmp_path, pipeline, "sd", None, peft_config=None)
    lora = dpo(tmp_path, pipeline, "sd", None)
    lora.train()
    assert tiny.losses(lora)[0] == pytest.approx(math.log(2), abs=1e-6)


# ---- What is refused ----


MAPPING = {"transformer": {"load_in_4bit": True}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"load_in_4bit": True}, "has 'load_in_4bit'.*quant_backend"),
        (diffusers.BitsAndBytesConfig(load_in_4bit=True), "is a `BitsAndBytesConfig`.*PipelineQuantizationConfig"),
        (True, "is a `bool`"),
        ({"quant_backend": "torchao", "quant_kwargs": {"quant_type": "int8wo"}}, "'torchao'.*bitsandbytes_4bit"),
        ({"quant_backend": "quanto"}, "'quanto'"),
        ({"quant_backend": "bitsandbytes_4bit", "quant_mapping": MAPPING}, "or else"),
        ({}, "needs `quant_backend`"),
        ({"quant_mapping": {"transformer": diffusers.GGUFQuantizationConfig()}}, "by a `GGUFQuantizationConfig`"),
        ({"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_8bit": True}}, "both `load_in_4bit` and"),
        ({"quant_mapping": {"transformer": {}}}, "no `load_in_4bit=True`.*4 bits or 8"),
        ({"quant_mapping": {"transformer": {"load_in_4bit": True, "bits": 4}}}, "'bits'.*does not know"),
        (FOUR | {"components_to_quantize": ["vae"]}, "names `vae`.*latents"),
        (FOUR | {"components_to_quantize": ["unet"]}, "names `unet`.*`transformer`.*`text_encoder_3`"),
        (FOUR | {"components_to_quantize": ["transformer", "tokenizer"]}, "names `tokenizer`"),
        ({"quant_mapping": {"transformer": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}}}, "'nf4' or 'fp4'"),
        (
            {"quant_mapping": {"transformer": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}}},
            "bnb_4bit_quant_storage.*casts would change",
        ),
        (
            {"quant_mapping": {"transformer": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True}}},
            "llm_int8_has_fp16_weight.*saves no memory",
        ),
        (
            {"quant_mapping": {"transformer": {"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}}},
            "llm_int8_enable_fp32_cpu_offload.*spreads",
        ),
        (
            {"quant_mapping": {"transformer": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}}},
            "bnb_4bit_compute_dtype.*float32",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, models, config, message):
    """By name, with the way out, before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        dpo(tmp_path, models["sd3"], config=config)
    if not isinstance(config, diffusers.BitsAndBytesConfig | bool) and config:
        with pytest.raises(ValueError, match=message):
            load_backbone(models["sd3"], quantization_config=config)


@pytest.mark.parametrize("precompute", [False, True])
def test_all_weights_of_a_quantised_denoiser_are_refused(tmp_path, models, precompute):
    """Before anything is encoded, with both ways out."""
    with pytest.raises(ValueError, match="`transformer` is held in 4 bits.*LoRA.*--use_peft.*without `quantization"):
        dpo(tmp_path, models["sd3"], precompute=precompute, peft_config=None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "mica"}, {"use_dora": True}, {"use_bdlora": {"target_modules_bd_a": ["to_q"]}}]
)
@pytest.mark.parametrize("precompute", [False, True])
def test_loras_that_need_the_weights_in_full_are_refused(tmp_path, models, settings, precompute):
    """Before anything is encoded."""
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.*in full.*held in 4 bits"):
        dpo(tmp_path, models["sd3"], precompute=precompute, peft_config=LoraConfig(r=2, lora_alpha=2, **settings))
    assert not (tmp_path / "cache").exists()


def test_an_initial_lora_on_a_quantised_base(tmp_path, models):
    """A LoRA goes on where it stopped, on a base in another precision too; a DoRA is refused."""
    first = dpo(tmp_path, models["sd3"], config=None)
    first.train()
    first.save_model(str(tmp_path / "lora"))
    again = dpo(tmp_path, models["sd3"], peft_config=None, initial_lora=str(tmp_path / "lora"))
    assert (
        tiny.max_difference(
            {key: value for key, value in lora_weights(again).items() if ".default." in key}, lora_weights(first)
        )
        == 0
    )
    again.train()
    assert tiny.losses(again)[0] == pytest.approx(math.log(2), abs=1e-6)
    dora = dpo(tmp_path, models["sd3"], config=None, peft_config=LoraConfig(r=2, lora_alpha=2, use_dora=True))
    dora.save_model(str(tmp_path / "dora"))
    with pytest.raises(ValueError, match="`initial_lora` has `use_dora=True`.*held in 4 bits"):
        dpo(tmp_path, models["sd3"], peft_config=None, initial_lora=str(tmp_path / "dora"))


@pytest.mark.parametrize("missing", ["bitsandbytes", "a GPU"])
@pytest.mark.parametrize("is_stored", [False, True])
def test_what_diffusers_needs(tmp_path, models, monkeypatch, missing, is_stored):
    """One line that says what is missing, before anything is loaded, also for a folder whose weights are quantised."""
    model, config = models["sd3"], FOUR
    if is_stored:
        quantized_pipeline(models["sd3"]).save_pretrained(tmp_path / "saved")
        model, config = str(tmp_path / "saved"), None
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    if missing == "bitsandbytes":
        monkeypatch.setattr(module_under_test, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(module_under_test, "has_gpu", lambda: False)
    with pytest.raises(ValueError, match=f"needs {missing}") as caught:
        dpo(tmp_path, model, config=config, precompute=True)
    assert "\n" not in str(caught.value)


def test_a_single_file_is_refused(tmp_path, models):
    """diffusers quantises folders; how to make one is said."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="single file.*save_pretrained"):
        load_backbone(str(file), quantization_config=FOUR)


def test_a_quantised_vae_is_refused():
    """Also in a loaded pipeline."""
    import bitsandbytes

    pipeline = tiny.sd3_pipeline()
    attention = pipeline.vae.encoder.mid_block.attentions[0]
    layer = bitsandbytes.nn.Linear4bit(8, 8, quant_type="nf4", compress_statistics=False)
    attention.to_q = layer.to("cpu")
    with pytest.raises(
        ValueError, match="`vae` is quantized \\(4 bits \\(nf4\\) in 1 layers\\).*components_to_quantize"
    ):
        load_backbone(pipeline)


@pytest.mark.parametrize("storage", ["bfloat16", "not quantised"])
def test_layers_of_bitsandbytes_that_hold_floating_point_numbers_are_refused(storage):
    """Weights that are packed into floating point numbers, which a cast would change, or that wait for their quantisation."""
    import bitsandbytes

    pipeline = tiny.sd3_pipeline()
    layer = bitsandbytes.nn.Linear4bit(32, 16, quant_storage=torch.bfloat16)
    pipeline.transformer.context_embedder = layer.to("cpu") if storage == "bfloat16" else layer
    with pytest.raises(ValueError, match="`transformer` is quantized or sharded.*Params4bit"):
        load_backbone(pipeline)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["4", "8"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, models, kind, value):
    """In the files, because quantising may hide them; and as scales of a loaded pipeline."""
    pipeline = tiny.sd3_pipeline()
    pipeline.transformer.transformer_blocks[0].attn.to_q.weight.data[1, 2] = value
    pipeline.save_pretrained(tmp_path / "bad")
    for precompute in (False, True):
        with pytest.raises(ValueError, match="`transformer` has weights that are not finite.*0.attn.to_q.weight"):
            dpo(tmp_path, str(tmp_path / "bad"), config=KINDS[kind], precompute=precompute)
    loaded = quantized_pipeline(models["sd3"], KINDS[kind])
    weight = loaded.transformer.transformer_blocks[0].attn.to_q.weight
    scales = weight.SCB if kind == "8" else weight.quant_state.absmax
    scales[0] = value
    with pytest.raises(ValueError, match="`transformer` has weights that are not finite"):
        load_backbone(loaded)


# ---- The reference ----


def test_a_reference_in_another_precision_is_refused(tmp_path, models):
    """In full, in 8 bits or with another number of layers: it would differ before anything is trained."""
    skipping = {"quant_backend": "x", "quant_kwargs": FOUR["quant_kwargs"] | {"llm_int8_skip_modules": ["proj_out"]}}
    for other in (
        tiny.sd3_pipeline(),
        quantized_pipeline(models["sd3"], EIGHT),
        quantized_pipeline(models["sd3"], skipping),
    ):
        with pytest.raises(ValueError, match="`ref_model` does not fit.*`transformer` is held in"):
            dpo(tmp_path, models["sd3"], ref_model=other)
    with pytest.raises(ValueError, match="held in 4 bits.* the policy's in full precision"):
        dpo(tmp_path, models["sd3"], config=None, ref_model=quantized_pipeline(models["sd3"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_reference_in_the_same_precision(tmp_path, models, kind, bf16):
    """
    By name, as the policy is loaded: the first loss is ln 2, in bfloat16 up to the rounding of norms, which a separate reference has in
    float32, times `beta / 2`.
    """
    trainer = dpo(tmp_path, models["sd3"], config=KINDS[kind], ref_model=models["sd3"], bf16=bf16)
    reference = trainer.reference.denoiser
    assert describe_quantization(reference) == describe_quantization(trainer.policy)
    trainer.train()
    assert tiny.losses(trainer)[0] == pytest.approx(math.log(2), abs=0.05 if bf16 else 1e-6)


# ---- What a run is ----


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints(models, kind):
    """A forward changes no fingerprint; quantised weights are recognised as those that they stand for, and others are not."""
    backbone = load_backbone(models["sd3"], quantization_config=KINDS[kind])
    denoiser, full = backbone.denoiser, load_backbone(models["sd3"]).denoiser
    before = module_fingerprint(denoiser), base_fingerprint(denoiser), base_checksums(denoiser)
    tiny.predictions(backbone, denoiser)
    assert (module_fingerprint(denoiser), base_fingerprint(denoiser), base_checksums(denoiser)) == before
    assert module_fingerprint(full) != before[0]
    plain, other = base_fingerprint(full), base_fingerprint(tiny.sd3_pipeline(seed=1).transformer)
    assert same_quantized_base(plain, before[1]) and not same_quantized_base(other, before[1])
    assert not same_base(plain, before[1])  # which is for half precision


def test_resuming_in_another_precision_is_said(tmp_path, models, caplog):
    """As a change of the run, in words; another model stays an error."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    runs = {
        kind: dpo(tmp_path / kind, models["sd3"], config=KINDS.get(kind), **settings) for kind in ("full", "4", "8")
    }
    runs["4"].train()
    record = json.loads((tmp_path / "4" / "out" / "checkpoint-1" / "run_record.json").read_text())
    assert record["quantization"] == {"transformer": "4 bits (nf4) in 36 layers"}
    for kind, how in (("full", "full precision"), ("8", "8 bits in 36 layers")):
        errors, changes = compare_runs(record, runs[kind].run_record)
        assert errors == [] and changes == [
            f"`transformer` was held in 4 bits (nf4) in 36 layers and is held in {how}"
        ]
    assert compare_runs(record, runs["4"].run_record) == ([], [])
    tiny.sd3_pipeline(seed=1).save_pretrained(tmp_path / "other")
    errors, _ = compare_runs(record, dpo(tmp_path, str(tmp_path / "other"), config=EIGHT).run_record)
    assert errors == ["`model` has other weights"]
    longer = dpo(tmp_path / "8", models["sd3"], config=EIGHT, **settings | {"max_steps": 2})
    with caplog.at_level(logging.WARNING):
        longer.train(resume_from_checkpoint=str(tmp_path / "4" / "out" / "checkpoint-1"))
    assert "`transformer` was held in 4 bits (nf4)" in caplog.text


def test_an_expert_of_another_precision(tmp_path, models, caplog):
    """It is taken with a warning; one of another base is refused as before."""
    criteria = tmp_path / "tiny.yaml"
    criteria.write_text(tiny.CRITERIA)
    settings = tiny.FAST | tiny.settings(tiny.sd3_pipeline()) | {"use_cpu": True, "criteria": str(criteria)}
    given = {"train_dataset": tiny.paintings(4), "peft_config": tiny.lora()}
    expert = AttributeSFTTrainer(models["sd3"], args=AttributeSFTConfig(str(tmp_path / "expert"), **settings), **given)
    expert.save_model()
    args = ComplexPOConfig(str(tmp_path / "policy"), **settings | {"model_init_kwargs": {"quantization_config": FOUR}})
    with caplog.at_level(logging.WARNING):
        ComplexPOTrainer(models["sd3"], str(tmp_path / "expert"), args=args, **given)
    assert "trained on a base in full precision, and `model` is held in 4 bits" in caplog.text
    tiny.sd3_pipeline(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another base"):
        ComplexPOTrainer(str(tmp_path / "other"), str(tmp_path / "expert"), args=args, **given)


def test_the_configuration_is_recorded_as_plain_values(tmp_path):
    """An object of diffusers becomes what JSON holds, so that trackers and files can write it."""
    given = PipelineQuantizationConfig(quant_mapping={"transformer": diffusers.BitsAndBytesConfig(load_in_4bit=True)})
    for config in (given, PipelineQuantizationConfig(**FOUR), NESTED):
        args = InstanceDPOConfig(str(tmp_path), model_init_kwargs={"quantization_config": config}, report_to="none")
        recorded = json.loads(args.to_json_string())["model_init_kwargs"]["quantization_config"]
        assert recorded == args.model_init_kwargs["quantization_config"]


def test_the_flags(tmp_path):
    """They become `quantization_config`, with TRL's names and defaults; those that contradict each other or do nothing are refused."""

    def kwargs(given: dict | None = None, **flags) -> dict | None:
        args = InstanceDPOConfig(str(tmp_path), model_init_kwargs=given, report_to="none")
        assert get_model(ModelConfig(model_name_or_path="model", **flags), args) == "model"
        return args.model_init_kwargs

    theirs = {field.name: field.default for field in dataclasses.fields(trl.ModelConfig)}
    for name in ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"):
        assert getattr(ModelConfig(), name) == theirs[name]
    assert kwargs() == {}
    assert kwargs(load_in_8bit=True) == {"quantization_config": EIGHT}
    nested = FOUR["quant_kwargs"] | {"bnb_4bit_use_double_quant": True}
    expected = {"quantization_config": FOUR | {"quant_kwargs": nested}}
    assert kwargs(load_in_4bit=True, use_bnb_nested_quant=True) == expected
    for flags, given, message in (
        ({"load_in_4bit": True, "load_in_8bit": True}, None, "4 bits or 8"),
        ({"use_bnb_nested_quant": True}, None, "Give `--load_in_4bit` too"),
        ({"bnb_4bit_quant_type": "fp4", "load_in_8bit": True}, None, "Give `--load_in_4bit` too"),
        ({"load_in_4bit": True}, {"quantization_config": EIGHT}, "in short"),
    ):
        with pytest.raises(ValueError, match=message):
            kwargs(given, **flags)
