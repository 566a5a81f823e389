# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is particular to Sana: its instruction and its lengths, its scheduler and its VAE, and what is refused."""

import copy

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2ForCausalLM

from tests import tiny
from tests.families.sana import SHORT, dpm_solver, sana_pipeline
from tests.test_process import chi_squared
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, export_lora
from trl_diffusion.backbones import load_backbone
from trl_diffusion.backbones.sana import INSTRUCTION, SanaBackbone, is_token
from trl_diffusion.evaluation.generate import further_settings
from trl_diffusion.evaluation.protocols import Protocol
from trl_diffusion.scripts.check_dataset import prompt_fits


LONG = "a red circle and a blue square and a dog and a cat and a red square and a blue dog"


def backbone_of(max_sequence_length: int = 16, **settings) -> SanaBackbone:
    pipeline = sana_pipeline(**settings)
    pipeline.set_progress_bar_config(disable=True)
    backbone = load_backbone(pipeline)
    backbone.configure(max_sequence_length, None)
    return backbone


# ---- Prompts ----


def test_prompts_are_those_of_the_pipeline():
    """
    Embeddings of prompts up to their last token, and the number of tokens, are the pipeline's by its mask: behind the instruction,
    in small letters, cut off at the limit; without the instruction where the prompt is dropped. The instruction's
    last blank is in the first token of the prompt, so that twelve tokens are the first and eleven words.
    """
    backbone = backbone_of(12)
    prompts = ["", "a", "A Red CIRCLE ", "a cat and a dog", LONG]
    found = backbone.encode_prompts([*prompts, None])
    embeds, mask, negative, negative_mask = backbone.pipeline.encode_prompt(
        prompts, negative_prompt="", max_sequence_length=12, complex_human_instruction=INSTRUCTION
    )
    embeds, mask = torch.cat([embeds, negative[:1]]), torch.cat([mask, negative_mask[:1]])
    assert found["prompt_lengths"].tolist() == mask.sum(1).tolist() == [2, 2, 4, 6, 12, 1]
    assert torch.equal(is_token(found["prompt_lengths"], found["prompt_embeds"]), mask.bool())
    torch.testing.assert_close(found["prompt_embeds"], embeds * mask[:, :, None], atol=1e-6, rtol=1e-6)
    without = backbone.embed(prompts[1:3], None)
    assert (found["prompt_embeds"][1:3, :3] - without[:, :3]).abs().max() > 0.1, "the instruction makes no difference"


def test_the_limit_is_counted_in_tokens_behind_the_instruction():
    """A prompt fits as long as its end changes what the transformer is given."""
    backbone = backbone_of(12)
    words = LONG.split()
    for number in range(1, len(words)):
        prompt = " ".join(words[:number])
        changed = " ".join([*words[: number - 1], "cat" if words[number - 1] != "cat" else "dog"])
        first, second = (backbone.encode_prompts([each])["prompt_embeds"] for each in (prompt, changed))
        is_read = first.shape != second.shape or (first - second).abs().max() > 1e-3
        assert backbone.fits(prompt) == is_read
    assert backbone.fits(" ".join(words[:11])) and not backbone.fits(" ".join(words[:12]))


def test_the_instruction_is_the_pipelines():
    """Eight lines that end where the prompt begins; without a limit of its own, training has the pipeline's 300 tokens."""
    assert len(INSTRUCTION) == 8 and INSTRUCTION[-1] == "User Prompt: "
    backbone = load_backbone(sana_pipeline())
    assert backbone.max_sequence_length == 300 and backbone.prompt_limits == {"tokenizer": 300}
    assert backbone.sampling_settings == {"max_sequence_length": 300, "use_resolution_binning": False}


def test_a_check_of_a_dataset_counts_as_the_training(tmp_path):
    """`check-dataset` loads the tokenizer alone, and counts behind the instruction, up to the pipeline's 300 tokens."""
    pipeline = sana_pipeline()
    pipeline.save_pretrained(tmp_path)
    fits, backbone = prompt_fits(str(tmp_path)), load_backbone(pipeline)
    for prompt, expected in ((" ".join(["cat"] * 299), True), (" ".join(["cat"] * 300), False)):
        assert fits(prompt) == backbone.fits(prompt) == expected


# ---- Times ----


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_the_time_is_scaled_once(scale):
    """The transformer is given the time by its `timestep_scale`, which the pipeline applies outside of it."""
    backbone, given = backbone_of(), []
    backbone.denoiser.register_to_config(timestep_scale=scale)
    backbone.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["timestep"]), with_kwargs=True
    )
    backbone.pipeline(
        "a cat", height=32, width=32, num_inference_steps=2, guidance_scale=1.0, **backbone.sampling_settings
    )
    times = backbone.pipeline.scheduler.timesteps
    conditions = backbone.encode_prompts(["a cat"])
    for time in times:
        backbone.predict(backbone.denoiser, torch.zeros(1, 8, 8, 8), time.expand(1), conditions)
    assert len(given) == 4 and given[0] == given[2] == times[0] * scale and given[1] == given[3] == times[1] * scale


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_both_schedulers_give_the_same_times(shift):
    """A `flow_shift` of DPM-Solver and the `shift` of the Euler scheduler are one law: the same times are sampled."""
    keys = [(0, 0, f"row-{index}") for index in range(4000)]
    dpm, euler = (
        backbone_of(**settings).process.sample_timesteps(keys, (8, 8))
        for settings in ({"flow_shift": shift}, {"scheduler": FlowMatchEulerDiscreteScheduler, "shift": shift})
    )
    torch.testing.assert_close(dpm, euler)
    assert (chi_squared(dpm, dpm / 1000) > 5) == (shift != 1.0)


# ---- Latents and sizes ----


def test_latents_have_no_deviation():
    """An `AutoencoderDC` has no posterior: the latents are what it encodes to, by its scale."""
    backbone = backbone_of()
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = backbone.encode_images(images)
        expected = backbone.pipeline.vae.encode(images).latent
    torch.testing.assert_close(mean, expected * 1.5)
    assert mean.shape == std.shape == (2, 8, 8, 16) and not std.any()


@pytest.mark.parametrize(
    ("resolution", "message"), [(34, "no multiple of 4"), (48, "no multiple of 32"), (96, None), (None, None)]
)
def test_resolutions_are_those_that_the_pipeline_takes(resolution, message):
    """Multiples of 32, whatever the VAE; by default what the transformer was trained at."""
    backbone = backbone_of()
    if message is None:
        assert backbone.check_resolution(resolution) == (resolution or 32)
        return
    with pytest.raises(ValueError, match=f"`resolution` is {resolution}, which is {message}"):
        backbone.check_resolution(resolution)


def test_samples_have_the_size_that_is_trained_at(tmp_path):
    """
    The pipeline draws sizes of its own, such as 1024x1024 for 96x96, and resizes the image: not where a size is asked for, in training,
    in an evaluation, and in the code on the card, which names no other program.
    """
    pipeline, drawn = sana_pipeline(), []
    pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: drawn.append(args[0].shape[2:]), with_kwargs=True
    )
    args = InstanceDPOConfig(str(tmp_path), **tiny.FAST | SHORT, resolution=96, num_inference_steps=1)
    trainer = InstanceDPOTrainer(pipeline, args=args, train_dataset=tiny.pairs(2), peft_config=tiny.lora())
    (image,) = trainer.sample(["a cat"])
    assert image.size == (96, 96) and drawn == [(24, 24)]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "height=96, width=96, max_sequence_length=16, use_resolution_binning=False" in card
    assert "bfloat16" in card and "`beta` multiplies errors of the velocity" in card
    assert "export-lora" not in card
    trainer.save_model()
    with pytest.raises(ValueError, match="is one of Sana, for which ComfyUI and A1111 have no names"):
        export_lora(tmp_path, tmp_path / "out" / "lora.safetensors")
    asked, left = (further_settings(pipeline, Protocol(height=height), "sana") for height in (96, None))
    assert asked == {"use_resolution_binning": False} and left == {}


# ---- What is trained, and what is not ----


class OwnScheduler(DPMSolverMultistepScheduler):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"flow_shift": 1.0, "final_sigmas_type": "sigma_min", "algorithm_type": "sde-dpmsolver++", "solver_order": 1},
        {"scheduler": FlowMatchEulerDiscreteScheduler, "shift": 3.0},
    ],
)
def test_what_is_accepted(settings):
    """How many steps and of what order does not matter to training, nor does a scheduler of one's own on top of the known one."""
    pipeline = sana_pipeline(**settings)
    if "scheduler" not in settings:
        pipeline.scheduler = OwnScheduler.from_config(pipeline.scheduler.config)
    assert type(load_backbone(pipeline)) is SanaBackbone


def set_part(**parts):
    def change(pipeline):
        for name, make in parts.items():
            setattr(pipeline, name, make(pipeline) if make else None)

    return change


def configure(component: str, **config):
    return lambda pipeline: getattr(pipeline, component).register_to_config(**config)


def rebuilt(pipeline, **config):
    return type(pipeline.transformer)(**{**pipeline.transformer.config, **config})


def of_causal_lm(pipeline):
    return Gemma2ForCausalLM(pipeline.text_encoder.config)


def without_bos(pipeline):
    pipeline.tokenizer.add_bos_token = False
    pipeline.tokenizer.update_post_processor()


class OtherProcessor:
    pass


def other_vae(pipeline):
    config = dict(pipeline.vae.config) | {"latent_channels": 4}
    return type(pipeline.vae)(**config)


def shallow_vae(pipeline):
    names = [f"{part}_{what}" for part in ("encoder", "decoder") for what in ("block_types", "block_out_channels")]
    names += [
        "encoder_layers_per_block",
        "decoder_layers_per_block",
        "encoder_qkv_multiscales",
        "decoder_qkv_multiscales",
    ]
    return type(pipeline.vae)(**dict(pipeline.vae.config) | {name: pipeline.vae.config[name][1:] for name in names})


NO_FLOW = r"`scheduler` has `prediction_type='{}'` and `use_flow_sigmas={}`, but the model is a rectified flow"
CASES = [
    *((set_part(**{name: None}), f"`{name}` is None") for name in ("scheduler", "transformer", "vae", "text_encoder", "tokenizer")),
    (configure("scheduler", prediction_type="epsilon"), NO_FLOW.format("epsilon", True)),
    (configure("scheduler", prediction_type="v_prediction"), NO_FLOW.format("v_prediction", True)),
    (configure("scheduler", use_flow_sigmas=False), NO_FLOW.format("flow_prediction", False)),
    (set_part(scheduler=lambda p: DPMSolverMultistepScheduler()), NO_FLOW.format("epsilon", False)),
    *(
        (set_part(scheduler=lambda p, key=key: dpm_solver(**{key: True})), f"`scheduler.config.{key}` is True")
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
    ),
    (configure("scheduler", use_beta_sigmas=True), "`scheduler.config.use_beta_sigmas` is True"),
    *(
        (configure("scheduler", flow_shift=shift), f"`scheduler.config.flow_shift` is {shift}")
        for shift in (0, -1.0, None, float("nan"), float("inf"))
    ),
    (
        set_part(scheduler=lambda p: tiny.flow_scheduler(use_dynamic_shifting=True)),
        "`scheduler.config.use_dynamic_shifting` is True, but a `SanaPipeline` gives its scheduler no `mu`",
    ),
    (set_part(scheduler=lambda p: tiny.flow_scheduler(invert_sigmas=True)), "`scheduler.config.invert_sigmas` is True"),
    (set_part(scheduler=lambda p: tiny.scheduler()), "`scheduler` is a `DDIMScheduler`"),
    (set_part(vae=lambda p: AutoencoderTiny()), "`vae` is a `AutoencoderTiny`, but training encodes images by an `AutoencoderDC`"),
    (set_part(vae=lambda p: tiny.vae()), f"`vae` is a `{AutoencoderKL.__name__}`"),
    (set_part(vae=other_vae), "`latent_channels=4`, and `transformer` takes latents of 8 channels"),
    (set_part(vae=shallow_vae), "`pipeline.vae_scale_factor` is 4, but the VAE was put into a pipeline that was made with another"),
    (configure("vae", scaling_factor=0), "`vae.config.scaling_factor` is 0"),
    (set_part(transformer=lambda p: tiny.sd3_pipeline().transformer), "`transformer` is a `SD3Transformer2DModel`"),
    (
        set_part(transformer=lambda p: rebuilt(p, guidance_embeds=True)),
        "`transformer.config.guidance_embeds` is True, but a `SanaPipeline` tells .* no guidance scale .Sana-Sprint",
    ),
    (set_part(transformer=lambda p: rebuilt(p, out_channels=16)), "`transformer.config.in_channels` is 8 and `out_channels` is 16"),
    (set_part(transformer=lambda p: rebuilt(p, caption_channels=32)), "`transformer.config.caption_channels` is 32.* gives 16"),
    (lambda p: p.transformer.set_attn_processor(OtherProcessor()), "attention processors of the kind `OtherProcessor`"),
    (lambda p: p.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"])), "`transformer` carries LoRA adapters"),
    (set_part(text_encoder=of_causal_lm), "`text_encoder` is a `Gemma2ForCausalLM`, but .* by a `Gemma2Model`"),
    (set_part(text_encoder=lambda p: tiny.text_encoder()), "`text_encoder` is a `CLIPTextModel`"),
    (lambda p: p.tokenizer.add_tokens("<mine>"), "`tokenizer` has .* tokens were added"),
    (without_bos, "`tokenizer` makes 0 tokens of an empty prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CASES)
def test_what_is_refused(change, message):
    """One thing is changed; the error names it. Without the change the same pipeline is trained."""
    pipeline = sana_pipeline()
    load_backbone(pipeline)
    change(pipeline)
    with pytest.raises(ValueError, match=f"This model cannot be trained: (?s:.*)({message})"):
        load_backbone(pipeline)


@pytest.mark.parametrize(
    "name", ["SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "SanaPAGPipeline", "SanaVideoPipeline"]
)
def test_other_pipelines_of_the_name_are_refused(name):
    """Distilled models, other attention and videos have classes of their own."""
    kind = getattr(diffusers, name)
    pipeline = kind.__new__(kind)
    with pytest.raises(ValueError, match=f"`model` is a `{name}`, a family that is not supported yet.*`SanaPipeline`"):
        load_backbone(pipeline)


def other_reference(**config):
    pipeline = sana_pipeline()
    pipeline.transformer.register_to_config(**config)
    return pipeline


def with_another_vae():
    pipeline = sana_pipeline()
    with torch.no_grad():
        pipeline.vae.encoder.conv_out.weight.mul_(2)
    return pipeline


def with_another_scale():
    pipeline = sana_pipeline()
    pipeline.vae.register_to_config(scaling_factor=1.0)
    return pipeline


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny.sd3_pipeline, "it is a `StableDiffusion3Pipeline` and the policy is a `SanaPipeline`"),
        (lambda: other_reference(timestep_scale=0.001), "its `transformer.config.timestep_scale` is 0.001"),
        (lambda: sana_pipeline(num_train_timesteps=500), "num_train_timesteps` is 500"),
        (lambda: sana_pipeline(seed=1), "its `text_encoder` has other weights"),
        (with_another_vae, "its `vae` encodes images to other latents"),
        (with_another_scale, "its `vae.config.scaling_factor` is 1.0"),
    ],
)
def test_references_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=f"`ref_model` does not fit the policy: .*{message}"):
        load_backbone(sana_pipeline()).check_reference(make())


def test_references_that_fit():
    """Other weights of the transformer and another shift do not matter."""
    reference = sana_pipeline(flow_shift=1.0)
    reference.transformer = copy.deepcopy(reference.transformer)
    with torch.no_grad():
        reference.transformer.proj_out.weight += 1
    load_backbone(sana_pipeline()).check_reference(reference)


def test_a_single_file_is_refused_by_name(tmp_path):
    """A file with the names of Sana's own code."""
    path = tmp_path / "sana.safetensors"
    save_file({"blocks.0.cross_attn.q_linear.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="sana.safetensors holds a model of the kind 'sana'. A single file must hold"):
        load_backbone(path)


# ---- Precision and true size ----


@torch.no_grad()
def test_half_precision():
    """Under autocast to bfloat16 the prediction is that of float32 but for rounding, the linear attention included."""
    backbone = backbone_of()
    latents, timesteps = (
        torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([300.0, 800]),
    )
    conditions = backbone.encode_prompts(["a cat", None])
    exact = backbone.predict(backbone.denoiser, latents, timesteps, conditions)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone.predict(backbone.denoiser, latents, timesteps, backbone.encode_prompts(["a cat", None]))
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.float() - exact).norm() / exact.norm() < 0.02


def test_true_size():
    """Sana 1.6B on the meta device: two images of 1024x1024 pixels, with 300 tokens and one, in and out."""
    backbone = load_backbone(sana_pipeline())
    with torch.device("meta"):
        backbone.pipeline.transformer = transformer = diffusers.SanaTransformer2DModel().to(torch.bfloat16)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 1_604_462_752
    conditions = {
        "prompt_embeds": torch.empty(2, 300, 2304, device="meta", dtype=torch.bfloat16),
        "prompt_lengths": torch.tensor([300, 1], device="meta"),
    }
    latents = torch.empty(2, 32, 32, 32, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prediction = backbone.predict(transformer, latents, torch.empty(2, device="meta"), conditions)
    assert prediction.shape == latents.shape and prediction.dtype == torch.bfloat16
    assert counter.get_total_flops() / 2e12 == pytest.approx(2.97, rel=0.01)
    assert (
        backbone.default_resolution == 32 * 4
    )  # of the tiny VAE; 1024 with the 32 times smaller latents of the real one
