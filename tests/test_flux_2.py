# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is particular to FLUX.2: its VAE with statistics, its template, its shift by steps, and which of its pipelines are trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinInpaintPipeline, Flux2KleinKVPipeline, Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from tests import tiny
from tests.families.flux_2 import SHORT, TEMPLATE, flux_2_transformer, flux_2_vae, klein_pipeline, qwen3_encoder
from tests.families.flux_2_dev import flux_2_dev_pipeline, mistral3_encoder
from tests.families.test_laws import predictions
from tests.test_flow_checks import compiled, configure, group_offloading, rebuilt, set_part
from tests.trainer.test_host_traffic import device_is_restored  # noqa: F401
from tests.trainer.waits import micro_batch, to_meta
from trl_diffusion import (
    InstanceDPOConfig,
    InstanceDPOTrainer,
    export_lora,
    negative_preference_guidance,
    sample_images,
)
from trl_diffusion.backbones import Flux2Backbone, Flux2KleinBackbone, load_backbone, load_pipeline
from trl_diffusion.lora_files import load_lora, read_lora
from trl_diffusion.scripts.check_dataset import prompt_fits
from trl_diffusion.trainer.fingerprints import tokenizer_fingerprint
from trl_diffusion.trainer.lora import with_target_modules


LORA = LoraConfig(r=2, target_modules=["to_q"])


def klein_backbone() -> Flux2KleinBackbone:
    backbone = load_backbone(klein_pipeline())
    backbone.configure(SHORT["max_sequence_length"], None)
    return backbone


# ---- Which pipelines ----


@pytest.mark.parametrize(
    "settings", [{}, {"is_distilled": True}, {"shift_terminal": 0.02}, {"use_dynamic_shifting": False}]
)
def test_what_is_accepted(settings):
    """Base and distilled, and a tokenizer that counts more tokens than the text encoder has positions, as Qwen's does."""
    backbone = load_backbone(klein_pipeline(**settings))
    assert type(backbone) is Flux2KleinBackbone
    encoder, tokenizer = backbone.pipeline.text_encoder, backbone.pipeline.tokenizer
    assert tokenizer.model_max_length > encoder.config.max_position_embeddings
    assert backbone.sampling_defaults(backbone.pipeline.config) == (
        {"guidance_scale": 1.0, "num_inference_steps": 4} if settings.get("is_distilled") else {}
    )


@pytest.mark.parametrize("other", [Flux2KleinKVPipeline, Flux2KleinInpaintPipeline])
def test_pipelines_of_other_tasks_are_refused(other):
    """Editing with cached references and inpainting are other classes of diffusers, and are called so."""
    parts = klein_pipeline().components
    with pytest.raises(ValueError, match=f"`model` is a `{other.__name__}`, a family that is not supported yet"):
        load_backbone(other(**parts))


def broken_statistics(pipeline):
    pipeline.vae.bn.running_var[3] = -1.0


def nan_statistics(pipeline):
    pipeline.vae.bn.running_mean[3] = float("nan")


def other_patches(pipeline):
    vae = pipeline.vae
    return type(vae)(**{**vae.config, "patch_size": (1, 1)})


def encoder(layers: int, hidden_size: int = 8):
    return lambda pipeline: qwen3_encoder(1000, layers, hidden_size)


CASES = [
    *((set_part(**{name: None}), f"`{name}` is None") for name in ("scheduler", "transformer", "vae", "text_encoder", "tokenizer")),
    (configure("scheduler", invert_sigmas=True), "`scheduler.config.invert_sigmas` is True"),
    (configure("scheduler", num_train_timesteps=500), "divides timesteps by 1000"),
    (lambda p: p.transformer.add_adapter(LORA), "`transformer` carries LoRA adapters"),
    (compiled, "`transformer` is compiled"),
    (group_offloading, "`transformer` has hooks of diffusers"),
    (lambda p: p.transformer.fuse_qkv_projections(), "fused|Fused"),
    (lambda p: p.transformer.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor()), "Flux2KVAttnProcessor"),
    (set_part(transformer=lambda p: tiny.flux_pipeline().transformer), "`transformer` is a `FluxTransformer2DModel`"),
    (
        set_part(transformer=lambda p: rebuilt(p, in_channels=32, out_channels=16)),
        "`transformer.config.in_channels` is 32 and `out_channels` is 16",
    ),
    (set_part(transformer=lambda p: rebuilt(p, in_channels=32)), "`latent_channels=4`, and `transformer` takes patches of 32 channels"),
    (set_part(transformer=lambda p: rebuilt(p, joint_attention_dim=32)), "`transformer.config.joint_attention_dim` is 32, and 3 layers of .* give 24"),
    (set_part(text_encoder=encoder(28, hidden_size=16)), "`transformer.config.joint_attention_dim` is 24, and 3 layers of .* give 48"),
    (set_part(text_encoder=encoder(26)), "`text_encoder` has 26 layers, but a `Flux2KleinPipeline` takes what the layers 9, 18, 27"),
    (set_part(text_encoder=lambda p: p.text_encoder.model), "`text_encoder` is a `Qwen3Model`, but .* by a `Qwen3ForCausalLM`"),
    (lambda p: p.tokenizer.add_tokens("<mine>"), "`tokenizer` has .* tokens were added"),
    (lambda p: setattr(p.tokenizer, "chat_template", None), "`tokenizer.chat_template` is None"),
    (lambda p: setattr(p.tokenizer, "pad_token", None), "`tokenizer.pad_token` is None"),
    (set_part(vae=lambda p: tiny.flow_vae()), "`vae` is a `AutoencoderKL`, but a `Flux2KleinPipeline` scales"),
    (set_part(vae=lambda p: type(p.vae)(**{**p.vae.config, "latent_channels": 8})), "`latent_channels=8`, and"),
    (set_part(vae=lambda p: type(p.vae)(**{**p.vae.config, "in_channels": 4})), "`in_channels=4`, "),
    (set_part(vae=other_patches), r"`vae.config.patch_size` is .1, 1., for which `vae.bn` has statistics of 4 channels"),
    (set_part(vae=lambda p: flux_2_vae((8, 8))), "`vae` has `block_out_channels=.* and `pipeline.vae_scale_factor` is 4"),
    (broken_statistics, "`vae.bn` has statistics that are not finite, or variances that are not positive"),
    (nan_statistics, "`vae.bn` has statistics that are not finite"),
    *((configure("vae", **{key: 0.5}), f"`vae.config.{key}` is 0.5") for key in ("scaling_factor", "shift_factor")),
    *((configure("vae", **{key: [0.5] * 4}), f"`vae.config.{key}`") for key in ("latents_mean", "latents_std")),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CASES)
def test_what_is_refused(change, message):
    """One thing is changed; the error names it. Without the change the same pipeline is trained."""
    pipeline = klein_pipeline()
    load_backbone(pipeline)
    change(pipeline)
    with pytest.raises(ValueError, match=f"This model cannot be trained: (?s:.*)({message})"):
        load_backbone(pipeline)


def other_statistics(pipeline):
    pipeline.vae.bn.running_mean[0] += 0.1


def other_template(pipeline):
    pipeline.tokenizer.chat_template = TEMPLATE.replace("think", "cat")


def test_references():
    """Other weights of the transformer fit; another text encoder, other statistics of the VAE, or guidance do not."""
    backbone, reference = klein_backbone(), klein_pipeline()
    reference.transformer = flux_2_transformer(24)
    reference.vae.to(torch.bfloat16)  # the statistics too
    backbone.check_reference(reference)
    for change, message in (
        (other_statistics, "its `vae.bn.running_mean` has other values"),
        (configure("vae", batch_norm_eps=1e-2), "its `vae.config.batch_norm_eps` is 0.01"),
        (configure("transformer", guidance_embeds=True), "its `transformer.config.guidance_embeds` is True"),
        (other_template, "its `tokenizer` is another one"),
        (set_part(text_encoder=encoder(28)), "its `text_encoder` has other weights"),
        (set_part(vae=lambda p: flux_2_vae()), "its `vae` encodes images to other latents|its `vae.bn"),
        (set_part(transformer=lambda p: backbone.denoiser), "has the weights that are trained"),
    ):
        other = klein_pipeline()
        change(other)
        with pytest.raises(ValueError, match=f"`ref_model` does not fit the policy: .*{message}"):
            backbone.check_reference(other)


# ---- Latents ----


def test_latents_are_patches_in_the_order_of_the_pipeline():
    """By hand: channel 4 c + 2 i + j of a patch is channel c at (2 y + i, 2 x + j), minus its mean, by its deviation."""
    backbone = klein_backbone()
    vae, images = backbone.pipeline.vae, torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        plain = vae.encode(images).latent_dist
        mean, std = backbone.encode_images(images)
    assert mean.shape == std.shape == (1, 16, 4, 6)
    for channel, row, column, y, x in ((0, 0, 0, 0, 0), (1, 0, 1, 2, 3), (2, 1, 0, 3, 5), (3, 1, 1, 1, 4)):
        place = 4 * channel + 2 * row + column
        deviation = (vae.bn.running_var[place] + 1e-4).sqrt()
        value, spread = (each[0, channel, 2 * y + row, 2 * x + column] for each in (plain.mean, plain.std))
        assert mean[0, place, y, x] == pytest.approx(
            ((value - vae.bn.running_mean[place]) / deviation).item(), abs=1e-5
        )
        assert std[0, place, y, x] == pytest.approx((spread / deviation).item(), abs=1e-5)


def test_sizes():
    """A latent is a patch of 16 pixels here 8: masks have its grid, images are multiples of it, and the default is the pipeline's."""
    backbone = klein_backbone()
    assert (backbone.vae_scale_factor, backbone.size_multiple, backbone.latent_channels) == (8, 8, 16)
    assert backbone.default_resolution == 512  # 128 times the 4 of a tiny VAE: 1024 with a real one
    with pytest.raises(ValueError, match="`resolution` is 36, which is no multiple of 8"):
        backbone.check_resolution(36)


def test_the_shift_is_the_one_of_50_steps():
    """The line through the two empirical ones, by hand, at 1024 and at 4300 patches and more, and not that of a few steps."""
    backbone = klein_backbone()
    at_10, at_200 = 8.73809524e-05 * 1024 + 1.89833333, 0.00016927 * 1024 + 0.45666666
    assert backbone.shift_for(1024) == pytest.approx(at_10 + (at_200 - at_10) * (50 - 10) / 190, abs=1e-9)
    assert backbone.shift_for(5000) == pytest.approx(0.00016927 * 5000 + 0.45666666, abs=1e-9)
    assert abs(backbone.shift_for(1024) - at_10) > 0.2


# ---- Prompts ----


def test_prompts_stand_in_a_template_and_are_padded():
    """A prompt fits with the template around it or not; what does not fit is cut; padding counts, so that it is there for all."""
    backbone, tokenizer = klein_backbone(), klein_pipeline().tokenizer
    around = len(tokenizer(backbone.templated(tokenizer, "")).input_ids)
    # <|im_start|> user \n <|im_end|> \n <|im_start|> assistant \n <think> \n \n </think> \n \n
    assert around == 3 + 2 + 3 + 3 + 2 + 4 + 2 and "<think>" in backbone.templated(tokenizer, "")
    longest = " ".join(["cat"] * (40 - around))
    assert backbone.fits(longest) and not backbone.fits(f"{longest} cat")
    with torch.no_grad():
        whole, more, cut, cut_too = backbone.encode_prompts(
            [longest, f"{longest} cat", f"{longest} {longest}", f"{longest} {longest} dog"]
        )["prompt_embeds"]
    assert whole.shape == (40, 24)
    assert not torch.equal(whole, more) and torch.equal(cut, cut_too)
    backbone.configure(48, None)
    with torch.no_grad():
        assert backbone.encode_prompts(["cat"])["prompt_embeds"].shape == (1, 48, 24)


def test_the_template_must_fit():
    """With fewer tokens than the template has all prompts would be one."""
    backbone = load_backbone(klein_pipeline())
    with pytest.raises(
        ValueError, match="`max_sequence_length` is 18, and the text around a prompt alone has more tokens"
    ):
        backbone.configure(18, None)
    backbone.configure(19, None)


def test_check_dataset_counts_with_the_template(tmp_path):
    """`check-dataset` finds the prompts that do not fit into the 512 tokens of the pipeline's call."""
    klein_pipeline().save_pretrained(tmp_path)
    fits = prompt_fits(str(tmp_path))
    around = len(klein_pipeline().tokenizer(Flux2KleinBackbone.templated(klein_pipeline().tokenizer, "")).input_ids)
    longest = " ".join(["cat"] * (512 - around))
    assert fits(longest) and not fits(f"{longest} cat")


def test_cached_prompts_belong_to_a_template():
    """What is around a prompt, and the side that is padded, change its embeddings, so that a cache of other ones is not used."""
    plain, other, left = klein_pipeline().tokenizer, klein_pipeline().tokenizer, klein_pipeline().tokenizer
    other.chat_template = TEMPLATE.replace("think", "cat")
    left.padding_side = "left"
    hashes = [tokenizer_fingerprint(each) for each in (plain, klein_pipeline().tokenizer, other, left)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


# ---- The VAE by its name, files ----


def test_another_vae_by_its_name(tmp_path):
    """The VAE of a folder or of a pipeline, statistics and all; a VAE of another kind, or a file, is refused."""
    klein_pipeline().save_pretrained(tmp_path / "base")
    other = klein_pipeline(seed=3)
    other.save_pretrained(tmp_path / "whole")
    other.vae.save_pretrained(tmp_path / "vae")
    tiny.vae().save_pretrained(tmp_path / "plain")
    for load in (lambda vae: load_backbone(str(tmp_path / "base"), vae=vae).pipeline, lambda vae: load_pipeline(str(tmp_path / "base"), vae=vae)):  # fmt: skip
        for name in ("whole", "vae"):
            loaded = load(tmp_path / name).vae
            assert tiny.max_difference(tiny.weights(loaded), tiny.weights(other.vae)) == 0
    weights = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(weights, tmp_path / "vae.safetensors")
    del weights["bn.running_mean"]
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_text((tmp_path / "vae" / "config.json").read_text())
    save_file(weights, tmp_path / "part" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    for name, message in (
        ("plain", "a `AutoencoderKL`. Pass an `AutoencoderKLFlux2`"),
        ("vae.safetensors", "diffusers reads no `AutoencoderKLFlux2` out of one. Pass its folder"),
        ("part", "missing.*: bn.running_mean"),
    ):
        with pytest.raises(ValueError, match=message):
            load_backbone(str(tmp_path / "base"), vae=tmp_path / name)
    tiny.sd_pipeline().save_pretrained(tmp_path / "sd")
    with pytest.raises(ValueError, match="a `AutoencoderKLFlux2`. Pass an `AutoencoderKL`"):
        load_pipeline(str(tmp_path / "sd"), vae=tmp_path / "vae")


def test_a_single_file_is_refused(tmp_path):
    """A transformer in the layout of the original code, and the way out."""
    save_file({"single_stream_modulation.lin.weight": torch.ones(2, 2)}, tmp_path / "klein.safetensors")
    with pytest.raises(
        ValueError, match="holds a transformer of FLUX.2.* Pass the folder or the Hub id of the whole pipeline"
    ):
        load_backbone(tmp_path / "klein.safetensors")


def test_a_tied_text_encoder_is_loaded_once(tmp_path, monkeypatch):
    """Its head is its embeddings, and not in the file; the 8 GB are not read again to learn that."""
    klein_pipeline().save_pretrained(tmp_path)
    assert not any("lm_head" in key for key in load_file(tmp_path / "text_encoder" / "model.safetensors"))
    loaded, kind = [], type(klein_pipeline().text_encoder)
    own = kind.from_pretrained.__func__
    monkeypatch.setattr(kind, "from_pretrained", classmethod(lambda *args, **kw: loaded.append(1) or own(*args, **kw)))
    load_pipeline(str(tmp_path))
    assert len(loaded) == 1


# ---- Trainings ----


def trainer_of(model, folder: Path, **settings) -> InstanceDPOTrainer:
    args = InstanceDPOConfig(
        str(folder), use_cpu=True, **tiny.FAST | SHORT | {"resolution": 32, "num_inference_steps": 2} | settings
    )
    return InstanceDPOTrainer(model, args=args, train_dataset=tiny.pairs(2), peft_config=tiny.lora(4, 8))


def test_a_lora_adapts_all_attention(tmp_path):
    """
    The projections of both streams of double blocks, and in a single block its two layers, which also hold its feed-forward network:
    the export names them as diffusers does, and diffusers reads it back.
    """
    trainer = trainer_of(klein_pipeline(), tmp_path, learning_rate=0.05)
    adapted = {name.partition(".lora_A")[0].removeprefix("base_model.model.") for name, _ in trainer.policy.named_parameters() if "lora_A" in name}  # fmt: skip
    double = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    assert adapted == {f"transformer_blocks.0.attn.{name}" for name in double} | {
        f"single_transformer_blocks.{block}.attn.{name}" for block in (0, 1) for name in ("to_qkv_mlp_proj", "to_out")
    }
    trainer.train()
    trainer.save_model()
    exported = export_lora(tmp_path, tmp_path / "comfy.safetensors")
    assert {key.split(".")[0] for key in load_file(exported)} == {"transformer"}
    drawn = []
    for file in (tmp_path / "pytorch_lora_weights.safetensors", exported):
        pipeline = klein_pipeline()
        pipeline.load_lora_weights(tmp_path, weight_name=file.name)
        drawn.append(predictions(trainer.backbone, pipeline.transformer))
    assert torch.equal(*drawn)  # alpha / r is 2
    assert (drawn[0] - predictions(trainer.backbone, klein_pipeline().transformer)).abs().max() > 1e-3


BLOCKS_OF_BFL = {
    "attn.to_q": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}


def lora_of_bfl(
    prefix: str, a: str, b: str, dot: str = "."
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A LoRA on all attention by the names of the original code, and by those of diffusers."""
    original, own, rank = {}, {}, 2

    def add(name: str, modules: list[str], outs: int, ins: int) -> None:
        halves = torch.randn(rank, ins), torch.randn(outs * len(modules), rank)
        name = f"{prefix}{name.replace('.', dot)}"
        original.update({f"{name}.{a}.weight": halves[0], f"{name}.{b}.weight": halves[1]})
        for module, part in zip(modules, halves[1].chunk(len(modules)), strict=True):
            own.update({f"{module}.lora_A.weight": halves[0], f"{module}.lora_B.weight": part})

    for module, name in BLOCKS_OF_BFL.items():
        names = [module.replace("q", letter) for letter in "qkv"] if "qkv" in name else [module]
        add(f"double_blocks.0.{name}", [f"transformer_blocks.0.{each}" for each in names], 16, 16)
    for block in (0, 1):
        add(f"single_blocks.{block}.linear1", [f"single_transformer_blocks.{block}.attn.to_qkv_mlp_proj"], 144, 16)
        add(f"single_blocks.{block}.linear2", [f"single_transformer_blocks.{block}.attn.to_out"], 16, 64)
    return original, own


@pytest.mark.parametrize("kind", ["ai-toolkit", "kohya"])
def test_loras_by_the_names_of_the_original_code(tmp_path, kind):
    """What other trainers write, with one layer for three projections: all of it is loaded, with its alpha, to be sampled and trained on."""
    names = (
        ("diffusion_model.", "lora_A", "lora_B")
        if kind == "ai-toolkit"
        else ("lora_unet_", "lora_down", "lora_up", "_")
    )
    torch.manual_seed(0)
    original, own = lora_of_bfl(*names)
    scale = 1.0
    if kind == "kohya":
        scale, modules = 0.5, {key.split(".")[0] for key in original}
        original |= {f"{module}.alpha": torch.tensor(1.0) for module in modules}  # of rank 2
    save_file(original, tmp_path / "lora.safetensors")
    pipeline = klein_pipeline()
    load_lora(pipeline, tmp_path / "lora.safetensors", "its")
    layers = {name: layer for name, layer in pipeline.transformer.named_modules() if isinstance(layer, LoraLayer)}
    assert layers.keys() == {key.rpartition(".lora_")[0] for key in own}
    for name, layer in layers.items():
        expected = scale * own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"]
        torch.testing.assert_close(layer.get_delta_weight("its"), expected)
    if kind == "kohya":
        weights, config = read_lora(tmp_path / "lora.safetensors", klein_pipeline(), "transformer")
        assert weights.keys() == {f"base_model.model.{key}" for key in own} and config.lora_alpha == config.r == 2


def test_samples_before_a_mixed_precision_training(tmp_path):
    """The policy is not prepared yet, so that latents are in bfloat16; the VAE decodes them in float32, and is as it was afterwards."""
    klein_pipeline().save_pretrained(tmp_path / "pipeline")
    trainer = trainer_of(str(tmp_path / "pipeline"), tmp_path / "output", bf16=True)
    assert trainer.policy.get_base_model().dtype == torch.bfloat16
    (image,) = trainer.sample(["a cat"])
    assert image.size == (32, 32) and "decode" not in vars(trainer.backbone.pipeline.vae)


def test_position_ids_are_made_once():
    """For each size and number of tokens; a prediction of one size is not that of another's positions."""
    backbone, size = klein_backbone(), (4, 6)
    conditions = backbone.encode_prompts(["a cat", "a dog"])
    calls = []
    backbone.denoiser.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        for shape in (size, size[::-1], size):
            backbone.predict(backbone.denoiser, torch.randn(2, 16, *shape), torch.tensor([1.0, 500.0]), conditions)
    assert len(backbone.position_ids) == 2 and calls[0]["img_ids"] is calls[2]["img_ids"]
    assert calls[0]["img_ids"].tolist() == [[0, y, x, 0] for y in range(4) for x in range(6)]
    assert calls[1]["img_ids"].tolist() == [[0, y, x, 0] for y in range(6) for x in range(4)]
    assert calls[0]["txt_ids"].tolist() == [[0, 0, 0, place] for place in range(40)]
    assert calls[0]["guidance"] is None


def test_the_cards_code_runs(tmp_path, monkeypatch):
    """Its first argument is an image in these pipelines, so that the prompt is named; another VAE is of its own class."""
    klein_pipeline().save_pretrained(tmp_path / "base")
    klein_pipeline(seed=3).vae.save_pretrained(tmp_path / "vae")
    trainer = trainer_of(
        str(tmp_path / "base"), tmp_path / "out", max_steps=1, model_init_kwargs={"vae": str(tmp_path / "vae")}
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    for written, here in (('("base"', f'("{tmp_path}/base"'), ("another VAE", tmp_path / "vae"), ('"out"', f'"{tmp_path}/out"')):  # fmt: skip
        code = code.replace(written, str(here))
    scope = {}
    exec(code.replace('.to("cuda")', "").replace("torch.bfloat16", "torch.float32"), scope)
    assert scope["image"].size == (32, 32) and type(scope["vae"]).__name__ == "AutoencoderKLFlux2"


@pytest.mark.usefixtures("device_is_restored")
def test_a_micro_batch_waits_for_no_result(tmp_path):
    """With prompts encoded before the training, that is: to encode one, transformers asks the device whether there is padding."""
    trainer = trainer_of(klein_pipeline(), tmp_path, precompute=True, precompute_dir=str(tmp_path / "files"))
    rows = [trainer.train_dataset[index] for index in (0, 1)]
    to_meta(trainer)
    micro_batch(trainer, rows)  # makes what stays on the device: positions
    traffic = micro_batch(trainer, rows)
    assert not traffic.waits and not traffic.blocking


def test_klein_4b_at_its_true_size():
    """Shapes, the number of weights and that of a LoRA, and the operations of a forward for 1024 pixels, without memory."""
    backbone = load_backbone(klein_pipeline())
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=3 * 2560,
            guidance_embeds=False,
        )
        latents, timesteps = torch.randn(1, 128, 64, 64), torch.rand(1)
        conditions = {"prompt_embeds": torch.randn(1, 512, 3 * 2560)}
    backbone.pipeline.transformer = transformer
    with FlopCounterMode(display=False) as operations:
        prediction = backbone.predict(transformer, latents, timesteps, conditions)
    assert prediction.shape == latents.shape
    assert sum(weight.numel() for weight in transformer.parameters()) == 3_875_544_576
    # A layer on n tokens takes two for each of its weights, and attention 4 n^2 x 3072; norms are not counted
    assert operations.get_total_flops() / 1e12 == pytest.approx(34.8, abs=0.05)
    model = get_peft_model(transformer, with_target_modules(LoraConfig(r=64), backbone.lora_target_modules))
    width, inner = 3072, 3 * 3072
    double, single = 8 * 2 * width, (width + 3 * width + 2 * inner) + (width + inner + width)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained == 64 * (5 * double + 20 * single) == 74_711_040


# ---- dev ----


def test_dev_is_told_a_guidance_scale():
    """1 if nothing is said, and what is said changes its prediction; klein is told none."""
    backbone = load_backbone(flux_2_dev_pipeline())
    assert type(backbone) is Flux2Backbone and backbone.embedded_guidance == 1.0
    backbone.configure(SHORT["max_sequence_length"], None)
    one = predictions(backbone, backbone.denoiser)
    backbone.configure(None, 4.0)
    assert (predictions(backbone, backbone.denoiser) - one).abs().max() > 1e-3
    with pytest.raises(ValueError, match="`embedded_guidance` is 4.0, but this `Flux2KleinPipeline` leaves no choice"):
        klein_backbone().configure(None, 4.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_part(text_encoder=encoder(28)), "`text_encoder` is a `Qwen3ForCausalLM`, but .* by a `Mistral3For"),
        (
            set_part(text_encoder=lambda p: mistral3_encoder(1000, 29)),
            "has 29 layers, but a `Flux2Pipeline` takes .* 10, 20, 30",
        ),
        (lambda p: setattr(p.tokenizer, "chat_template", None), "`tokenizer.chat_template` is None"),
        (lambda p: setattr(p.tokenizer.tokenizer, "pad_token", None), "`tokenizer.pad_token` is None"),
        (lambda p: p.tokenizer.tokenizer.add_tokens("<mine>"), "`tokenizer` has .* tokens were added"),
        (lambda p: setattr(p, "system_message", "Draw."), "`pipeline.system_message` is another one"),
        (set_part(vae=lambda p: tiny.flow_vae()), "`vae` is a `AutoencoderKL`, but a `Flux2Pipeline` scales"),
    ],
)
def test_what_is_refused_of_dev(change, message):
    """One thing is changed; the error names it. Without the change the same pipeline is trained."""
    pipeline = flux_2_dev_pipeline()
    load_backbone(pipeline)
    change(pipeline)
    with pytest.raises(ValueError, match=f"This model cannot be trained: (?s:.*)({message})"):
        load_backbone(pipeline)


def test_dev_and_klein_are_no_references_of_each_other():
    with pytest.raises(ValueError, match="it is a `Flux2Pipeline` and the policy is a `Flux2KleinPipeline`"):
        klein_backbone().check_reference(flux_2_dev_pipeline())


def test_prompts_of_dev_fit_with_their_template(tmp_path):
    """Counted by the tokenizer in the processor, in a backbone and by `check-dataset`; a processor has a fingerprint."""
    pipeline = flux_2_dev_pipeline()
    backbone = load_backbone(pipeline)
    backbone.configure(SHORT["max_sequence_length"], None)
    around = len(pipeline.tokenizer.tokenizer(backbone.templated(pipeline.tokenizer, "")).input_ids)
    longest = "cat" + " cat" * (40 - around - 1)
    assert around > 4 and backbone.fits(longest) and not backbone.fits(f"{longest} cat")
    pipeline.save_pretrained(tmp_path)
    fits = prompt_fits(str(tmp_path))
    assert fits(longest + " cat" * 472) and not fits(longest + " cat" * 473)
    other = flux_2_dev_pipeline().tokenizer
    same = tokenizer_fingerprint(other) == tokenizer_fingerprint(pipeline.tokenizer)
    other.chat_template += "."
    assert same and tokenizer_fingerprint(other) != tokenizer_fingerprint(pipeline.tokenizer)


def test_dev_has_no_branch_for_another_preference(tmp_path):
    """Its one call a step is conditional: a second adapter would have no effect, and that is said."""
    trainer = trainer_of(flux_2_dev_pipeline(), tmp_path, max_steps=1)
    trainer.save_model()
    pipeline = flux_2_dev_pipeline()
    pipeline.load_lora_weights(tmp_path, adapter_name="reversed")
    message = "samples without an unconditional branch, so `negative` would have no effect: FLUX.2 dev has none"
    with (
        pytest.raises(ValueError, match=message),
        negative_preference_guidance(pipeline, positive=None, negative="reversed"),
    ):
        pipeline(prompt="a cat", height=32, width=32, num_inference_steps=2, output_type="latent", **SHORT)


def test_a_distilled_model_draws_with_the_loras_of_its_base(tmp_path):
    """Trained on the base, drawn as plain diffusers draws with the distilled model and the saved LoRA: 4 steps, no guidance."""
    for name, pipeline in (("base", klein_pipeline()), ("distilled", klein_pipeline(is_distilled=True))):
        if name == "distilled":
            pipeline.transformer = flux_2_transformer(24)
        pipeline.save_pretrained(tmp_path / name)
    trainer = trainer_of(
        str(tmp_path / "base"),
        tmp_path / "out",
        learning_rate=0.05,
        num_inference_steps=None,
        sample_model=str(tmp_path / "distilled"),
    )
    trainer.train()
    trainer.save_model()
    (ours,) = trainer.sample(["a cat"])
    plain, calls = DiffusionPipeline.from_pretrained(tmp_path / "distilled"), []
    plain.load_lora_weights(tmp_path / "out")
    plain.transformer.register_forward_pre_hook(lambda *args: calls.append(1))
    (theirs,) = sample_images(plain, ["a cat"], trainer.args.seed, num_inference_steps=4, height=32, width=32, **SHORT)
    assert len(calls) == 4
    assert abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
