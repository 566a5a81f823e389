# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Krea 2: which pipelines are trained, Raw and Turbo, and its prompts, whose padding stands before their end."""

import pytest
import torch
from diffusers import Krea2Transformer2DModel
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor
from peft import get_peft_model

from tests import tiny
from tests.families import FAMILIES
from tests.families.krea_2 import LAYERS
from tests.families.krea_2 import pipeline as make
from tests.families.qwen_image import pipeline as qwen_image_pipeline
from trl_diffusion.backbones import Krea2Backbone, load_backbone
from trl_diffusion.scripts.check_dataset import prompt_fits
from trl_diffusion.trainer.adapters import AdapterMixer, with_adapter
from trl_diffusion.trainer.encoding import BatchEncoder
from trl_diffusion.trainer.lora import with_target_modules
from trl_diffusion.trainer.precompute import text_fingerprint


class OtherProcessor(Krea2AttnProcessor):
    pass


def rebuilt(pipeline, **config) -> Krea2Transformer2DModel:
    return Krea2Transformer2DModel(**{**pipeline.transformer.config, **config})


def set_part(**parts):
    """Puts components into a pipeline, each made when the test runs."""

    def change(pipeline):
        for name, make_part in parts.items():
            setattr(pipeline, name, make_part(pipeline))

    return change


CASES = [
    (set_part(text_encoder=lambda p: None), "`text_encoder` is None"),
    (
        set_part(text_encoder=lambda p: qwen_image_pipeline().text_encoder),
        "`text_encoder` is a `Qwen2_5_VLForConditionalGeneration`, but .* are encoded by a `Qwen3VLModel`",
    ),
    (
        set_part(transformer=lambda p: qwen_image_pipeline().transformer),
        "`transformer` is a `QwenImageTransformer2DModel`, but a `Krea2Pipeline` has a `Krea2Transformer2DModel`",
    ),
    (
        set_part(transformer=lambda p: rebuilt(p, text_hidden_dim=16)),
        "`transformer.config.text_hidden_dim` is 16, and the text encoder gives 32",
    ),
    (
        set_part(transformer=lambda p: rebuilt(p, num_text_layers=3)),
        r"`text_encoder_select_layers` is \(1, 3\), and `transformer.config.num_text_layers` is 3",
    ),
    (
        lambda p: vars(p).update(text_encoder_select_layers=(1, 4)),
        r"`text_encoder_select_layers` is \(1, 4\), .* layers 0 to 3",
    ),
    (lambda p: vars(p).update(text_encoder_select_layers=(-1, 3)), r"`text_encoder_select_layers` is \(-1, 3\)"),
    (set_part(transformer=lambda p: rebuilt(p, in_channels=64)), "`transformer` takes 64 channels for 2x2 positions"),
    (set_part(patch_size=lambda p: 1), "`transformer` takes 16 channels for 1x1 positions"),
    (set_part(tokenizer=lambda p: type(p.tokenizer)()), "cuts what stands before the prompt .* drops the first 34"),
    (
        lambda p: p.transformer.set_attn_processor(OtherProcessor()),
        "attention processors of the kind `OtherProcessor`",
    ),
    (lambda p: p.vae.register_to_config(latents_std=None), "`vae.config.latents_std` is None"),
]


@pytest.mark.parametrize(("change", "message"), CASES)
def test_what_is_refused(change, message):
    """One thing is changed; the error names it. Without the change the same pipeline is trained."""
    pipeline = make()
    assert type(load_backbone(pipeline)) is Krea2Backbone
    change(pipeline)
    with pytest.raises(ValueError, match=f"This model cannot be trained: (?s:.*){message}"):
        load_backbone(pipeline)


@pytest.mark.parametrize(
    ("make_reference", "message"),
    [
        (qwen_image_pipeline, "it is a `QwenImagePipeline` and the policy is a `Krea2Pipeline`"),
        (lambda: make(seed=1), "its `text_encoder` has other weights"),
        (lambda: make(layers=(1, 2)), r"its `text_encoder_select_layers` is \(1, 2\) and the policy's is \(1, 3\)"),
    ],
)
def test_references_that_do_not_fit(make_reference, message):
    with pytest.raises(ValueError, match=f"`ref_model` does not fit the policy: .*{message}"):
        load_backbone(make()).check_reference(make_reference())


def test_references_that_fit():
    backbone, reference = load_backbone(make()), make()
    with torch.no_grad():
        reference.transformer.final_layer.linear.weight += 1
    backbone.check_reference(reference)


# ---- Raw and Turbo ----


def test_turbo_has_one_shift_for_all_sizes():
    """Raw is shifted by the size of the image; Turbo by 1.15, whatever the size, and it is drawn without guidance."""
    raw, turbo = load_backbone(make()), load_backbone(make(is_distilled=True))
    assert raw.shift_for(4) == 0.5 and raw.shift_for(64) == pytest.approx(1.15)  # the ends of the scheduler's range
    assert turbo.shift_for(4) == turbo.shift_for(64) == 1.15
    assert raw.sampling_defaults(raw.pipeline.config) == {}
    assert turbo.sampling_defaults(turbo.pipeline.config) == {"guidance_scale": 0.0, "num_inference_steps": 8}


# ---- Prompts ----


PROMPTS = ["a cat", "a red circle and a blue square and a dog"]


@pytest.mark.parametrize("prompts", [PROMPTS, ["a cat", "a dog"], [None, "a cat"]])
def test_text_without_its_padding_predicts_the_same(prompts):
    """
    The pipeline gives the transformer 64 tokens, with the padding before the end of the template, and a mask. Without the padding the
    prediction is the same: no text has a position.
    """
    backbone = load_backbone(make())
    backbone.configure(64, None)
    pipeline, conditions = backbone.pipeline, backbone.encode_prompts(prompts)
    embeds, mask = pipeline.encode_prompt([prompt or "" for prompt in prompts], max_sequence_length=64)
    assert embeds.shape == (2, 64, len(LAYERS), 32) and mask[:, -5:].all() and not mask[:, -6].any()
    lengths = conditions["prompt_lengths"]
    assert lengths.tolist() == mask.sum(dim=1).tolist() and conditions["prompt_embeds"].shape[1] == max(lengths) < 20
    latents, timesteps = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([200.0, 900.0]),
    )
    with torch.no_grad():
        own = backbone.predict(pipeline.transformer, latents, timesteps, conditions)
        theirs = pipeline.transformer(
            hidden_states=pipeline._pack_latents(latents, 2, 4, 8, 8),
            encoder_hidden_states=embeds,
            timestep=timesteps / 1000,
            position_ids=pipeline.prepare_position_ids(64, 4, 4, "cpu"),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
    torch.testing.assert_close(own, pipeline._unpack_latents(theirs, 32, 32).squeeze(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("prompts", "is_masked"), [(["a cat", "a dog"], False), (["a cat", "a red dog"], True)])
def test_only_padding_is_masked(prompts, is_masked):
    """Prompts of one length need no mask; the pipeline, which pads all of them, always has one."""
    backbone, masks = load_backbone(make()), []
    backbone.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["encoder_attention_mask"]), with_kwargs=True
    )
    with torch.no_grad():
        latents = torch.zeros(2, 4, 4, 4)
        backbone.predict(backbone.denoiser, latents, torch.ones(2), backbone.encode_prompts(prompts))
    expected = [[True] * 7 + [False], [True] * 8] if is_masked else None
    assert [mask if mask is None else mask.tolist() for mask in masks] == [expected]


@pytest.mark.parametrize("limit", [8, 600])
def test_a_prompt_fits_if_its_last_word_is_read(limit):
    """The end of the template has 5 of the tokens: so many words less are read, and of one more the last is not."""
    backbone = load_backbone(make())
    backbone.configure(limit, None)
    for number, fits in ((limit - 5, True), (limit - 4, False)):
        prompt = " ".join(["red"] * (number - 1))
        assert backbone.fits(f"{prompt} cat") is fits
        one, other = (backbone.encode_prompts([f"{prompt} {word}"])["prompt_embeds"][0] for word in ("cat", "dog"))
        assert len(one) == limit and torch.equal(one, other) is not fits


def test_the_number_of_tokens_leaves_room_for_the_template():
    """Of 5 tokens none would be the prompt's."""
    load_backbone(make()).configure(6, None)
    with pytest.raises(ValueError, match="`max_sequence_length` is 5, of which the end of the template takes 5"):
        load_backbone(make()).configure(5, None)


# ---- LoRA ----


def test_adapters_share_a_batch():
    """Rows with different adapters are predicted as each alone, also in the blocks of the text, which take each token for a row."""
    backbone = load_backbone(make())
    policy = get_peft_model(backbone.denoiser, with_target_modules(tiny.lora(4, 8), backbone.lora_target_modules))
    policy.add_adapter("expert", with_target_modules(tiny.lora(2, 8), backbone.lora_target_modules))
    generator = torch.Generator().manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2, generator=generator)
    conditions, timesteps = backbone.encode_prompts(PROMPTS + ["a dog"]), torch.tensor([200.0, 900.0, 500.0])
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    adapters, mixer = ["expert", "default", None], AdapterMixer(policy)
    with mixer.mixing([(adapter, 1) for adapter in adapters]):
        mixed = backbone.predict(policy, latents, timesteps, conditions)
    for row, adapter in enumerate(adapters):
        with torch.no_grad(), with_adapter(mixer.layers, adapter):
            alone = backbone.predict(policy, latents, timesteps, conditions)[row]
        torch.testing.assert_close(mixed[row], alone, atol=1e-5, rtol=1e-5)
        assert (alone - mixed[row - 1]).abs().max() > 1e-2


def test_prompts_of_other_layers_are_other_files():
    """What is stored of a prompt depends on the layers and the template: a cache of others is not read."""
    encoders = [
        BatchEncoder(load_backbone(make(layers=layers)), torch.device("cpu"), None, ("chosen",), "target")
        for layers in (LAYERS, LAYERS, (1, 2))
    ]
    same, again, other = map(text_fingerprint, encoders)
    assert same == again != other
    encoders[0].backbone.pipeline.prompt_template_encode_suffix += "<think>"
    assert text_fingerprint(encoders[0]) != same


@pytest.mark.parametrize(("family", "number"), [("qwen_image", 512), ("krea_2", 507)])
def test_a_dataset_is_checked_by_the_tokens_that_are_read(family, number, tmp_path):
    """`check-dataset` counts as the trainer does: 512 tokens, of which the end of Krea 2's template takes 5."""
    FAMILIES[family].make().save_pretrained(tmp_path)
    fits = prompt_fits(str(tmp_path))
    assert fits(" ".join(["red"] * number)) and not fits(" ".join(["red"] * (number + 1)))
