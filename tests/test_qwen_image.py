# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Qwen-Image: which pipelines are trained, what is read of a prompt, and when its padding is masked."""

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.families import FAMILIES, qwen_image
from tests.families.qwen_image import pipeline as make
from tests.trainer.waits import micro_batch, to_meta
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, export_lora
from trl_diffusion.backbones import QwenImageBackbone, backbone_class_of, load_backbone, load_pipeline
from trl_diffusion.lora_files import load_lora


class OtherProcessor(QwenDoubleStreamAttnProcessor2_0):
    pass


def rebuilt(pipeline, **config) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(**{**pipeline.transformer.config, **config})


def set_part(**parts):
    """Puts components into a pipeline, each made when the test runs."""

    def change(pipeline):
        for name, make_part in parts.items():
            setattr(pipeline, name, make_part(pipeline))

    return change


def with_vae(**config):
    """Puts a VAE with another configuration into a pipeline."""
    return set_part(vae=lambda pipeline: AutoencoderKLQwenImage(**{**pipeline.vae.config, **config}))


def configure(component: str, **config):
    return lambda pipeline: getattr(pipeline, component).register_to_config(**config)


CASES = [
    (set_part(tokenizer=lambda p: None), "`tokenizer` is None"),
    (set_part(text_encoder=lambda p: None), "`text_encoder` is None"),
    (set_part(text_encoder=lambda p: p.text_encoder.model), "is a `Qwen2_5_VLModel`, but .* by a `Qwen2_5_VLForCond"),
    (configure("scheduler", num_train_timesteps=500), "divides timesteps by 1000"),
    (configure("scheduler", invert_sigmas=True), "`scheduler.config.invert_sigmas` is True"),
    (
        set_part(transformer=lambda p: rebuilt(p, guidance_embeds=True)),
        "`transformer.config.guidance_embeds` is True, but diffusers fails .* Choose a text-to-image model",
    ),
    (set_part(transformer=lambda p: rebuilt(p, zero_cond_t=True)), "`transformer.config.zero_cond_t` is True"),
    (
        set_part(transformer=lambda p: rebuilt(p, use_additional_t_cond=True)),
        "`transformer.config.use_additional_t_cond` is True, but it draws images in layers",
    ),
    (
        set_part(transformer=lambda p: rebuilt(p, use_layer3d_rope=True)),
        "`transformer.config.use_layer3d_rope` is True",
    ),
    (set_part(transformer=lambda p: rebuilt(p, in_channels=32)), "`transformer.config.in_channels` is 32 and `out_"),
    (
        set_part(transformer=lambda p: rebuilt(p, in_channels=32, out_channels=8)),
        "`vae` has `input_channels=3` and `z_dim=4`, and `transformer` takes 32 channels for 2x2 positions",
    ),
    (
        set_part(transformer=lambda p: rebuilt(p, joint_attention_dim=16)),
        "`transformer.config.joint_attention_dim` is 16, and the text encoder gives 32",
    ),
    (set_part(transformer=lambda p: tiny.flux_pipeline().transformer), "`transformer` is a `FluxTransformer2DModel`"),
    (
        lambda p: p.tokenizer.add_tokens([f"<{index}>" for index in range(200)]),
        "`tokenizer` has 596 tokens and `text_encoder` has embeddings for 512",
    ),
    (
        set_part(tokenizer=lambda p: type(p.tokenizer)()),
        "cuts what stands before the prompt in the template into .* tokens, but .* drops the first 34",
    ),
    (set_part(vae=lambda p: tiny.flow_vae()), "`vae` is a `AutoencoderKL`, but .* by an `AutoencoderKLQwenImage`"),
    (with_vae(input_channels=4), "`vae` has `input_channels=4`"),
    (with_vae(dim_mult=[1, 2, 2, 2], temperal_downsample=[False, True, True]), "`pipeline.vae_scale_factor` is 4"),
    (with_vae(dim_mult=[1, 2], temperal_downsample=[False, True]), r"`vae` has `dim_mult=\[1, 2\]`"),
    (configure("vae", latents_mean=None), "`vae.config.latents_mean` is None, but the pipeline normalizes each of 4"),
    (configure("vae", latents_mean=[0.0] * 3), r"`vae.config.latents_mean` is \[0.0, 0.0, 0.0\]"),
    (configure("vae", latents_mean=[float("nan")] * 4), r"`vae.config.latents_mean` is \[nan"),
    (configure("vae", latents_std=[1.0, 1.0, 0.0, 1.0]), r"`vae.config.latents_std` is \[1.0, 1.0, 0.0, 1.0\]"),
    (configure("vae", latents_std=[1.0, 1.0, -1.0, 1.0]), r"`vae.config.latents_std` is \[1.0, 1.0, -1.0, 1.0\]"),
    (configure("vae", scaling_factor=0.5), "`vae.config.scaling_factor` is 0.5, but .* ignores it"),
    (configure("vae", shift_factor=0.5), "`vae.config.shift_factor` is 0.5, but .* ignores it"),
    (lambda p: p.transformer.transformer_blocks[0].attn.fuse_projections(), "`transformer` has fused projections"),
    (
        lambda p: p.transformer.set_attn_processor(OtherProcessor()),
        "attention processors of the kind `OtherProcessor`",
    ),
]


@pytest.mark.parametrize(("change", "message"), CASES)
def test_what_is_refused(change, message):
    """One thing is changed; the error names it. Without the change the same pipeline is trained."""
    pipeline = make()
    assert type(load_backbone(pipeline)) is QwenImageBackbone
    change(pipeline)
    with pytest.raises(ValueError, match=f"This model cannot be trained: (?s:.*){message}"):
        load_backbone(pipeline)


def test_a_transformer_with_embedded_guidance_cannot_be_called():
    """The reason that is given for its refusal: diffusers hands its guidance to an embedding that takes none."""
    transformer = rebuilt(make(), guidance_embeds=True)
    given = {"hidden_states": torch.zeros(1, 4, 16), "encoder_hidden_states": torch.zeros(1, 2, 32)}
    given |= {"timestep": torch.ones(1), "img_shapes": [[(1, 2, 2)]]}
    transformer(**given)
    with pytest.raises(TypeError, match="positional arguments"):
        transformer(**given, guidance=torch.ones(1))


OTHERS = sorted(
    name
    for name in dir(diffusers)
    if name.startswith("QwenImage") and name.endswith("Pipeline") and name != "QwenImagePipeline"
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_of_the_name_are_refused(name):
    """Those that edit, fill, draw layers or take a ControlNet, and the model that came after."""
    assert {"QwenImageEditPipeline", "QwenImageLayeredPipeline", "QwenImage21Pipeline"} <= set(OTHERS)
    with pytest.raises(ValueError, match=f"`model` is a `{name}`, a family that is not supported yet"):
        backbone_class_of(object.__new__(getattr(diffusers, name)))


@pytest.mark.parametrize(
    ("make_reference", "message"),
    [
        (tiny.flux_pipeline, "it is a `FluxPipeline` and the policy is a `QwenImagePipeline`"),
        (lambda: make(seed=1), "its `text_encoder` has other weights"),
        (lambda: make(num_train_timesteps=500), "num_train_timesteps` is 500"),
    ],
)
def test_references_that_do_not_fit(make_reference, message):
    with pytest.raises(ValueError, match=f"`ref_model` does not fit the policy: .*{message}"):
        load_backbone(make()).check_reference(make_reference())


def test_references_with_another_vae():
    """Other statistics and other weights of the encoder are other latents; other weights of the transformer are what a reference has."""
    backbone, reference = load_backbone(make()), make()
    with torch.no_grad():
        reference.transformer.proj_out.weight += 1
    backbone.check_reference(reference)
    with torch.no_grad():
        reference.vae.encoder.conv_in.weight *= -1
    with pytest.raises(ValueError, match="its `vae` encodes images to other latents"):
        backbone.check_reference(reference)
    reference.vae.register_to_config(latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match="its `vae.config.latents_std` is "):
        backbone.check_reference(reference)


# ---- Prompts ----


def encoded(backbone, *prompts: str | None) -> torch.Tensor:
    return backbone.encode_prompts(list(prompts))["prompt_embeds"]


@pytest.mark.parametrize("limit", [4, 8, 600, 1024])
def test_a_prompt_fits_if_its_last_word_is_read(limit):
    """The template does not count: as many words as there are tokens are read, and of one more the last is not."""
    backbone = load_backbone(make())
    backbone.configure(limit, None)
    for number, fits in ((limit, True), (limit + 1, False)):
        prompt = " ".join(["red"] * (number - 1))
        assert backbone.fits(f"{prompt} cat") is fits
        one, other = (encoded(backbone, f"{prompt} {word}")[0] for word in ("cat", "dog"))
        assert len(one) == limit
        assert torch.equal(one[: number - 1], other[: number - 1]) and torch.equal(one, other) is not fits


def test_the_number_of_tokens_is_one_that_the_pipeline_takes():
    """1,024 at most, and where no number is given that of its call."""
    assert load_backbone(make()).max_sequence_length == 512
    with pytest.raises(
        ValueError, match="`max_sequence_length` is 1025, and a `QwenImagePipeline` takes 1 to 1024 tokens"
    ):
        load_backbone(make()).configure(1025, None)
    with pytest.raises(ValueError, match="`max_sequence_length` is 513, and a `FluxPipeline` takes 1 to 512 tokens"):
        load_backbone(tiny.flux_pipeline()).configure(513, None)
    with pytest.raises(ValueError, match="`embedded_guidance` is 1.0, but this `QwenImagePipeline` leaves no choice"):
        load_backbone(make()).configure(None, 1.0)


def test_the_unconditional_branch_is_a_space():
    """`None` is the negative prompt of the model's users, and an empty prompt stays one."""
    backbone = load_backbone(make())
    assert torch.equal(encoded(backbone, None), encoded(backbone, " "))
    assert encoded(backbone, "").shape[1] == 5 and encoded(backbone, None).shape[1] == 6  # the end of the template
    assert backbone.guidance_arguments(4.0) == {"true_cfg_scale": 4.0, "negative_prompt": " "}


def masks_of(backbone, prompts: list[str]) -> list[torch.Tensor | None]:
    masks, transformer = [], backbone.denoiser
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["encoder_hidden_states_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        latents = torch.zeros(len(prompts), 4, 4, 4)
        backbone.predict(transformer, latents, torch.ones(len(prompts)), backbone.encode_prompts(prompts))
    return masks


def test_only_padding_is_masked():
    """Prompts of one length have no mask, as in the pipeline; others are masked where they end."""
    assert masks_of(load_backbone(make()), ["a cat", "a dog"]) == [None]
    (mask,) = masks_of(load_backbone(make()), ["a cat", "a red dog"])
    assert mask.tolist() == [[True] * 7 + [False], [True] * 8]


# ---- Trainings ----


def test_a_vae_of_frames_keeps_its_layout(tmp_path):
    """`channels_last` is a layout of four dimensions: it is left out for this VAE, and the latents are the same."""
    trainers = [
        InstanceDPOTrainer(
            make(),
            args=InstanceDPOConfig(
                str(tmp_path), channels_last=layout, use_cpu=True, **tiny.FAST | qwen_image.FAMILY.settings
            ),
            train_dataset=tiny.pairs(2),
            peft_config=tiny.lora(),
        )
        for layout in (False, True)
    ]
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (mean, _), (other, _) = (trainer.encoder.encode_images(images) for trainer in trainers)
    assert torch.equal(mean, other)


def test_a_file_is_refused(tmp_path):
    """A single file of this family is named as what it is, with the way out."""
    weights = {f"model.diffusion_model.{name}": weight for name, weight in make().transformer.state_dict().items()}
    for number, prefix in enumerate(("model.diffusion_model.", "")):
        path = tmp_path / f"{number}.safetensors"
        save_file({name.replace("model.diffusion_model.", prefix): weight for name, weight in weights.items()}, path)
        with pytest.raises(ValueError, match=f"{path} holds .*. A single file must hold the model of one of these"):
            load_pipeline(str(path))


@pytest.fixture
def device_is_restored():
    """`to_meta` changes the device of a state that all trainers of a process share."""
    state = dict(AcceleratorState._shared_state)
    yield
    AcceleratorState._shared_state.update(state)


@pytest.mark.usefixtures("device_is_restored")
@pytest.mark.parametrize("family", ["qwen_image", "krea_2"])
@pytest.mark.parametrize("prompts", [["a cat", "a dog"], ["a cat", "a red dog"]])
def test_a_micro_batch_waits_for_no_result(family, prompts, tmp_path):
    """
    Whether prompts are of one length or not, nothing is asked of the device between two steps. Only diffusers' transformer of
    Qwen-Image makes one number on the device in each call with a mask, by a copy that waits.
    """
    settings = tiny.FAST | FAMILIES[family].settings | {"use_cpu": True, "precompute": True}
    trainer = InstanceDPOTrainer(
        FAMILIES[family].make(),
        args=InstanceDPOConfig(str(tmp_path / "out"), precompute_dir=str(tmp_path / "files"), **settings),
        train_dataset=tiny.pairs(2).remove_columns("prompt").add_column("prompt", prompts),
        peft_config=tiny.lora(),
    )
    rows = [trainer.train_dataset[index] for index in (0, 1)]
    to_meta(trainer)
    micro_batch(trainer, rows)  # makes what stays on the device
    traffic = micro_batch(trainer, rows)
    assert not traffic.waits
    calls = 2 if family == "qwen_image" and prompts[1] == "a red dog" else 0  # of reference and policy
    assert sum(traffic.blocking.values()) == traffic.blocking["as_tensor"] == calls


@pytest.mark.parametrize("family", ["qwen_image", "krea_2"])
def test_the_code_of_a_card_runs(family, tmp_path):
    """A LoRA is drawn by the code on its card, for Qwen-Image with the guidance that its users have, and with a VAE of its own."""
    FAMILIES[family].make().save_pretrained(tmp_path / "base")
    model = load_pipeline(str(tmp_path / "base"))
    model.register_to_config(_name_or_path="user/base")
    settings = tiny.FAST | FAMILIES[family].settings | {"max_steps": 1}
    trainer = InstanceDPOTrainer(
        model,
        args=InstanceDPOConfig(str(tmp_path / "out"), use_cpu=True, **settings),
        train_dataset=tiny.pairs(2),
        peft_config=tiny.lora(4, 8),
    )
    trainer.train()
    trainer.save_model()
    trainer.args.model_init_kwargs = {"vae": "user/vae"}
    trainer.create_model_card()
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert ('true_cfg_scale=4.0, negative_prompt=" "' in code) is (family == "qwen_image")
    for printed, here in (
        ('"user/base"', repr(str(tmp_path / "base"))),
        ('"user/vae"', repr(str(tmp_path / "base" / "vae"))),
        ('"out"', repr(str(tmp_path / "out"))),
        ('.to("cuda")', ""),
        ("width=32", "width=32, num_inference_steps=2, output_type='np'"),
    ):
        assert printed in code
        code = code.replace(printed, here)
    scope = {"torch": torch}
    exec(code, scope)
    assert scope["image"].shape == (32, 32, 3) and scope["image"].std() > 0.01


@pytest.mark.parametrize("family", ["qwen_image", "krea_2"])
def test_an_exported_lora_is_the_same(family, tmp_path):
    """The file for ComfyUI, which knows both families by the names of diffusers, has the strength of each layer in its weights."""
    settings = tiny.FAST | FAMILIES[family].settings | {"max_steps": 1, "learning_rate": 0.1}
    trainer = InstanceDPOTrainer(
        FAMILIES[family].make(),
        args=InstanceDPOConfig(str(tmp_path / "out"), use_cpu=True, **settings),
        train_dataset=tiny.pairs(2),
        peft_config=tiny.lora(4, 8),
    )
    trainer.train()
    trainer.save_model()
    backbone = trainer.backbone
    conditions = backbone.encode_prompts(["a cat"])
    latents, predictions = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for file in (tmp_path / "out", export_lora(tmp_path / "out", tmp_path / "comfyui.safetensors")):
        plain = FAMILIES[family].make()
        plain.load_lora_weights(file)
        with torch.no_grad():
            predictions.append(backbone.predict(plain.transformer, latents, torch.tensor([500.0]), conditions))
    assert torch.equal(*predictions)
    with torch.no_grad():
        base = backbone.predict(FAMILIES[family].make().transformer, latents, torch.tensor([500.0]), conditions)
    assert (predictions[0] - base).abs().max() > 1e-3
    assert all(name.startswith("transformer.") for name in load_file(tmp_path / "comfyui.safetensors"))


def other_names(style: str, module: str) -> str:
    """The name of a layer in files of other trainers."""
    if style == "kohya":
        return f"lora_unet_{module.replace('.', '_')}"
    if style == "krea":
        module = module.replace("transformer_blocks", "blocks").replace("to_out.0", "wo").replace("to_gate", "gate")
        module = module.replace("to_q", "wq").replace("to_k", "wk").replace("to_v", "wv")
    return f"{'transformer' if style == 'transformer' else 'diffusion_model'}.{module}"


@pytest.mark.parametrize(
    ("family", "style", "halves", "alpha"),
    [
        ("qwen_image", "kohya", ("lora_down", "lora_up"), 8.0),
        ("qwen_image", "comfyui", ("lora_A", "lora_B"), 8.0),
        ("qwen_image", "comfyui", ("lora_A", "lora_B"), None),
        ("qwen_image", "transformer", ("lora_A", "lora_B"), None),
        ("krea_2", "krea", ("lora_A", "lora_B"), None),
        ("krea_2", "transformer", ("lora_A", "lora_B"), None),
        ("krea_2", "krea", ("lora_A", "lora_B"), 8.0),
        ("krea_2", "transformer", ("lora_A", "lora_B"), 8.0),
    ],
)
def test_loras_of_other_trainers(family, style, halves, alpha, tmp_path):
    """A file has the strength that it says, as if it were added to the weights, or is refused for what diffusers does not read."""
    plain, merged, generator = FAMILIES[family].make(), FAMILIES[family].make(), torch.Generator().manual_seed(0)
    names, file = load_backbone(FAMILIES[family].make()).lora_target_modules, {}
    for name, layer in merged.transformer.named_modules():
        if not (name.startswith("transformer_blocks.") and name.endswith(names)):
            continue
        down, up = (
            torch.randn(shape, generator=generator) / 5 for shape in ((4, layer.in_features), (layer.out_features, 4))
        )
        layer.weight.data += (alpha or 4.0) / 4 * up @ down
        tensors = dict(zip((f"{half}.weight" for half in halves), (down, up), strict=True))
        tensors |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
        file |= {f"{other_names(style, name)}.{key}": value for key, value in tensors.items()}
    save_file(file, tmp_path / "other.safetensors")
    if family == "krea_2" and alpha is not None:
        with pytest.raises(ValueError, match="as `.alpha`, which diffusers does not read for a `Krea2Pipeline`"):
            load_lora(plain, tmp_path / "other.safetensors", "other")
        return
    load_lora(plain, tmp_path / "other.safetensors", "other")
    backbone = load_backbone(FAMILIES[family].make())
    conditions, timesteps = backbone.encode_prompts(["a cat"]), torch.tensor([500.0])
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        base, loaded, expected = (
            backbone.predict(transformer, latents, timesteps, conditions)
            for transformer in (backbone.denoiser, plain.transformer, merged.transformer)
        )
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=1e-5)
    assert (loaded - base).abs().max() > 1e-2
