# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Which pipelines of Stable Diffusion 3 and FLUX.1 are trained, and what is said of the others."""

import copy

import diffusers
import pytest
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from transformers import T5Config, T5EncoderModel

from tests import tiny
from trl_diffusion.backbones import FluxBackbone, StableDiffusion3Backbone, load_backbone


LORA = LoraConfig(r=2, target_modules=["to_q"])
OTHER_SCHEDULERS = sorted(
    name
    for name in dir(diffusers)
    if name.startswith(("FlowMatch", "DDIM", "DPMSolverMultistep", "EulerD", "UniPC", "LCM"))
    and name.endswith("Scheduler")
    and name != "FlowMatchEulerDiscreteScheduler"
)


class OwnScheduler(FlowMatchEulerDiscreteScheduler):
    pass


class OtherTransformer(FluxTransformer2DModel):
    pass


def set_part(**parts):
    """Puts components into a pipeline, each made when the test runs."""

    def change(pipeline):
        for name, make in parts.items():
            setattr(pipeline, name, make(pipeline) if make else None)

    return change


def configure(component: str, **config):
    return lambda pipeline: getattr(pipeline, component).register_to_config(**config)


def wide_t5(pipeline):
    return T5EncoderModel(T5Config(vocab_size=100, d_model=64, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def rebuilt(pipeline, **config):
    """Its transformer with another configuration."""
    transformer = pipeline.transformer
    return type(transformer)(**{**transformer.config, **config})


def compiled(pipeline):
    pipeline.transformer = torch.compile(pipeline.transformer)


def group_offloading(pipeline):
    apply_group_offloading(
        pipeline.transformer,
        torch.device("cpu"),
        torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


@pytest.mark.parametrize(
    ("make", "backbone"),
    [
        (tiny.sd3_pipeline, StableDiffusion3Backbone),
        (lambda: tiny.sd3_pipeline(has_t5=False), StableDiffusion3Backbone),
        (lambda: tiny.sd3_pipeline(use_dynamic_shifting=True), StableDiffusion3Backbone),
        (lambda: tiny.sd3_pipeline(use_karras_sigmas=True, stochastic_sampling=True), StableDiffusion3Backbone),
        (tiny.flux_pipeline, FluxBackbone),
        (lambda: tiny.flux_pipeline(guidance_embeds=False), FluxBackbone),
        (lambda: tiny.flux_pipeline(shift_terminal=0.02), FluxBackbone),
    ],
)
def test_what_is_accepted(make, backbone):
    """Stable Diffusion 3 with and without T5, dev and schnell; a scheduler of one's own on top of the known one."""
    pipeline = make()
    pipeline.scheduler = OwnScheduler.from_config(pipeline.scheduler.config)
    loaded = load_backbone(pipeline)
    assert type(loaded) is backbone
    assert loaded.text_encoder_names == tuple(
        name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipeline, name, None)
    )


BOTH = (tiny.sd3_pipeline, tiny.flux_pipeline)
CASES = [
    *((make, set_part(scheduler=None), "`scheduler` is None") for make in BOTH),
    *((make, set_part(transformer=None), "`transformer` is None") for make in BOTH),
    *((make, set_part(vae=None), "`vae` is None") for make in BOTH),
    *((make, set_part(text_encoder=None), "`text_encoder` is None") for make in BOTH),
    *((make, set_part(tokenizer=None), "`tokenizer` is None") for make in BOTH),
    *((make, set_part(text_encoder_2=None), "`text_encoder_2` is None") for make in BOTH),
    (tiny.sd3_pipeline, set_part(text_encoder_3=None), "`text_encoder_3` is None"),
    (tiny.sd3_pipeline, set_part(tokenizer_3=None), "`tokenizer_3` is None"),
    *((make, configure("scheduler", invert_sigmas=True), "`scheduler.config.invert_sigmas` is True") for make in BOTH),
    *((make, lambda p: p.scheduler.set_shift(0.0), "`scheduler.config.shift` is 0.0") for make in BOTH[:1]),
    (tiny.flux_pipeline, configure("scheduler", max_shift=None), "`scheduler.config.max_shift` is None"),
    (tiny.flux_pipeline, configure("scheduler", num_train_timesteps=500), "divides timesteps by 1000"),
    *((make, lambda p: p.transformer.add_adapter(LORA), "`transformer` carries LoRA adapters") for make in BOTH),
    *((make, compiled, "`transformer` is compiled") for make in BOTH),
    *((make, group_offloading, "`transformer` has hooks of diffusers") for make in BOTH),
    *((make, lambda p: p.transformer.fuse_qkv_projections(), "fused|Fused") for make in BOTH),
    (
        tiny.flux_pipeline,
        set_part(transformer=lambda p: OtherTransformer(**p.transformer.config)),
        "`transformer` is a `OtherTransformer`, but a `FluxPipeline` has a `FluxTransformer2DModel`",
    ),
    (
        tiny.sd3_pipeline,
        set_part(transformer=lambda p: tiny.flux_pipeline().transformer),
        "`transformer` is a `FluxTransformer2DModel`",
    ),
    (
        tiny.flux_pipeline,
        set_part(transformer=lambda p: rebuilt(p, in_channels=96, out_channels=16)),
        "`transformer.config.in_channels` is 96 and `out_channels` is 16, but it takes more",
    ),
    (
        tiny.sd3_pipeline,
        set_part(transformer=lambda p: rebuilt(p, in_channels=8, out_channels=8)),
        "`transformer` takes latents of 8 channels",
    ),
    (
        tiny.flux_pipeline,
        set_part(transformer=lambda p: rebuilt(p, in_channels=64)),
        "`transformer` takes latents of 16 channels",
    ),
    *((make, set_part(vae=lambda p: AutoencoderTiny()), "`vae` is a `AutoencoderTiny`") for make in BOTH),
    *(
        (make, configure("vae", shift_factor=None), r"`vae.config.shift_factor` is None.*shift_factor=0.0")
        for make in BOTH
    ),
    *((make, configure("vae", shift_factor=float("nan")), "`vae.config.shift_factor` is nan") for make in BOTH),
    *((make, configure("vae", scaling_factor=0), "`vae.config.scaling_factor` is 0") for make in BOTH),
    *((make, configure("vae", latents_mean=[0.5] * 4), "`vae.config.latents_mean`") for make in BOTH),
    (
        tiny.sd3_pipeline,
        set_part(text_encoder=lambda p: tiny.text_encoder()),
        "`text_encoder` is a `CLIPTextModel`, but .* by a `CLIPTextModelWithProjection`",
    ),
    (tiny.sd3_pipeline, set_part(text_encoder_3=wide_t5), "`transformer.config.joint_attention_dim` is 32.* give 64"),
    (tiny.flux_pipeline, set_part(text_encoder_2=wide_t5), "`transformer.config.joint_attention_dim` is 32.* give 64"),
    (
        tiny.flux_pipeline,
        set_part(text_encoder_2=lambda p: p.text_encoder),
        "`text_encoder_2` is a `CLIPTextModel`, but .* by a `T5EncoderModel`",
    ),
    (
        tiny.flux_pipeline,
        set_part(transformer=lambda p: rebuilt(p, pooled_projection_dim=8)),
        "`transformer.config.pooled_projection_dim` is 8, and the text encoders give 16",
    ),
    *((make, lambda p: p.tokenizer_2.add_tokens("<mine>"), "`tokenizer_2` has .* tokens were added") for make in BOTH),
    (
        tiny.sd3_pipeline,
        lambda p: setattr(p.tokenizer_2, "model_max_length", 8),
        "padded to one number of tokens",
    ),
    (tiny.flux_pipeline, lambda p: setattr(p.tokenizer, "model_max_length", 8), "padded to one number of tokens"),
]


@pytest.mark.parametrize(("make", "change", "message"), CASES)
def test_what_is_refused(make, change, message):
    """One thing is changed; the error names it. Without the change the same pipeline is trained."""
    pipeline = make()
    load_backbone(pipeline)
    change(pipeline)
    with pytest.raises(ValueError, match=f"This model cannot be trained: (?s:.*)({message})"):
        load_backbone(pipeline)


@pytest.mark.parametrize("name", OTHER_SCHEDULERS)
def test_other_schedulers_are_refused_by_name(name):
    """Schedulers of noise models, and of flows whose shift is configured in another way."""
    pipeline = tiny.sd3_pipeline()
    try:
        pipeline.scheduler = getattr(diffusers, name)()
    except ImportError:
        pytest.skip(f"{name} needs a package that is not installed")
    with pytest.raises(ValueError, match=f"`scheduler` is a `{name}`, but .*put the other one back for sampling"):
        load_backbone(pipeline)


@pytest.mark.parametrize(
    ("resolution", "message"),
    [(34, "no multiple of 4"), (36, "no multiple of 8, the number of pixels along a side of a patch"), (32, None)],
)
@pytest.mark.parametrize("make", BOTH)
def test_resolutions_are_whole_patches(make, resolution, message):
    backbone = load_backbone(make())
    if message is None:
        assert backbone.check_resolution(resolution) == resolution
        return
    with pytest.raises(ValueError, match=f"`resolution` is {resolution}, which is {message}"):
        backbone.check_resolution(resolution)


@pytest.mark.parametrize(
    ("make", "make_reference", "message"),
    [
        (
            tiny.sd3_pipeline,
            tiny.flux_pipeline,
            "it is a `FluxPipeline` and the policy is a `StableDiffusion3Pipeline`",
        ),
        (tiny.sd3_pipeline, lambda: tiny.sd3_pipeline(has_t5=False), "only one of them has T5"),
        (
            tiny.flux_pipeline,
            lambda: tiny.flux_pipeline(guidance_embeds=False),
            "its `transformer.config.guidance_embeds` is False",
        ),
        (tiny.sd3_pipeline, lambda: tiny.sd3_pipeline(num_train_timesteps=500), "num_train_timesteps` is 500"),
        (tiny.sd3_pipeline, lambda: tiny.sd3_pipeline(seed=1), "its `text_encoder` has other weights"),
        (tiny.flux_pipeline, lambda: tiny.flux_pipeline(seed=1), "its `text_encoder` has other weights"),
    ],
)
def test_references_that_do_not_fit(make, make_reference, message):
    with pytest.raises(ValueError, match=f"`ref_model` does not fit the policy: .*{message}"):
        load_backbone(make()).check_reference(make_reference())


@pytest.mark.parametrize("make", BOTH)
def test_references_that_fit(make):
    """Other weights of the transformer, another shift and another size do not matter; the policy's own weights do."""
    backbone, reference = load_backbone(make()), make()
    reference.transformer = copy.deepcopy(reference.transformer)
    with torch.no_grad():
        reference.transformer.proj_out.weight += 1
    reference.scheduler = tiny.flow_scheduler(shift=1.0)
    backbone.check_reference(reference)
    reference.transformer = backbone.pipeline.transformer
    with pytest.raises(ValueError, match="has the weights that are trained"):
        backbone.check_reference(reference)
