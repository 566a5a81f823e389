# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Group offloading of diffusers: encoders pass through the device layer by layer, and why a denoiser that is trained cannot."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from peft import LoraConfig, get_peft_model

from tests import quantized, tiny
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.backbones import load_backbone
from trl_diffusion.backbones.offloading import is_offloaded_by_layer


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A folder with a pipeline of each family."""
    folders = {family: str(tmp_path_factory.mktemp(family)) for family in tiny.FAMILIES}
    for family, folder in folders.items():
        tiny.PIPELINES[family]().save_pretrained(folder)
    return folders


def dpo(folder: Path, model, family="sd3", **settings) -> InstanceDPOTrainer:
    given = {"peft_config": tiny.lora(), "ref_model": None}
    given |= {name: settings.pop(name) for name in given if name in settings}
    defaults = {"output_dir": str(folder / "out"), "use_cpu": True, "max_steps": 2, "num_inference_steps": 1}
    if settings.get("precompute"):
        defaults["precompute_dir"] = str(folder / "cache")
    args = tiny.FAST | tiny.settings(tiny.PIPELINES[family]()) | defaults | settings
    return InstanceDPOTrainer(model, args=InstanceDPOConfig(**args), train_dataset=tiny.pairs(4), **given)


def tensors(group: ModuleGroup) -> Iterator[torch.Tensor]:
    for module in group.modules:
        yield from module.parameters()
        yield from module.buffers()
    yield from group.parameters
    yield from group.buffers


class Gone:
    """In place of the transfers: an offloaded weight is NaN. Counts the bytes that are on the device."""

    def __init__(self):
        self.kept: dict[int, torch.Tensor] = {}
        self.now = self.peak = self.transfers = 0

    def onload(self, group: ModuleGroup) -> None:
        self.transfers += 1
        for tensor in tensors(group):
            if id(tensor) in self.kept:
                tensor.data = self.kept.pop(id(tensor))
                self.now += tensor.nbytes
        self.peak = max(self.peak, self.now)

    def offload(self, group: ModuleGroup) -> None:
        for tensor in tensors(group):
            if tensor.is_floating_point() and id(tensor) not in self.kept:
                self.kept[id(tensor)] = tensor.data
                tensor.data = torch.full_like(tensor.data, float("nan"))
                self.now -= tensor.nbytes


@contextmanager
def offloaded_weights_are_gone() -> Iterator[Gone]:
    gone = Gone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModuleGroup, "onload_", lambda group: gone.onload(group))
        patch.setattr(ModuleGroup, "offload_", lambda group: gone.offload(group))
        yield gone


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("is_named", [False, True])
def test_the_numbers_are_the_same(tmp_path, models, family, precompute, is_named):
    """Losses and samples, of a model by its name and of a loaded pipeline; afterwards the encoders are plain modules."""
    found = []
    for offloads in (False, True):
        model = models[family] if is_named else tiny.PIPELINES[family]()
        folder = tmp_path / str(offloads)
        trainer = dpo(folder, model, family, precompute=precompute, offload_encoders=offloads)
        encoders = [vars(trainer.backbone.pipeline)[name] for name in trainer.backbone.encoder_names]
        kept = not precompute and offloads  # else they are freed, or back on the CPU
        assert precompute or [is_offloaded_by_layer(encoder) for encoder in encoders] == [kept] * len(encoders)
        trainer.train()
        picture = trainer.sample(["a cat"])[0].tobytes()
        found.append(
            (tiny.losses(trainer), picture, trainer.pipeline()("a cat", num_inference_steps=1).images[0].size)
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_layer_is_on_the_device_only_while_it_computes(family):
    """Encodings are the same where everything that is offloaded is NaN, and little of an encoder is on the device at once."""
    pipeline = tiny.PIPELINES[family]()
    total = sum(weight.nbytes for name in ("vae", "text_encoder") for weight in getattr(pipeline, name).parameters())
    backbone = load_backbone(pipeline)
    if backbone.max_sequence_length is not None:
        backbone.max_sequence_length = tiny.NUM_T5_TOKENS
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    @torch.no_grad()
    def encode() -> list[torch.Tensor]:
        return [*backbone.encode_images(images), *backbone.encode_prompts(["a cat and a dog", None]).values()]

    expected = encode()
    with offloaded_weights_are_gone() as gone:
        backbone.to(CPU, offloads_encoders=True)
        gone.now = 0
        found = encode()
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        assert gone.transfers > 40 and 0 < gone.peak < total / 4 and gone.now == 0


def test_what_is_saved_is_the_whole_pipeline(tmp_path, models):
    """All weights are trained, and the encoders of the saved pipeline are those that it was loaded with."""
    for name, model in (("named", models["sd"]), ("loaded", tiny.sd_pipeline())):
        trainer = dpo(tmp_path / name, model, "sd", peft_config=None, offload_encoders=True)
        trainer.train()
        trainer.save_model()
        saved = DiffusionPipeline.from_pretrained(tmp_path / name / "out")
        original = tiny.sd_pipeline()
        for part in ("vae", "text_encoder"):
            weights = tiny.weights(getattr(saved, part)), tiny.weights(getattr(original, part))
            assert tiny.max_difference(*weights) == 0


def test_a_pipeline_is_trained_again(tmp_path):
    """A second trainer takes the pipeline of the first, with and without offloading, whose hooks it takes off."""
    pipeline = tiny.sd_pipeline()
    dpo(tmp_path, pipeline, "sd", peft_config=None, offload_encoders=True)
    dpo(tmp_path, pipeline, "sd", peft_config=None, offload_encoders=True)
    last = dpo(tmp_path, pipeline, "sd", peft_config=None)
    assert not is_offloaded_by_layer(pipeline.vae) and not is_offloaded_by_layer(pipeline.text_encoder)
    plain = dpo(tmp_path, tiny.sd_pipeline(), "sd", peft_config=None)
    for trainer in (last, plain):
        trainer.train()
    assert tiny.losses(last) == tiny.losses(plain)


def test_a_reference_is_checked_against_offloaded_encoders(tmp_path):
    """A VAE with other weights that encodes alike is accepted, one that does not is refused, with and without offloading."""
    for scale, fits in ((1.001, True), (2.0, False)):
        for offloads in (False, True):
            reference = tiny.sd_pipeline()
            with torch.no_grad():
                reference.vae.quant_conv.weight[:4] *= scale
                reference.vae.encoder.conv_in.bias += 1e-2 if fits else 1.0
            if fits:
                dpo(tmp_path, tiny.sd_pipeline(), "sd", ref_model=reference, offload_encoders=offloads)
                continue
            with pytest.raises(ValueError, match="its `vae` encodes images to other latents"):
                dpo(tmp_path, tiny.sd_pipeline(), "sd", ref_model=reference, offload_encoders=offloads)


def test_quantised_encoders_are_not_offloaded(tmp_path, models):
    """What bitsandbytes keeps beside a weight does not move with it."""
    config = quantized.FOUR | {"components_to_quantize": ["text_encoder_3"]}
    with quantized.quantizing_on_the_cpu():
        with pytest.raises(ValueError, match="`offload_encoders=True` cannot.*`text_encoder_3` is held in 4 bits"):
            dpo(tmp_path, models["sd3"], offload_encoders=True, model_init_kwargs={"quantization_config": config})


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_group_offloading_of_the_users_own_is_refused(part):
    """Any component: training moves them, and the way to offload encoders is named."""
    pipeline = tiny.sd3_pipeline()
    apply_group_offloading(getattr(pipeline, part), CPU, CPU, offload_type="leaf_level")
    with pytest.raises(ValueError, match=f"`{part}` has hooks of diffusers.*`offload_encoders=True`"):
        load_backbone(pipeline)


def trainable() -> tuple[torch.nn.Module, Callable[[], dict[str, torch.Tensor]]]:
    """A transformer under a LoRA, and what gives the gradients of a step."""
    backbone = load_backbone(tiny.sd3_pipeline())
    backbone.max_sequence_length = tiny.NUM_T5_TOKENS
    targets = list(backbone.lora_target_modules)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets)
    policy = get_peft_model(backbone.denoiser.requires_grad_(False), config).train()
    conditions = {name: value.detach() for name, value in backbone.encode_prompts(["a cat", "a dog"]).items()}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, torch.Tensor]:
        policy.zero_grad()
        backbone.predict(policy, latents, torch.tensor([10, 700]), conditions).square().mean().backward()
        return {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}

    return backbone.denoiser, gradients


@pytest.mark.parametrize(
    ("offload_type", "is_checkpointed"), [("leaf_level", False), ("leaf_level", True), ("block_level", False)]
)
def test_a_trained_denoiser_cannot_be_offloaded(offload_type, is_checkpointed):
    """
    The backward needs each frozen weight once more, after its group was offloaded; where activation checkpointing repeats a forward,
    each layer is offloaded again before its gradient is computed. No LoRA but those of the last layers gets a gradient.
    """
    denoiser, gradients = trainable()
    if is_checkpointed:
        denoiser.enable_gradient_checkpointing()
    plain = gradients()
    assert len(plain) > 30 and all(gradient.isfinite().all() for gradient in plain.values())
    blocks = {} if offload_type == "leaf_level" else {"num_blocks_per_group": 1}
    with offloaded_weights_are_gone():
        apply_group_offloading(denoiser, CPU, CPU, offload_type=offload_type, **blocks)
        found = gradients()
    finite = [name for name, gradient in found.items() if gradient.isfinite().all()]
    assert len(finite) <= len(plain) / 5


def test_offloading_a_trained_denoiser_by_block_saves_nothing():
    """
    With activation checkpointing by block the gradients are right, because the repeated forward stops at the last tensor that is
    needed, before the hook that offloads. So every block stays: at the end of the backward they are all on the device.
    """
    denoiser, gradients = trainable()
    denoiser.enable_gradient_checkpointing()
    plain = {name: gradient.clone() for name, gradient in gradients().items()}
    blocks = sum(weight.nbytes for weight in denoiser.transformer_blocks.parameters())
    with offloaded_weights_are_gone() as gone:
        apply_group_offloading(denoiser, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
        gone.now = 0
        found = gradients()
        assert gone.now == blocks
    assert all(torch.equal(plain[name], found[name]) for name in plain)
