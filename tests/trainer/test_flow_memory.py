# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a LoRA on a flow transformer holds in memory: a base in half precision, encoders before it, blocks that are recomputed."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import quantized, tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import load_backbone
from trl_diffusion.trainer.policy import make_policy


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A folder with a pipeline of each family, in bfloat16 as published ones are."""
    folders = {family: str(tmp_path_factory.mktemp(family)) for family in tiny.FLOWS}
    for family, folder in folders.items():
        tiny.PIPELINES[family]().to(torch.bfloat16).save_pretrained(folder)
    return folders


def dpo(folder: Path, model: str, family: str, **settings) -> InstanceDPOTrainer:
    defaults = {"output_dir": str(folder / "out"), "use_cpu": True, "bf16": True, "max_steps": 1}
    defaults |= {"precompute": True, "precompute_dir": str(folder / "cache"), "activation_checkpointing": True}
    args = InstanceDPOConfig(**tiny.FAST | tiny.settings(tiny.PIPELINES[family]()) | defaults | settings)
    return InstanceDPOTrainer(model, args=args, train_dataset=tiny.pairs(2), peft_config=tiny.lora())


class Float32Matrices(TorchDispatchMode):
    """Notes the shapes of all matrices in float32 that any operation makes."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for value in tree_leaves(result):
            if (
                isinstance(value, torch.Tensor)
                and value.dtype == torch.float32
                and value.ndim == 2
                and not value.is_meta
            ):
                self.shapes.add(tuple(value.shape))
        return result


@pytest.mark.parametrize("family", tiny.FLOWS)
def test_a_frozen_base_is_never_in_float32(tmp_path, models, family):
    """From the files to the policy, no operation makes a matrix of the denoiser in float32, and the encoders are gone before it."""
    alive, load = [], DiffusionPipeline.from_pretrained
    before_denoiser = []

    def noted(*args, **kwargs):
        gc.collect()
        before_denoiser.append([name for name, part in alive if part() is not None])
        made.shapes.clear()  # those of encoding
        pipeline = load(*args, **kwargs)
        parts = {name: getattr(pipeline, name) for name in encoders}
        alive.extend((name, weakref.ref(part)) for name, part in parts.items() if part is not None)
        return pipeline

    config = load_backbone(models[family])
    encoders = config.text_encoder_names
    others = {
        tuple(weight.shape) for name in config.encoder_names for weight in getattr(config.pipeline, name).parameters()
    }
    own = {tuple(weight.shape) for weight in config.denoiser.parameters() if weight.ndim == 2} - others
    own -= {(64, 16)}  # of the table of positions in Stable Diffusion 3 too
    assert len(own) > 3
    del config
    with pytest.MonkeyPatch.context() as patch, Float32Matrices() as made:
        patch.setattr(DiffusionPipeline, "from_pretrained", noted)
        trainer = dpo(tmp_path, models[family], family)
    assert before_denoiser == [[], []]  # the encoders' load, and the denoiser's
    assert own & made.shapes == set()
    assert {weight.dtype for name, weight in trainer.policy.named_parameters() if "lora_" not in name} == {
        torch.bfloat16
    }
    trainer.train()


@pytest.mark.parametrize("family", tiny.FLOWS)
def test_activations_of_blocks_are_recomputed(family):
    """With checkpointing, what is kept for the backward is little more than the inputs of blocks."""
    kept = {}
    for is_checkpointed in (False, True):
        kept[is_checkpointed] = _kept(load_backbone(tiny.PIPELINES[family]()), None, is_checkpointed)
    assert kept[True] < kept[False] / 3


def _kept(backbone, dtype: torch.dtype | None, is_checkpointed: bool) -> int:
    """Bytes of activations that the forward of a LoRA keeps for the backward."""
    policy = make_policy(backbone.load_denoiser(), tiny.lora(), backbone.lora_target_modules, dtype, seed=0)
    if is_checkpointed:
        backbone.denoiser.activation_checkpointing_enable()
    backbone.max_sequence_length = tiny.NUM_T5_TOKENS
    with torch.no_grad():
        conditions = backbone.encode_prompts(["a cat", "a dog"])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            prediction = backbone.predict(policy.train(), latents, torch.tensor([10, 700]), conditions)
    assert prediction.requires_grad
    return sum(storages.values())


DTYPES = {"encoder_dtype": torch.bfloat16, "denoiser_dtype": torch.bfloat16}


@pytest.mark.parametrize("family", tiny.FLOWS)
@pytest.mark.parametrize("kind", ["4", "8"])
def test_a_quantised_base_keeps_as_much_as_one_in_bf16(models, family, kind):
    """For the backward, by the byte."""
    expected = _kept(load_backbone(models[family], **DTYPES), torch.bfloat16, False)
    with quantized.quantizing_on_the_cpu():
        backbone = load_backbone(models[family], quantization_config=quantized.KINDS[kind], **DTYPES)
        assert _kept(backbone, torch.bfloat16, False) == expected


def test_layers_of_4_bits_alone_keep_more(models, monkeypatch):
    """Without what `compute_as_autocast` adds, they give back the float32 that they are given, and a quarter more is kept."""
    monkeypatch.setattr("trl_diffusion.trainer.policy.compute_as_autocast", lambda denoiser: None)
    expected = _kept(load_backbone(models["flux"], **DTYPES), torch.bfloat16, False)
    with quantized.quantizing_on_the_cpu():
        backbone = load_backbone(models["flux"], quantization_config=quantized.FOUR, **DTYPES)
        assert _kept(backbone, torch.bfloat16, False) > 1.25 * expected
