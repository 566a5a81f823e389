# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Negative preference guidance for every way in which pipelines call their transformer: lists of tensors, positional arguments, both
branches in one call in either order, a call for each branch with a name or without one.

The pipelines are those of diffusers on tiny random weights, without text encoders and VAE: embeddings go in and latents come out.
"""

import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from tests import tiny
from trl_diffusion import guidance, negative_preference_guidance
from trl_diffusion.backbones import Backbone


CLOSE = {"atol": 2e-5, "rtol": 2e-5}
FLOW = {"use_dynamic_shifting": True, "max_image_seq_len": 64, "base_image_seq_len": 4}


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- Backbones that know the branches and nothing else ----


class StandIn(Backbone):
    denoiser_name = "transformer"


class ZImage(StandIn):
    pipeline_class = ZImagePipeline

    @staticmethod
    def guidance_branches(pipeline, context, arguments):
        is_truncated = arguments["t"][0].item() > pipeline._cfg_truncation
        both = pipeline.do_classifier_free_guidance and not is_truncated
        return ("conditional", "unconditional") if both else ("conditional",)


class Krea2(StandIn):
    pipeline_class = Krea2Pipeline
    guidance_hint = "pass a `guidance_scale` above 0 to it"

    @staticmethod
    def guidance_branches(pipeline, context, arguments):
        return ("unconditional",) if context == "again" else ("conditional",)


class QwenImage(StandIn):
    pipeline_class = QwenImagePipeline
    guidance_hint = "pass `true_cfg_scale` above 1 and `negative_prompt=' '` to it"

    @staticmethod
    def guidance_branches(pipeline, context, arguments):
        return ("unconditional",) if context == "uncond" else ("conditional",)


class Klein(QwenImage):
    pipeline_class = Flux2KleinPipeline
    guidance_hint = "pass a `guidance_scale` above 1 to it"


class Sana(StandIn):
    pipeline_class = SanaPipeline

    @staticmethod
    def guidance_branches(pipeline, context, arguments):
        return ("unconditional", "conditional") if pipeline.do_classifier_free_guidance else ("conditional",)


# ---- The pipelines ----


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
    )
    return ZImagePipeline(tiny.flow_scheduler(), None, None, None, transformer)


def krea_2() -> Krea2Pipeline:
    transformer = Krea2Transformer2DModel(
        **{"in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": 16},
        **{"num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2},
        **{"text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
        axes_dims_rope=(4, 6, 6),
    )
    return Krea2Pipeline(tiny.flow_scheduler(**FLOW), None, None, None, transformer, text_encoder_select_layers=(0, 1))


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        **{"in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)},
    )
    return QwenImagePipeline(tiny.flow_scheduler(**FLOW), None, None, None, transformer)


class Statistics(torch.nn.Module):
    """What FLUX.2 scales latents by, in place of its VAE."""

    device, dtype, config = torch.device("cpu"), torch.float32, SimpleNamespace(batch_norm_eps=1e-4)

    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(16).eval()


def klein() -> Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel(
        **{"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": 16, "timestep_guidance_channels": 16},
        **{"axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False},
    )
    pipeline = Flux2KleinPipeline(tiny.flow_scheduler(**FLOW), None, None, None, transformer)
    pipeline.vae = Statistics()
    return pipeline


def sana() -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1},
        **{"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16},
        **{"caption_channels": 16, "sample_size": 8},
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(None, None, None, transformer, scheduler)


@dataclass
class Way:
    """
    A way to call the transformer.

    Args:
        make: the pipeline.
        backbone: its backbone.
        text: the transformer's argument of the prompts.
        rows: the arguments with a row for each image of a call.
        prompts: the pipeline's arguments of two prompts and the negative ones.
        call: its other arguments.
        unguided: its arguments for images without guidance.
        branches: the calls of a step with guidance.
    """

    make: Any
    backbone: type
    text: str
    rows: tuple[str, ...]
    prompts: dict[str, Any]
    call: dict[str, Any]
    unguided: dict[str, Any]
    branches: list[tuple[str, ...]]


LENGTHS = 5, 3  # of the prompts in tokens
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
SIZE = {"height": 32, "width": 32}
Z_IMAGE = Way(
    z_image,
    ZImage,
    "cap_feats",
    ("x", "t", "cap_feats"),
    {
        "prompt_embeds": [noise(length, 16, seed=index) for index, length in enumerate(LENGTHS)],
        "negative_prompt_embeds": [noise(2, 16, seed=9), noise(2, 16, seed=9)],
    },
    {"guidance_scale": 3.0, **SIZE},
    {"guidance_scale": 0.0},
    [("conditional", "unconditional")],
)
MASKED = {
    "prompt_embeds": noise(2, 5, 16, seed=0),
    "prompt_embeds_mask": MASK,
    "negative_prompt_embeds": noise(1, 5, 16, seed=9).repeat(2, 1, 1),
    "negative_prompt_embeds_mask": MASK[1:].repeat(2, 1),
}
WAYS = {
    "z_image": Z_IMAGE,
    "krea_2": Way(
        krea_2,
        Krea2,
        "encoder_hidden_states",
        ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
        MASKED
        | {
            "prompt_embeds": noise(2, 5, 2, 16, seed=0),
            "negative_prompt_embeds": noise(1, 5, 2, 16, seed=9).repeat(2, 1, 1, 1),
        },
        {"guidance_scale": 3.0, **SIZE},
        {"guidance_scale": 0.0},
        [("conditional",), ("unconditional",)],
    ),
    "qwen_image": Way(
        qwen_image,
        QwenImage,
        "encoder_hidden_states",
        ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes"),
        MASKED,
        {"true_cfg_scale": 3.0, **SIZE},
        {"true_cfg_scale": 1.0},
        [("conditional",), ("unconditional",)],
    ),
    "klein": Way(
        klein,
        Klein,
        "encoder_hidden_states",
        ("hidden_states", "encoder_hidden_states", "timestep", "txt_ids", "img_ids"),
        {
            "prompt_embeds": MASKED["prompt_embeds"],
            "negative_prompt_embeds": MASKED["negative_prompt_embeds"],
        },
        {"guidance_scale": 3.0, **SIZE},
        {"guidance_scale": 1.0},
        [("conditional",), ("unconditional",)],
    ),
    "sana": Way(
        sana,
        Sana,
        "encoder_hidden_states",
        ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask"),
        {
            "prompt_embeds": MASKED["prompt_embeds"],
            "prompt_attention_mask": MASK,
            "negative_prompt": None,
            "negative_prompt_embeds": MASKED["negative_prompt_embeds"],
            "negative_prompt_attention_mask": MASKED["negative_prompt_embeds_mask"],
        },
        {"guidance_scale": 3.0, "height": 256, "width": 256, "use_resolution_binning": False},
        {"guidance_scale": 1.0},
        [("unconditional", "conditional")],
    ),
}
CALLED_ONCE_A_BRANCH = [name for name, way in WAYS.items() if len(way.branches) == 2]
LORAS = {
    "aligned": LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]),
    "reversed": LoraConfig(r=2, lora_alpha=3, target_modules=["to_k", "to_v"]),
}


@pytest.fixture(autouse=True)
def families(monkeypatch):
    monkeypatch.setattr(guidance, "BACKBONES", tuple(way.backbone for way in WAYS.values()))


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> dict:
    folders = {}
    for way, settings in WAYS.items():
        for seed, (name, config) in enumerate(LORAS.items()):
            torch.manual_seed(0)
            pipeline = settings.make()
            model = get_peft_model(pipeline.transformer, config)
            weights = {
                key.removeprefix("base_model.model."): 0.3 * noise(*weight.shape, seed=seed)
                for key, weight in get_peft_model_state_dict(model).items()
            }
            folders[way, name] = str(tmp_path_factory.mktemp(f"{way}-{name}"))
            pipeline.save_lora_weights(
                folders[way, name],
                transformer_lora_layers=weights,
                transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
            )
    return folders


def load(loras, way: str, *names: str):
    torch.manual_seed(0)
    pipeline = WAYS[way].make()
    for name in names:
        pipeline.load_lora_weights(loras[way, name], adapter_name=name)
    pipeline.transformer.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(way: str, pipeline, steps: int = 2, **given) -> torch.Tensor:
    settings = WAYS[way]
    arguments = settings.prompts | settings.call | {"num_inference_steps": steps, "output_type": "latent"} | given
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipeline(prompt=None, generator=generators, **arguments).images


class ByText:
    """Draws each row alone with one of two transformers: the negative one where the row reads the negative prompt."""

    def __init__(self, way: str, positive: torch.nn.Module, negative: torch.nn.Module):
        self.way, self.models, self.calls = WAYS[way], {"conditional": positive, "unconditional": negative}, []
        self.signature = inspect.signature(type(positive).forward)

    def __call__(self, *args, **kwargs):
        arguments = dict(self.signature.bind(None, *args, **kwargs).arguments)
        arguments.pop("self")
        negative, rows, branches = self.way.prompts["negative_prompt_embeds"][0], [], []
        for row in range(len(arguments[self.way.text])):
            own = {
                key: value[row : row + 1] if key in self.way.rows and value is not None else value
                for key, value in arguments.items()
            }
            text = own[self.way.text][0]
            branches.append("unconditional" if torch.equal(text, negative) else "conditional")
            rows.append(self.models[branches[-1]](**own)[0])
        self.calls.append(tuple(dict.fromkeys(branches)))
        return ([row[0] for row in rows],) if isinstance(rows[0], list) else (torch.cat(rows),)


@pytest.mark.parametrize("way", WAYS)
class TestImages:
    def drawn_by_text(self, way, loras, positive, negative, **given):
        pipelines = [load(loras, way, *names) for names in ((), positive, negative)]
        by_text = ByText(way, *(pipeline.transformer for pipeline in pipelines[1:]))
        pipelines[0].transformer.forward = by_text
        return draw(way, pipelines[0], **given), by_text.calls

    @pytest.mark.parametrize(("positive", "negative"), [("aligned", "reversed"), (None, "reversed"), ("aligned", {})])
    def test_each_branch_has_its_model(self, loras, way, positive, negative):
        """Images are those of a pipeline whose transformer asks one of two models for each row, by the text that the row reads."""
        names = [[each] if each else [] for each in (positive, negative)]
        expected, calls = self.drawn_by_text(way, loras, *names)
        pipeline = load(loras, way, "aligned", "reversed")
        plain = draw(way, pipeline)
        with negative_preference_guidance(pipeline, positive, negative):
            drawn = draw(way, pipeline)
        assert calls == 2 * WAYS[way].branches
        torch.testing.assert_close(drawn, expected, **CLOSE)
        assert (drawn - plain).abs().max() > 1e-3

    def test_equal_branches_are_the_plain_pipeline(self, loras, way):
        """With one model in both branches, images are those of the pipeline that has it; afterwards it is as it was."""
        pipeline = load(loras, way, "aligned", "reversed")
        pipeline.set_adapters("aligned")
        plain = draw(way, pipeline)
        with negative_preference_guidance(pipeline, "aligned", "aligned"):
            torch.testing.assert_close(draw(way, pipeline), plain, **CLOSE)
        assert torch.equal(draw(way, pipeline), plain)
        assert not {"forward", "cache_context"} & vars(pipeline.transformer).keys()

    @pytest.mark.parametrize("steps", [1, 2])
    def test_without_guidance(self, loras, way, steps):
        """Where each branch has its own call it is refused, with what to pass; else the positive model draws alone."""
        settings, pipeline = WAYS[way], load(loras, way, "aligned", "reversed")
        if way in CALLED_ONCE_A_BRANCH:
            for before in (False, True):
                with pytest.raises(ValueError, match="`negative` would have no effect: pass"):
                    with negative_preference_guidance(pipeline, "aligned", "reversed"):
                        if before:
                            draw(way, pipeline)
                        draw(way, pipeline, steps, **settings.unguided)
            return
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            drawn = draw(way, pipeline, steps, **settings.unguided)
        assert torch.equal(drawn, draw(way, load(loras, way, "aligned"), steps, **settings.unguided))

    def test_a_compiled_transformer(self, loras, way):
        """Its arguments are read by the names of what was compiled."""
        pipeline = load(loras, way, "aligned", "reversed")
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            expected = draw(way, pipeline)
        pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            torch.testing.assert_close(draw(way, pipeline), expected, **CLOSE)


class TestCalls:
    def test_truncated_guidance(self, loras):
        """The last steps of Z-Image may be without guidance: they are the positive model's."""
        pipeline = load(loras, "z_image", "aligned", "reversed")
        settings = {"steps": 3, "cfg_truncation": 0.3}
        expected, calls = TestImages().drawn_by_text("z_image", loras, ["aligned"], ["reversed"], **settings)
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            drawn = draw("z_image", pipeline, **settings)
            untruncated = draw("z_image", pipeline, 3)
        assert calls == [("conditional", "unconditional")] * 2 + [("conditional",)]
        torch.testing.assert_close(drawn, expected, **CLOSE)
        assert (drawn - untruncated).abs().max() > 1e-3

    def test_a_distilled_model_has_no_branch(self, loras):
        """A distilled FLUX.2 ignores its guidance scale, which is said with the way out."""
        pipeline = load(loras, "klein", "aligned", "reversed")
        pipeline.register_to_config(is_distilled=True)
        with pytest.raises(ValueError, match="`negative` would have no effect: pass a `guidance_scale` above 1"):
            with negative_preference_guidance(pipeline, "aligned", "reversed"):
                draw("klein", pipeline)

    def test_the_same_time_twice_is_not_again(self, loras):
        """Only the very tensor of the call before is: equal times of other steps, and other numbers, begin a new step."""
        pipeline, seen = load(loras, "krea_2", "aligned", "reversed"), []
        branches = Krea2.guidance_branches

        class Noting(Krea2):
            @staticmethod
            def guidance_branches(pipeline, context, arguments):
                seen.append(context)
                return branches(pipeline, context, arguments)

        Noting.guidance_hint = None
        guidance.BACKBONES = (Noting,)
        inputs = {"hidden_states": noise(1, 4, 16, seed=0), "encoder_hidden_states": noise(1, 5, 2, 16, seed=1)}
        inputs["position_ids"] = torch.zeros(9, 3)
        time, other = torch.tensor([0.5]), torch.tensor([0.5])
        with torch.no_grad(), negative_preference_guidance(pipeline, "aligned", "reversed"):
            for timestep in (time, time, other, time, time, time):
                pipeline.transformer(**inputs, timestep=timestep, return_dict=False)
        assert seen == [None, "again", None, None, "again", "again"]

    def test_families_are_told_by_their_transformer(self, loras):
        """Pipelines with the same names of components are of the family whose transformer they have, image to image too."""
        for way in ("z_image", "qwen_image", "krea_2", "klein", "sana"):
            assert guidance._backbone_class_of(load(loras, way)) is WAYS[way].backbone
        components = load(loras, "z_image").components
        assert guidance._backbone_class_of(ZImageImg2ImgPipeline(**components)) is ZImage
        with pytest.raises(ValueError, match="A `QwenImageImg2ImgPipeline` does not tell which branch"):
            components = load(loras, "qwen_image").components
            with negative_preference_guidance(QwenImageImg2ImgPipeline(**components), None, {}):
                raise AssertionError("nothing is drawn")
