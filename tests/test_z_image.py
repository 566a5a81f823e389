# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is particular to Z-Image: lists of prompts of several lengths, a chat template, guidance from 0 on, and what is refused."""

import copy

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderTiny, ZImageTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM, Qwen3Model

from tests import tiny
from tests.families.z_image import FAMILY, NUM_TOKENS, TEMPLATE, z_image_pipeline
from tests.trainer.waits import micro_batch, to_meta
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
    export_lora,
)
from trl_diffusion.backbones import ZImageBackbone, backbone_class_of, load_backbone
from trl_diffusion.lora_files import load_lora
from trl_diffusion.scripts.check_dataset import prompt_fits
from trl_diffusion.trainer.fingerprints import tokenizer_fingerprint


# 24, 32, 33 and 59 tokens: the transformer pads to 32 and 64
PROMPTS = ["a cat", "a cat a dog a", "a cat a dog an", "a red circle and a blue square and a dog"]
TEMPLATE_TOKENS = 19
TIMESTEPS = torch.tensor([20.0, 300.0, 700.0, 1000.0])


def z_image_backbone() -> ZImageBackbone:
    backbone = load_backbone(z_image_pipeline())
    backbone.configure(NUM_TOKENS, None)
    return backbone


def latents(num: int = 4) -> torch.Tensor:
    return torch.randn(num, 4, 8, 12, generator=torch.Generator().manual_seed(0))


def training(folder, peft_config=None, num_rows: int = 4, **settings) -> InstanceDPOTrainer:
    settings = tiny.FAST | FAMILY.settings | {"use_cpu": True} | settings
    args = InstanceDPOConfig(str(folder), **settings)
    return InstanceDPOTrainer(
        z_image_pipeline(), args=args, train_dataset=tiny.pairs(num_rows), peft_config=peft_config
    )


# ---- Prompts ----


def test_the_template_is_part_of_the_prompt():
    """Prompts are encoded as messages of a chat, `None` as an empty one; 19 tokens of the limit are the template's."""
    backbone = z_image_backbone()
    conditions = backbone.encode_prompts([*PROMPTS, None])
    lengths = [len(prompt) + TEMPLATE_TOKENS for prompt in [*PROMPTS, ""]]
    assert conditions["prompt_lengths"].tolist() == lengths == [24, 32, 33, 59, 19]
    assert conditions["prompt_embeds"].shape == (5, 59, 16)
    assert backbone.fits("a" * (NUM_TOKENS - TEMPLATE_TOKENS))
    assert not backbone.fits("a" * (NUM_TOKENS - TEMPLATE_TOKENS + 1))
    assert backbone.encode_prompts(["a" * 200])["prompt_lengths"].tolist() == [NUM_TOKENS]


def test_a_dataset_is_checked_with_the_template(tmp_path):
    """`check-dataset` counts the template among the 512 tokens of the pipeline."""
    z_image_pipeline().save_pretrained(tmp_path)
    fits = prompt_fits(str(tmp_path))
    assert fits("a" * (512 - TEMPLATE_TOKENS)) and not fits("a" * (512 - TEMPLATE_TOKENS + 1))


def test_a_list_of_prompts_stays_as_it_is():
    """The pipeline writes the template into the list that it is given, which is not the caller's."""
    prompts = ["a cat", "a dog"]
    z_image_backbone().encode_prompts(prompts)
    assert prompts == ["a cat", "a dog"]


def test_a_template_is_part_of_the_cache():
    """Prompts are encoded anew where the tokenizer writes them into another template."""
    pipeline = z_image_pipeline()
    before = tokenizer_fingerprint(pipeline.tokenizer)
    pipeline.encode_prompt(["a cat"], max_sequence_length=NUM_TOKENS)
    assert tokenizer_fingerprint(pipeline.tokenizer) == before
    pipeline.tokenizer.chat_template = TEMPLATE.replace("assistant", "painter")
    assert tokenizer_fingerprint(pipeline.tokenizer) != before


@pytest.mark.parametrize("autocast", [False, True])
def test_a_batch_predicts_and_learns_what_its_rows_do(autocast):
    """Prediction and gradient of ragged rows together are those of each alone, with activation checkpointing as without."""
    backbone = z_image_backbone()
    conditions, given = backbone.encode_prompts(PROMPTS), latents()
    denoiser, results = backbone.denoiser.train(), []
    for rows, is_checkpointed in [([[0, 1, 2, 3]], False), ([[0, 1, 2, 3]], True), ([[0], [1], [2], [3]], False)]:
        denoiser.gradient_checkpointing = False
        if is_checkpointed:
            denoiser.enable_gradient_checkpointing()
        denoiser.zero_grad()
        predictions = []
        for some in rows:
            own = {name: value[some] for name, value in conditions.items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                prediction = backbone.predict(denoiser, given[some], TIMESTEPS[some], own)
            prediction.float().square().sum().backward()
            predictions.append(prediction.detach().float())
        gradients = torch.cat([weight.grad.flatten() for weight in denoiser.parameters()])
        results.append((torch.cat(predictions), gradients))
    together, checkpointed, alone = results
    assert together[0].shape == given.shape and together[1].abs().max() > 1e-2
    assert all(torch.equal(one, other) for one, other in zip(together, checkpointed, strict=True))
    tolerance = 0.03 if autocast else 1e-5  # bfloat16 rounds by 2^-9, many times over
    for one, other in zip(together, alone, strict=True):
        assert (one - other).norm() <= tolerance * one.norm()


def test_bf16_training_goes_down_to_the_base(tmp_path):
    """A LoRA on a base in bfloat16, with activation checkpointing: gradients arrive in the refiners too."""
    trainer = training(tmp_path, tiny.lora(), bf16=True, activation_checkpointing=True, max_steps=1)
    trainer.train()
    moved = {name for name, weight in trainer.policy.named_parameters() if "lora_B" in name and weight.any()}
    parts = {name.removeprefix("base_model.model.").split(".")[0] for name in moved}
    assert parts == {"layers", "noise_refiner", "context_refiner"}
    assert len(moved) == 4 * (2 + 1 + 1)  # four projections of each block


# ---- Lengths of prompts are on the host ----


@pytest.fixture
def device_is_restored():
    state = dict(AcceleratorState._shared_state)
    yield
    AcceleratorState._shared_state.update(state)


@pytest.mark.usefixtures("device_is_restored")
@pytest.mark.parametrize("settings", [{}, {"noise_source": "inversion", "inversion_steps": 3, "prompt_dropout": 0.5}])
def test_a_micro_batch_waits_for_no_length(tmp_path, settings):
    """Of precomputed prompts, lengths stay on the CPU: no result is asked for, and no copy to the device waits."""
    folder = str(tmp_path / "cache")
    trainer = training(tmp_path, tiny.lora(), precompute=True, precompute_dir=folder, **settings)
    rows = [trainer.train_dataset[index] for index in (0, 1)]
    to_meta(trainer)
    micro_batch(trainer, rows)
    traffic = micro_batch(trainer, rows)
    assert not traffic.waits and not traffic.blocking
    assert traffic.copies["aten._to_copy"] > 0


def test_what_is_precomputed_is_trimmed(tmp_path):
    """A prompt is stored at its own length, and a batch is padded to its longest."""
    trainer = training(tmp_path, precompute=True, precompute_dir=str(tmp_path / "cache"))
    short, long = "a cat and a dog", "a red circle and a blue square"
    cache = trainer.encoder.prompt_cache
    for prompts in ([short], [long], [long, short]):
        tensors = cache[prompts]
        lengths = [len(prompt) + TEMPLATE_TOKENS for prompt in prompts]
        assert tensors["prompt_lengths"].tolist() == lengths
        assert tensors["prompt_embeds"].shape == (len(prompts), max(lengths), 16)


# ---- Guidance ----


def branches_of(pipeline, **arguments) -> list[tuple[int, tuple[str, ...]]]:
    """For each call of the transformer, its number of rows and the branches that it is said to have."""
    noted = []

    def note(module, args):
        x, t, prompts = args
        named = {"x": x, "t": t, "cap_feats": prompts}
        noted.append((len(x), ZImageBackbone.guidance_branches(pipeline, None, named)))

    pipeline.set_progress_bar_config(disable=True)
    hook = pipeline.transformer.register_forward_pre_hook(note)
    settings = {"height": 32, "width": 32, "max_sequence_length": NUM_TOKENS, "output_type": "latent"}
    pipeline(["a cat", "a dog", "a dog"], num_inference_steps=4, **settings, **arguments)
    hook.remove()
    return noted


@pytest.mark.parametrize(
    ("arguments", "guided_calls"),
    [
        ({"guidance_scale": 0.0}, 0),
        ({"guidance_scale": 0.5}, 4),
        ({"guidance_scale": 4.0, "cfg_truncation": 0.2}, 2),
        ({"guidance_scale": 4.0, "cfg_truncation": 0.0}, 1),
        ({"guidance_scale": 4.0, "cfg_truncation": 2.0}, 4),
        ({"guidance_scale": 4.0, "cfg_truncation": None}, 4),
    ],
)
def test_branches_are_those_of_the_call(arguments, guided_calls):
    """
    Guidance begins above 0, where other pipelines begin above 1, and ends after the truncation: of four steps at a shift of 3 the
    times are 0, 0.1, 0.25 and 0.5.
    """
    noted = branches_of(z_image_pipeline(), **arguments)
    both = [rows == 6 for rows, _ in noted]
    assert both == [True] * guided_calls + [False] * (4 - guided_calls)
    assert [len(branches) == 2 for _, branches in noted] == both
    assert {branches for _, branches in noted} <= {("conditional",), ("conditional", "unconditional")}


# ---- What is refused ----


def set_part(**parts):
    """Puts components into a pipeline, each made when the test runs."""

    def change(pipeline):
        for name, make in parts.items():
            setattr(pipeline, name, make(pipeline))

    return change


def rebuilt(**config):
    """Its transformer with another configuration."""
    return set_part(transformer=lambda pipeline: ZImageTransformer2DModel(**{**pipeline.transformer.config, **config}))


def wide_encoder(pipeline):
    config = copy.deepcopy(pipeline.text_encoder.config)
    config.hidden_size = 32
    return Qwen3Model(config)


def fused(pipeline):
    pipeline.transformer.layers[0].attention.fuse_projections()


def other_processor(pipeline):
    pipeline.transformer.layers[0].attention.set_processor(diffusers.models.attention_processor.AttnProcessor2_0())


class OtherTransformer(ZImageTransformer2DModel):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((set_part(**{name: lambda p: None}), f"`{name}` is None") for name in ("scheduler", "transformer", "vae")),
        *((set_part(**{name: lambda p: None}), f"`{name}` is None") for name in ("text_encoder", "tokenizer")),
        (lambda p: p.scheduler.register_to_config(invert_sigmas=True), "`scheduler.config.invert_sigmas` is True"),
        (lambda p: p.scheduler.set_shift(0.0), "`scheduler.config.shift` is 0.0"),
        (lambda p: p.scheduler.register_to_config(num_train_timesteps=500), "divides timesteps by 1000"),
        (set_part(scheduler=lambda p: diffusers.DDIMScheduler()), "`scheduler` is a `DDIMScheduler`"),
        (
            set_part(transformer=lambda p: OtherTransformer(**p.transformer.config)),
            "`transformer` is a `OtherTransformer`, but a `ZImagePipeline` has a `ZImageTransformer2DModel`",
        ),
        (set_part(transformer=lambda p: tiny.flux_pipeline().transformer), "is a `FluxTransformer2DModel`"),
        (
            lambda p: p.transformer.add_adapter(LoraConfig(target_modules=["to_q"])),
            "`transformer` carries LoRA adapters",
        ),
        (set_part(transformer=lambda p: torch.compile(p.transformer)), "`transformer` is compiled"),
        (fused, "`transformer` has fused projections"),
        (other_processor, "`transformer` has attention processors of the kind `AttnProcessor2_0`"),
        (rebuilt(siglip_feat_dim=8), "`transformer.config.siglip_feat_dim` is 8, but it takes images .*Z-Image-Omni"),
        (rebuilt(all_patch_size=(4,)), r"`transformer.config.all_patch_size` is \(4,\)"),
        (rebuilt(all_patch_size=(2, 4), all_f_patch_size=(1, 1)), r"`transformer.config.all_patch_size` is \(2, 4\)"),
        (rebuilt(all_f_patch_size=(2,)), r"`all_f_patch_size` is \(2,\)"),
        (rebuilt(in_channels=8), "`transformer` takes latents of 8 channels"),
        (rebuilt(cap_feat_dim=8), "`transformer.config.cap_feat_dim` is 8, and `text_encoder` gives 16"),
        (set_part(text_encoder=wide_encoder), "`transformer.config.cap_feat_dim` is 16, and `text_encoder` gives 32"),
        (set_part(text_encoder=lambda p: tiny.t5_encoder()), "`text_encoder` is a `T5EncoderModel`, .* `Qwen3Model`"),
        (
            set_part(text_encoder=lambda p: Qwen3ForCausalLM(p.text_encoder.config)),
            "`text_encoder` is a `Qwen3ForCausalLM`, .* Load the model's `Qwen3Model`",
        ),
        (lambda p: p.tokenizer.add_tokens("<mine>"), "`tokenizer` has .* tokens were added"),
        (lambda p: setattr(p.tokenizer, "chat_template", None), "`tokenizer.chat_template` is None"),
        (lambda p: setattr(p.tokenizer, "pad_token", None), "`tokenizer.pad_token` is None"),
        (set_part(vae=lambda p: AutoencoderTiny()), "`vae` is a `AutoencoderTiny`"),
        (lambda p: p.vae.register_to_config(shift_factor=None), "`vae.config.shift_factor` is None"),
        (lambda p: p.vae.register_to_config(scaling_factor=0), "`vae.config.scaling_factor` is 0"),
        (lambda p: p.vae.register_to_config(latents_mean=[0.5] * 4), "`vae.config.latents_mean`"),
    ],
)
def test_what_is_refused(change, message):
    """One thing is changed; the error names it. Without the change the same pipeline is trained."""
    pipeline = z_image_pipeline()
    assert type(load_backbone(pipeline)) is ZImageBackbone
    change(pipeline)
    with pytest.raises(ValueError, match=f"This model cannot be trained: (?s:.*)({message})"):
        load_backbone(pipeline)


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint", "Omni", "ControlNet", "ControlNetInpaint"])
def test_pipelines_of_other_tasks_are_refused_by_name(kind):
    name = f"ZImage{kind}Pipeline"
    pipeline = object.__new__(getattr(diffusers, name))
    with pytest.raises(
        ValueError, match=f"`model` is a `{name}`, a family that is not supported yet.*`ZImagePipeline`"
    ):
        backbone_class_of(pipeline)


@pytest.mark.parametrize(("resolution", "message"), [(34, "no multiple of 4"), (36, "no multiple of 8"), (32, None)])
def test_resolutions_are_whole_patches(resolution, message):
    backbone = z_image_backbone()
    assert backbone.default_resolution == 1024
    if message is None:
        assert backbone.check_resolution(resolution) == resolution
        return
    with pytest.raises(ValueError, match=f"`resolution` is {resolution}, which is {message}"):
        backbone.check_resolution(resolution)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_part(transformer=lambda p: z_image_pipeline(seed=1).transformer), None),
        (set_part(scheduler=lambda p: tiny.flow_scheduler(shift=6.0)), None),
        (set_part(scheduler=lambda p: tiny.flow_scheduler(num_train_timesteps=500)), "num_train_timesteps` is 500"),
        (set_part(text_encoder=lambda p: z_image_pipeline(seed=1).text_encoder), "`text_encoder` has other weights"),
        (lambda p: setattr(p.tokenizer, "chat_template", TEMPLATE + "a"), "its `tokenizer` is another one"),
        (rebuilt(cap_feat_dim=8), "`transformer.config.cap_feat_dim` is 8"),
        (lambda p: p.vae.register_to_config(shift_factor=0.2), "`vae.config.shift_factor` is 0.2"),
    ],
)
def test_references(change, message):
    """Other weights of the transformer and another shift fit: Z-Image and its Turbo. Other prompts or latents do not."""
    backbone, reference = z_image_backbone(), z_image_pipeline()
    change(reference)
    if message is None:
        backbone.check_reference(reference)
        return
    with pytest.raises(ValueError, match=f"`ref_model` does not fit the policy: .*{message}"):
        backbone.check_reference(reference)


def test_single_files_are_refused_by_name(tmp_path):
    """A file does not tell Z-Image from its Turbo, whose schedules have different shifts."""
    weights = {
        f"model.diffusion_model.{name}": weight for name, weight in z_image_pipeline().transformer.state_dict().items()
    }
    save_file(weights, tmp_path / "z_image.safetensors")
    with pytest.raises(ValueError, match="holds a model of the kind 'z-image-turbo'.*A single file must hold"):
        load_backbone(str(tmp_path / "z_image.safetensors"))


# ---- LoRA ----


def lora_of(folder, **config) -> InstanceDPOTrainer:
    """A trained LoRA in a folder."""
    trainer = training(folder, LoraConfig(r=4, lora_alpha=12, **config), learning_rate=0.05)
    trainer.train()
    trainer.save_model()
    return trainer


@torch.no_grad()
def prediction(pipeline) -> torch.Tensor:
    backbone = z_image_backbone()
    return backbone.predict(pipeline.transformer.eval(), latents(), TIMESTEPS, backbone.encode_prompts(PROMPTS))


def test_an_exported_lora_is_the_lora(tmp_path):
    """For ComfyUI the scale of 3 is in the weights; what diffusers reads is the same up to rounding."""
    lora_of(tmp_path / "lora")
    before, after, base = z_image_pipeline(), z_image_pipeline(), z_image_pipeline()
    before.load_lora_weights(tmp_path / "lora")
    exported = export_lora(tmp_path / "lora", tmp_path / "comfy.safetensors")
    assert {key.split(".")[0] for key in load_file(exported)} == {"transformer"}
    after.load_lora_weights(tmp_path, weight_name="comfy.safetensors")
    assert (prediction(before) - prediction(base)).abs().max() > 1e-3
    torch.testing.assert_close(prediction(after), prediction(before), atol=1e-5, rtol=1e-5)


def test_a_lora_of_another_library_is_trained_on(tmp_path):
    """kohya's names, with the strength of each layer in a tensor: loaded, and as the start of a training."""
    lora_of(tmp_path / "lora")
    expected, other = z_image_pipeline(), z_image_pipeline()
    expected.load_lora_weights(tmp_path / "lora")
    weights = {}
    for key, value in load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors").items():
        module, half = key.removeprefix("transformer.").rsplit(".lora_", 1)
        name = f"lora_unet_{module.replace('.', '_')}"
        weights[f"{name}.lora_{'down' if half == 'A.weight' else 'up'}.weight"] = value
        weights[f"{name}.alpha"] = torch.tensor(12.0)
    path = tmp_path / "kohya.safetensors"
    save_file(weights, path)
    load_lora(other, path, "default")
    torch.testing.assert_close(prediction(other), prediction(expected), atol=1e-5, rtol=1e-5)
    trainer = training(tmp_path / "next", initial_lora=str(path), initial_lora_in_reference=True)
    torch.testing.assert_close(prediction(expected), prediction_of(trainer), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def prediction_of(trainer: InstanceDPOTrainer) -> torch.Tensor:
    backbone = z_image_backbone()
    return backbone.predict(trainer.policy.eval(), latents(), TIMESTEPS, backbone.encode_prompts(PROMPTS))


def test_an_expert_on_the_embedders_is_refused(tmp_path):
    """They are given the tokens of all rows in one sequence, of which no slice belongs to the expert's rows."""
    (tmp_path / "tree.yaml").write_text(tiny.CRITERIA)
    settings = tiny.FAST | FAMILY.settings | {"criteria": str(tmp_path / "tree.yaml"), "use_cpu": True}
    expert = AttributeSFTTrainer(
        z_image_pipeline(),
        args=AttributeSFTConfig(str(tmp_path / "expert"), **settings),
        train_dataset=tiny.paintings(),
        peft_config=LoraConfig(r=2, target_modules=["to_q", "cap_embedder.1"]),
    )
    trainer = ComplexPOTrainer(
        z_image_pipeline(),
        expert,
        args=ComplexPOConfig(str(tmp_path / "cpo"), **settings),
        train_dataset=tiny.paintings(),
        peft_config=tiny.lora(),
    )
    with pytest.raises(
        ValueError, match="The LoRA 'expert' adapts `cap_embedder.1`, which is given the tokens of all rows"
    ):
        trainer.train()


# ---- True size ----


def test_the_true_size_on_no_memory():
    """
    Z-Image in bfloat16 on tensors without memory: 6.15 billion weights, and prompts of four lengths at 1024x768 pixels give a
    prediction for each.
    """
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel().to(torch.bfloat16)
    dim, hidden, head, time = 3840, 10240, 128, 256
    block = 4 * dim**2 + 3 * dim * hidden + 4 * dim + 2 * head
    modulation = time * 4 * dim + 4 * dim
    blocks = 34 * block + 32 * modulation  # the two of the prompt have none
    embedders = (64 + 1) * dim + 2560 + (2560 + 1) * dim + 2 * dim
    times = (256 + 1) * 1024 + (1024 + 1) * time
    last = (time + 1) * dim + (dim + 1) * 64
    assert sum(p.numel() for p in transformer.parameters()) == blocks + embedders + times + last == 6_154_908_736

    backbone = z_image_backbone()
    conditions = {
        "prompt_embeds": torch.empty(4, 512, 2560, dtype=torch.bfloat16, device="meta"),
        "prompt_lengths": torch.tensor([19, 100, 128, 512]),
    }
    given = torch.empty(4, 16, 128, 96, dtype=torch.bfloat16, device="meta")
    tokens = []
    transformer.layers[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape))
    with torch.no_grad():
        predicted = backbone.predict(transformer, given, torch.empty(4, device="meta"), conditions)
    assert predicted.shape == given.shape and predicted.dtype == torch.bfloat16
    assert tokens == [(4, 64 * 48 + 512, dim)]
