# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0


from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    DiffusionPipeline,
    DiTPipeline,
    Flux2KleinPipeline,
    FluxImg2ImgPipeline,
    FluxPipeline,
    Krea2Pipeline,
    SanaPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    ZImagePipeline,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from tests import tiny
from trl_diffusion import negative_preference_guidance, sample_images, sampling
from trl_diffusion.backbones import Backbone, backbone_class_of
from trl_diffusion.randomness import keyed_generator
from trl_diffusion.sampling import default_guidance


PIPELINES = {
    "sd": tiny.sd_pipeline,
    "sd_v": lambda: tiny.sd_pipeline("v_prediction"),
    "sdxl": tiny.sdxl_pipeline,
    "sd3": tiny.sd3_pipeline,
    "flux": tiny.flux_pipeline,
}
FAMILIES = ["sd", "sdxl", "sd3", "flux"]
# Of other ranks and strengths, and on other modules: most layers have only one of them.
LORAS = {
    "aligned": LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]),
    "reversed": LoraConfig(r=2, lora_alpha=3, target_modules=["to_v", "to_out.0", "conv1"]),
}
PROMPT = "a red circle"
SCALE = 3.0
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def denoiser_of(pipeline) -> torch.nn.Module:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> dict:
    """Folders of random LoRAs, as diffusers saves them."""
    folders = {}
    for family, make in PIPELINES.items():
        for seed, (name, config) in enumerate(LORAS.items()):
            pipeline = make()
            model = get_peft_model(denoiser_of(pipeline), config)
            generator = torch.Generator().manual_seed(seed)
            weights = {
                key.removeprefix("base_model.model."): 0.15 * torch.randn(weight.shape, generator=generator)
                for key, weight in get_peft_model_state_dict(model).items()
            }
            folders[family, name] = str(tmp_path_factory.mktemp(f"{family}-{name}"))
            pipeline.save_lora_weights(
                folders[family, name],
                **{
                    f"{backbone_class_of(pipeline).denoiser_name}_lora_{what}": value
                    for what, value in (
                        ("layers", weights),
                        ("adapter_metadata", model.peft_config["default"].to_dict()),
                    )
                },
            )
    return folders


@pytest.fixture(scope="module")
def load(loras):
    """A new pipeline of a family, with adapters loaded by diffusers."""

    def load(family: str = "sd", names=("aligned", "reversed")):
        pipeline = PIPELINES[family]()
        pipeline.set_progress_bar_config(disable=True)
        for name in names:
            pipeline.load_lora_weights(loras[family, name], adapter_name=name)
        return pipeline

    return load


@pytest.fixture(scope="module")
def branch(load):
    """The pipeline of one branch: it has the adapters of that branch and nothing else, and is left as it is."""
    made = {}

    def branch(family: str, weights: dict[str, float] | None):
        key = (family, str(weights))
        if key not in made:
            made[key] = load(family, tuple(weights or ()))
            if weights:
                made[key].set_adapters(list(weights), list(weights.values()))
        return made[key]

    return branch


def draw(pipeline, prompt=PROMPT, seed: int | None = 0, **kwargs) -> torch.Tensor:
    guidance = {"guidance_scale": SCALE}
    if hasattr(pipeline, "transformer"):
        guidance |= {"height": 32, "width": 32, "max_sequence_length": 16}
    if isinstance(pipeline, FluxPipeline):
        negative = [""] * len(prompt) if isinstance(prompt, list) else ""
        guidance |= {"true_cfg_scale": SCALE, "negative_prompt": negative}
    kwargs = guidance | {"num_inference_steps": 3, "output_type": "pt"} | kwargs
    if seed is not None:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    return pipeline(prompt, **kwargs).images


def state(pipeline) -> list:
    return [
        (name, layer.active_adapters, layer.disable_adapters, dict(layer.scaling), list(layer.merged_adapters))
        for name, layer in denoiser_of(pipeline).named_modules()
        if isinstance(layer, LoraLayer)
    ]


@torch.no_grad()
def drawn_by_hand(conditional, unconditional, steps: int, negative_prompt: str = "", negative_size=(32, 32)):
    """DDIM (eta 0) with one pipeline for each branch; `torch` alone but for the models themselves."""
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square(), dim=0)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in reversed(range(1, 1000 // steps * steps + 1, 1000 // steps)):
        branches = []
        for pipeline, prompt, size in (
            (unconditional, negative_prompt, negative_size),
            (conditional, PROMPT, (32, 32)),
        ):
            added = {}
            if hasattr(pipeline, "text_encoder_2"):
                embeds, _, pooled, _ = pipeline.encode_prompt(prompt or PROMPT, do_classifier_free_guidance=False)
                if not prompt:  # SDXL's empty prompt is zeros
                    embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
                time_ids = torch.tensor([[*size, 0, 0, 32, 32]]).float()
                added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
            else:
                embeds, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
            branches.append(pipeline.unet(x, t, encoder_hidden_states=embeds, **added).sample)
        prediction = branches[0] + SCALE * (branches[1] - branches[0])
        a, before = alphas[t], alphas[max(t - 1000 // steps, 0)]
        if conditional.scheduler.config.prediction_type == "v_prediction":
            clean, noise = a.sqrt() * x - (1 - a).sqrt() * prediction, a.sqrt() * prediction + (1 - a).sqrt() * x
        else:
            clean, noise = (x - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    vae = conditional.vae
    image = vae.decode(x / vae.config.scaling_factor).sample
    return x, (image / 2 + 0.5).clamp(0, 1)


BRANCHES = {
    "two adapters": ("aligned", "reversed", {"aligned": 1.0}, {"reversed": 1.0}),
    "base": (None, "reversed", None, {"reversed": 1.0}),
    "base by an empty dictionary": ({}, {"reversed": 1.0}, None, {"reversed": 1.0}),
    "weights": (
        {"aligned": 0.6},
        {"aligned": 0.5, "reversed": 0.7},
        {"aligned": 0.6},
        {"aligned": 0.5, "reversed": 0.7},
    ),
    "negative weight": ("aligned", {"aligned": -0.5}, {"aligned": 1.0}, {"aligned": -0.5}),
    "base in the unconditional branch": ("aligned", {}, {"aligned": 1.0}, None),
}


class TestPredictions:
    @pytest.mark.parametrize(
        ("family", "given"),
        [*((family, given) for family in ("sd", "sdxl") for given in BRANCHES), ("sd_v", "two adapters")],
    )
    def test_images_are_those_of_a_loop_by_hand(self, load, branch, family, given):
        """Every step is DDIM's with e_neg(x, "") + g (e_pos(x, prompt) - e_neg(x, "")) of two separate models."""
        positive, negative, *weights = BRANCHES[given]
        pipeline = load(family)
        conditional, unconditional = (branch(family, one) for one in weights)
        plain = draw(pipeline)
        for steps in (1, 3):
            latents, image = drawn_by_hand(conditional, unconditional, steps)
            with negative_preference_guidance(pipeline, positive, negative):
                drawn = draw(pipeline, num_inference_steps=steps, output_type="latent")
                torch.testing.assert_close(drawn, latents, **CLOSE)
                torch.testing.assert_close(draw(pipeline, num_inference_steps=steps), image, **CLOSE)
        assert (plain - image).abs().max() > 1e-2, "the branches are not those of the plain pipeline"

    @pytest.mark.parametrize("family", ["sd", "sdxl"])
    @pytest.mark.parametrize("return_dict", [False, True])
    def test_one_call_of_the_denoiser(self, load, branch, family, return_dict):
        """The first half of the doubled batch is the negative model's, the second half the positive's."""
        pipeline = load(family)
        generator = torch.Generator().manual_seed(2)
        sample = torch.randn(4, 4, 8, 8, generator=generator)
        inputs = {"encoder_hidden_states": torch.randn(4, 12, 32 if family == "sdxl" else 16, generator=generator)}
        if family == "sdxl":
            pooled, time_ids = (torch.rand(4, n, generator=generator) for n in (16, 6))
            inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
        draw(pipeline, num_inference_steps=1)  # with guidance
        with torch.no_grad(), negative_preference_guidance(pipeline, "aligned", "reversed"):
            output = pipeline.unet(sample, 500, **inputs, return_dict=return_dict)
            times = pipeline.unet(sample, torch.tensor([500] * 4), **inputs, return_dict=return_dict)[0]
        prediction = output.sample if return_dict else output[0]
        assert return_dict or isinstance(output, tuple)
        torch.testing.assert_close(times, prediction, **CLOSE)
        for rows, name in ((slice(2), "reversed"), (slice(2, 4), "aligned")):
            alone = branch(family, {name: 1.0}).unet
            half = {key: value[rows] for key, value in inputs.items() if torch.is_tensor(value)}
            if family == "sdxl":
                half["added_cond_kwargs"] = {key: x[rows] for key, x in inputs["added_cond_kwargs"].items()}
            with torch.no_grad():
                torch.testing.assert_close(prediction[rows], alone(sample[rows], 500, **half).sample, **CLOSE)

    def test_conditions_of_sdxl_are_split(self, load, branch):
        """Each branch has its own pooled text and sizes: here, the unconditional one the size of a thumbnail."""
        pipeline = load("sdxl")
        models = [branch("sdxl", {name: 1.0}) for name in ("aligned", "reversed")]
        expected = drawn_by_hand(*models, steps=2, negative_size=(8, 8))[1]
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            drawn = draw(pipeline, num_inference_steps=2, negative_original_size=(8, 8), negative_target_size=(32, 32))
        torch.testing.assert_close(drawn, expected, **CLOSE)
        assert (drawn - drawn_by_hand(*models, steps=2)[1]).abs().max() > 1e-3

    @pytest.mark.parametrize("scale", [1.0, 0.0])
    @pytest.mark.parametrize("positive", ["aligned", {"aligned": 0.4}, None])
    def test_without_guidance_the_positive_model_draws_alone(self, load, branch, scale, positive):
        """A scale of 1 or less has no unconditional branch: what is drawn is the positive model's, bit for bit."""
        weights = {"aligned": 1.0} if positive == "aligned" else positive
        expected = draw(branch("sd", weights), guidance_scale=scale)
        pipeline = load()
        with negative_preference_guidance(pipeline, positive, "reversed"):
            assert torch.equal(draw(pipeline, guidance_scale=scale), expected)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_equal_branches_are_the_plain_pipeline(self, load, branch, family):
        """With one model in both branches, the images are those of the pipeline that has it."""
        pipeline = load(family)
        for weights in ({"aligned": 1.0}, {"aligned": 0.3, "reversed": 0.4}):
            expected = draw(branch(family, weights))
            with negative_preference_guidance(pipeline, weights, weights):
                torch.testing.assert_close(draw(pipeline), expected, **CLOSE)

    def test_a_pipeline_without_adapters(self):
        """It can be given its own weights for both branches, and nothing else."""
        pipeline = tiny.sd_pipeline()
        plain = draw(pipeline)
        with negative_preference_guidance(pipeline, None, {}):
            torch.testing.assert_close(draw(pipeline), plain, **CLOSE)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_several_images_of_several_prompts(self, load, family):
        """Two images of each of two prompts are the four that one draws alone, each from its own noise."""
        pipeline, prompts = load(family), ["a red circle", "a blue square"]
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
            together = draw(pipeline, prompts, None, num_images_per_prompt=2, generator=generators)
            for index in range(4):
                torch.testing.assert_close(together[index], draw(pipeline, prompts[index // 2], index)[0], **CLOSE)
        assert (together[0] - together[1]).abs().max() > 1e-2

    def test_a_negative_prompt_is_read_by_the_negative_model(self, load, branch):
        """Given as text, and both prompts given as embeddings."""
        pipeline = load()
        embeds = [pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in (PROMPT, "a dog")]
        models = [branch("sd", {name: 1.0}) for name in ("aligned", "reversed")]
        expected = drawn_by_hand(*models, steps=3, negative_prompt="a dog")[1]
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            torch.testing.assert_close(draw(pipeline, negative_prompt="a dog"), expected, **CLOSE)
            given = draw(pipeline, None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
            torch.testing.assert_close(given, expected, **CLOSE)
            assert (draw(pipeline) - expected).abs().max() > 1e-3

    def test_a_scale_of_the_call(self, load):
        """`cross_attention_kwargs={"scale": 0.5}` halves the adapters of both branches."""
        pipeline = load()
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            scaled = draw(pipeline, cross_attention_kwargs={"scale": 0.5})
        with negative_preference_guidance(pipeline, {"aligned": 0.5}, {"reversed": 0.5}):
            torch.testing.assert_close(scaled, draw(pipeline), **CLOSE)

    @pytest.mark.parametrize("family", ["sd", "sdxl"])
    def test_other_pipelines_of_the_same_denoiser(self, load, family):
        """Image to image: equal branches give the plain pipeline's images, others do not."""
        components = load(family).components
        pipeline = (
            StableDiffusionImg2ImgPipeline(**components, requires_safety_checker=False)
            if family == "sd"
            else StableDiffusionXLImg2ImgPipeline(**components)
        )
        pipeline.set_progress_bar_config(disable=True)
        start = {"image": tiny.image(0, 32, 32), "strength": 0.7, "num_inference_steps": 5}
        pipeline.set_adapters("aligned")
        plain = draw(pipeline, **start)
        with negative_preference_guidance(pipeline, "aligned", "aligned"):
            torch.testing.assert_close(draw(pipeline, **start), plain, **CLOSE)
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            assert (draw(pipeline, **start) - plain).abs().max() > 1e-2


@torch.no_grad()
def drawn_by_hand_as_a_flow(conditional, unconditional, steps: int, negative_prompt: str = "", skip: float = 0.0):
    """Euler's steps along the velocity of one pipeline for each branch; `skip` weighs SD3's guidance by skipped layers."""
    backbones = [backbone_class_of(pipeline)(pipeline) for pipeline in (unconditional, conditional)]
    scheduler = conditional.scheduler
    mu = {"mu": calculate_shift(16, 4, 64, 0.5, 1.15)} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(steps, sigmas=np.linspace(1, 1 / steps, steps) if mu else None, **mu)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for backbone in backbones:
        backbone.configure(16, 3.0 if isinstance(conditional, FluxPipeline) else None)
    for t, sigma, following in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        branches = [
            backbone.predict(backbone.denoiser, x, t[None], backbone.encode_prompts([prompt]))
            for backbone, prompt in zip(backbones, (negative_prompt, PROMPT), strict=True)
        ]
        prediction = branches[0] + SCALE * (branches[1] - branches[0])
        if skip:
            skipping = partial(conditional.transformer, skip_layers=[0])
            conditions = backbones[1].encode_prompts([PROMPT])
            prediction += skip * (branches[1] - backbones[1].predict(skipping, x, t[None], conditions))
        x = x + (following - sigma) * prediction
    return x


class TestFlowModels:
    def unpacked(self, latents: torch.Tensor) -> torch.Tensor:
        return latents if latents.ndim == 4 else FluxPipeline._unpack_latents(latents, 32, 32, 4)

    @pytest.mark.parametrize("given", BRANCHES)
    @pytest.mark.parametrize("family", ["sd3", "flux"])
    def test_latents_are_those_of_a_loop_by_hand(self, load, branch, family, given):
        """Every step is Euler's with v_neg(x, "") + g (v_pos(x, prompt) - v_neg(x, "")) of two separate models."""
        positive, negative, *weights = BRANCHES[given]
        pipeline = load(family)
        plain = self.unpacked(draw(pipeline, output_type="latent"))
        expected = drawn_by_hand_as_a_flow(*(branch(family, one) for one in weights), steps=3)
        with negative_preference_guidance(pipeline, positive, negative):
            drawn = self.unpacked(draw(pipeline, output_type="latent"))
        torch.testing.assert_close(drawn, expected, **CLOSE)
        assert (plain - drawn).abs().max() > 1e-2, "the branches are not those of the plain pipeline"

    @pytest.mark.parametrize("family", ["sd3", "flux"])
    def test_a_negative_prompt(self, load, branch, family):
        """It is read by the negative model."""
        pipeline = load(family)
        models = [branch(family, {name: 1.0}) for name in ("aligned", "reversed")]
        expected = drawn_by_hand_as_a_flow(*models, steps=2, negative_prompt="a dog")
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            drawn = draw(pipeline, negative_prompt="a dog", num_inference_steps=2, output_type="latent")
        torch.testing.assert_close(self.unpacked(drawn), expected, **CLOSE)

    def test_guidance_by_skipped_layers(self, load, branch):
        """The third call of SD3, with skipped layers, is the positive model's."""
        pipeline = load("sd3")
        expected = drawn_by_hand_as_a_flow(*(branch("sd3", {x: 1.0}) for x in ("aligned", "reversed")), 2, skip=2.0)
        skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_scale": 2.0}
        skipping |= {"skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 2}
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            drawn = draw(pipeline, num_inference_steps=2, output_type="latent", **skipping)
            without = draw(pipeline, num_inference_steps=2, output_type="latent")
        torch.testing.assert_close(drawn, expected, **CLOSE)
        assert (drawn - without).abs().max() > 1e-3

    @pytest.mark.parametrize("steps", [1, 2])
    @pytest.mark.parametrize("missing", [{"true_cfg_scale": 1.0}, {"negative_prompt": None}])
    def test_flux_without_an_unconditional_branch(self, load, missing, steps):
        """It is refused with the arguments to pass, also after images that had one, and the pipeline is as it was."""
        pipeline = load("flux")
        before, image = state(pipeline), draw(pipeline)
        for had_one in (False, True):
            with pytest.raises(ValueError, match="`negative` would have no effect: pass `true_cfg_scale` above 1 and"):
                with negative_preference_guidance(pipeline, "aligned", "reversed"):
                    if had_one:
                        draw(pipeline)
                    draw(pipeline, num_inference_steps=steps, **missing)
            assert state(pipeline) == before and torch.equal(draw(pipeline), image)

    def test_sd3_without_guidance(self, load, branch):
        """At a scale of 1 the positive model draws alone."""
        pipeline = load("sd3")
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            assert torch.equal(
                draw(pipeline, guidance_scale=1.0), draw(branch("sd3", {"aligned": 1.0}), guidance_scale=1.0)
            )

    def test_other_pipelines(self, load):
        """SD3's image to image works like SD's; FLUX.1's does not name its branches, and is refused."""
        start = {"image": tiny.image(0, 32, 32), "strength": 0.7, "num_inference_steps": 5}
        pipeline = StableDiffusion3Img2ImgPipeline(**load("sd3").components)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.set_adapters("aligned")
        plain = draw(pipeline, **start)
        with negative_preference_guidance(pipeline, "aligned", "aligned"):
            torch.testing.assert_close(draw(pipeline, **start), plain, **CLOSE)
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            assert (draw(pipeline, **start) - plain).abs().max() > 1e-2
        with pytest.raises(
            ValueError, match="A `FluxImg2ImgPipeline` does not tell which branch .* Use a `FluxPipeline`"
        ):
            with negative_preference_guidance(FluxImg2ImgPipeline(**load("flux").components), "aligned", "reversed"):
                raise AssertionError("nothing is drawn")

    def test_a_compiled_transformer(self, load):
        """What `torch.compile` wraps is drawn with like the transformer itself."""
        pipeline = load("flux")
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            expected = draw(pipeline)
        pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            torch.testing.assert_close(draw(pipeline), expected, **CLOSE)

    @pytest.mark.parametrize("family", ["sd3", "flux"])
    def test_samples_of_several_prompts(self, load, family):
        """Each image of `sample_images` is what the pipeline draws alone, with one negative prompt for all."""
        pipeline, prompts = load(family), ["a red circle", "a blue square", "a cat"]
        settings = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 16}
        settings |= {"negative_prompt": "a dog", **({"true_cfg_scale": SCALE} if family == "flux" else {})}
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            together = sample_images(pipeline, prompts, batch_size=2, guidance_scale=SCALE, **settings)
            for n, (prompt, image) in enumerate(zip(prompts, together, strict=True)):
                generator = keyed_generator(0, n, "sample")
                alone = draw(pipeline, prompt, None, generator=generator, output_type="np", **settings)[0]
                assert abs(np.asarray(image) / 255 - alone).max() < 1.5 / 255


class TestUnaffected:
    def test_callbacks_and_generators(self, load):
        """A callback comes once a step with the latents of the images, and as many numbers are drawn as without."""
        pipeline, seen, generators = load(), [], []

        def note(pipeline, step, timestep, tensors):
            seen[-1].append((step, int(timestep), tensors["latents"].shape))
            return {}

        def noisy_draw():
            seen.append([])
            generators.append(torch.Generator().manual_seed(0))
            return draw(pipeline, seed=None, generator=generators[-1], eta=1.0, callback_on_step_end=note)

        pipeline.set_adapters("aligned")
        plain = noisy_draw()
        with negative_preference_guidance(pipeline, "aligned", "aligned"):
            torch.testing.assert_close(noisy_draw(), plain, **CLOSE)
        assert seen[0] == seen[1] and [step for step, _, _ in seen[0]] == [0, 1, 2]
        assert torch.equal(generators[0].get_state(), generators[1].get_state())

    def test_a_callback_that_ends_guidance(self, load):
        """Guidance switched off on the way, as diffusers' documentation shows, leaves the positive model alone."""

        def stop(pipeline, step, timestep, tensors):
            if step == 0:
                pipeline._guidance_scale = 1.0
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            return tensors

        stopping = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        pipeline = load()
        pipeline.set_adapters("aligned")
        plain = draw(pipeline, **stopping)
        with negative_preference_guidance(pipeline, "aligned", "aligned"):
            torch.testing.assert_close(draw(pipeline, **stopping), plain, **CLOSE)

    def test_the_global_generator(self, load):
        """Nothing is drawn from torch's global generator beyond what the pipeline draws."""
        pipeline = load()
        before = torch.get_rng_state()
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            draw(pipeline)
        assert torch.equal(torch.get_rng_state(), before)

    def test_hooks_on_the_denoiser(self, load):
        """A hook of torch's sees the doubled batch once a step, as in the plain pipeline."""
        pipeline, rows = load(), []
        pipeline.unet.register_forward_hook(lambda module, args, output: rows.append((len(args[0]), len(output[0]))))
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            draw(pipeline)
        assert rows == [(2, 2)] * 3

    def test_adapters_given_are_not_changed(self, load):
        """The dictionaries stay as they were."""
        positive, negative = {"aligned": 0.5}, {"reversed": 1.0, "aligned": 0.2}
        pipeline = load()
        with negative_preference_guidance(pipeline, positive, negative):
            draw(pipeline)
        assert (positive, negative) == ({"aligned": 0.5}, {"reversed": 1.0, "aligned": 0.2})


SETTINGS = {
    "as loaded": lambda pipeline: None,
    "one adapter": lambda pipeline: pipeline.set_adapters("aligned"),
    "weighted": lambda pipeline: pipeline.set_adapters("aligned", 0.3),
    "two weighted": lambda pipeline: pipeline.set_adapters(["reversed", "aligned"], [0.3, -0.2]),
    "weighted by block": lambda pipeline: pipeline.set_adapters(
        "aligned", {"unet": {"down": 0.3, "mid": 0.1, "up": 0.7}}
    ),
    "disabled": lambda pipeline: pipeline.disable_lora(),
    "weighted and disabled": lambda pipeline: (pipeline.set_adapters("aligned", 0.3), pipeline.disable_lora()),
}


class TestAfterwards:
    @pytest.mark.parametrize(
        ("family", "setting"),
        [*(("sd", setting) for setting in SETTINGS), *((family, "two weighted") for family in ("sd3", "flux"))],
    )
    def test_the_pipeline_is_as_it_was(self, load, family, setting):
        """Active adapters, weights and images are the same to the last bit, however the context was left."""
        pipeline = load(family)
        SETTINGS[setting](pipeline)
        before, image = state(pipeline), draw(pipeline, num_inference_steps=2)

        def fail(*args):
            raise KeyError("stop")

        for positive in ("aligned", None):
            for how in ("end", "exception", "exception while drawing", "no call"):
                try:
                    with negative_preference_guidance(pipeline, positive, {"reversed": 2.0, "aligned": 0.1}):
                        if how != "no call":
                            draw(
                                pipeline,
                                num_inference_steps=1,
                                output_type="latent",
                                callback_on_step_end=fail if how == "exception while drawing" else None,
                            )
                        if how == "exception":
                            fail()
                except KeyError:
                    assert "exception" in how
                assert state(pipeline) == before
                assert torch.equal(draw(pipeline, num_inference_steps=2), image)
        assert not {"forward", "cache_context"} & vars(denoiser_of(pipeline)).keys()

    @pytest.mark.parametrize("trainable", [False, True])
    def test_what_is_trainable_is_as_it_was(self, load, trainable):
        """Weights that were frozen stay frozen, and those in training stay in training."""
        pipeline = load()
        for name, parameter in pipeline.unet.named_parameters():
            parameter.requires_grad_(trainable and "lora_" in name)
        before = {name: parameter.requires_grad for name, parameter in pipeline.unet.named_parameters()}
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            draw(pipeline)
        assert {name: parameter.requires_grad for name, parameter in pipeline.unet.named_parameters()} == before

    def test_adapters_set_inside_are_set_aside(self, load):
        """Calls of `set_adapters` inside change neither what is drawn inside nor what was set before."""
        pipeline = load()
        pipeline.set_adapters("aligned", 0.3)
        before = state(pipeline)
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            expected = draw(pipeline)
            pipeline.set_adapters("reversed", 0.9)
            assert torch.equal(draw(pipeline), expected)
        assert state(pipeline) == before

    def test_one_after_another(self, load):
        """Contexts follow one another without a trace of the first."""
        pipeline = load()
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            first = draw(pipeline)
        with negative_preference_guidance(pipeline, None, "aligned"):
            assert not torch.equal(draw(pipeline), first)
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            assert torch.equal(draw(pipeline), first)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_one_inside_another(self, load, family):
        """The inner one draws with its own adapters, the outer one is itself again after it."""
        pipeline = load(family)
        with negative_preference_guidance(pipeline, None, "aligned"):
            inner = draw(pipeline)
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            outer = draw(pipeline)
            with negative_preference_guidance(pipeline, None, "aligned"):
                torch.testing.assert_close(draw(pipeline), inner, **CLOSE)
            assert torch.equal(draw(pipeline), outer)

    def test_hooks_of_accelerate_survive(self, load):
        """What `enable_model_cpu_offload` puts in place of `forward` works inside, and is still there after."""

        class Count(ModelHook):
            calls = 0

            def pre_forward(self, module, *args, **kwargs):
                self.calls += 1
                return args, kwargs

        pipeline, hook = load(), Count()
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            expected = draw(pipeline)
        add_hook_to_module(pipeline.unet, hook)
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            assert torch.equal(draw(pipeline), expected)
        inside = hook.calls
        assert inside in (3, 6)  # once a step, or once a branch
        draw(pipeline)
        assert hook.calls == inside + 3

    def test_a_compiled_denoiser_stays_compiled(self, load):
        """What `torch.compile` put in place of `forward` is there again."""
        pipeline = load()
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
        compiled = pipeline.unet.forward
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            assert pipeline.unet.forward is not compiled
        assert pipeline.unet.forward is compiled

    @pytest.mark.parametrize("positive", ["aligned", None])
    def test_fused_adapters(self, load, positive):
        """Adapters that are fused into the weights cannot be switched: they are refused, and stay fused."""
        pipeline = load()
        pipeline.set_adapters("aligned")
        pipeline.fuse_lora()
        before, image = state(pipeline), draw(pipeline)
        with pytest.raises(ValueError, match="fuse"):
            with negative_preference_guidance(pipeline, positive, "reversed"):
                draw(pipeline)
        assert state(pipeline) == before
        assert torch.equal(draw(pipeline), image)


class TestRefused:
    def test_unknown_adapter(self, load):
        """An adapter that was not loaded is a ValueError that names it, those that there are, and the remedy."""
        pipeline = load()
        before, image = state(pipeline), draw(pipeline)
        for positive, negative in (
            ("typo", "reversed"),
            ("aligned", "typo"),
            (None, {"aligned": 0.5, "typo": 1.0}),
            ({"typo": 1.0}, "aligned"),
        ):
            with pytest.raises(ValueError, match="no adapter 'typo'; it has 'aligned', 'reversed'") as error:
                with negative_preference_guidance(pipeline, positive, negative):
                    raise AssertionError("nothing is drawn")
            assert "load_lora_weights(..., adapter_name='typo')" in str(error.value)
        assert state(pipeline) == before and torch.equal(draw(pipeline), image)

    def test_no_adapters(self):
        """A pipeline without any says so."""
        with pytest.raises(ValueError, match="no adapter 'reversed'; it has none"):
            with negative_preference_guidance(tiny.sd_pipeline(), None, "reversed"):
                raise AssertionError("nothing is drawn")

    def test_another_family(self, load):
        """A pipeline whose branches are not known is refused by name, with those that are."""
        pipeline = DiTPipeline(torch.nn.Module(), torch.nn.Module(), tiny.scheduler())
        with pytest.raises(ValueError, match="`DiTPipeline`, a family that is not supported yet. Supported are"):
            with negative_preference_guidance(pipeline, None, {}):
                raise AssertionError("nothing is drawn")

    def test_a_deleted_adapter(self, load):
        """One that was loaded and deleted is not there."""
        pipeline = load()
        pipeline.delete_adapters("reversed")
        with pytest.raises(ValueError, match="no adapter 'reversed'; it has 'aligned'"):
            with negative_preference_guidance(pipeline, "aligned", "reversed"):
                raise AssertionError("nothing is drawn")


class TestSampleImages:
    PROMPTS = ["a red circle", "a blue square", "a cat", "a dog", "a cat and a dog"]

    def first_latents(self, pipeline, prompts=PROMPTS, **kwargs) -> torch.Tensor:
        """The noise that each image starts from."""
        seen = []
        hook = pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        sample_images(pipeline, prompts, num_inference_steps=1, guidance_scale=1.0, **kwargs)
        hook.remove()
        return torch.cat(seen)

    @pytest.mark.parametrize("family", ["sd", "sdxl"])
    def test_same_noise_for_every_batch_size(self, load, family):
        """The n-th image starts from the noise of (seed, n), whatever the batch size, the prompts and the model."""
        expected = [torch.randn(4, 8, 8, generator=keyed_generator(0, n, "sample")) for n in range(5)]
        pipeline = load(family, ())
        for batch_size in (1, 2, 5, 8):
            assert torch.equal(self.first_latents(pipeline, batch_size=batch_size), torch.stack(expected))
        assert torch.equal(self.first_latents(pipeline, ["a"] * 3, batch_size=2), torch.stack(expected[:3]))
        assert not (self.first_latents(pipeline, seed=1) == torch.stack(expected)).any()

    @pytest.mark.parametrize("family", ["sd", *tiny.FLOWS])
    def test_same_images_for_every_batch_size(self, family):
        """One image a prompt, in their order, of the size that is asked for: the same but for rounding."""
        pipeline, settings = tiny.PIPELINES[family](), {"num_inference_steps": 2}
        pipeline.set_progress_bar_config(disable=True)
        if family != "sd":
            settings |= {"height": 32, "width": 32, "max_sequence_length": 16}
        drawn = [
            np.stack([np.asarray(image) for image in sample_images(pipeline, self.PROMPTS, 0, size, **settings)])
            for size in (1, 2, 8)
        ]
        drawn = [images.astype(int) for images in drawn]
        assert drawn[0].shape == (5, 32, 32, 3)
        assert max(abs(drawn[0] - other).max() for other in drawn[1:]) <= 1
        alone = pipeline("a cat", generator=keyed_generator(0, 2, "sample"), **settings).images[0]
        assert np.array_equal(np.asarray(alone), drawn[0][2])

    def test_no_prompts(self, load):
        """No prompts, no images."""
        assert sample_images(load(names=()), []) == []

    def test_no_gradients(self, load):
        """Drawing builds no graph, with adapters in training as well."""
        pipeline, outputs = load(), []
        pipeline.unet.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        sample_images(pipeline, ["a cat"], num_inference_steps=1)
        assert not outputs[0].requires_grad

    def test_with_negative_preference_guidance(self, load):
        """Within the context, each image is what the pipeline draws alone."""
        pipeline = load()
        with negative_preference_guidance(pipeline, "aligned", "reversed"):
            together = sample_images(pipeline, self.PROMPTS, batch_size=3, num_inference_steps=2, guidance_scale=SCALE)
            for n, (prompt, image) in enumerate(zip(self.PROMPTS, together)):
                generator = keyed_generator(0, n, "sample")
                alone = draw(pipeline, prompt, None, generator=generator, num_inference_steps=2, output_type="np")[0]
                assert abs(np.asarray(image) / 255 - alone).max() < 1.5 / 255

    def test_the_pipelines_own_progress_bar_comes_back(self, load):
        """What the user had set for the pipeline's bar is set again."""
        pipeline = load(names=())
        pipeline.set_progress_bar_config(desc="mine", disable=False)
        sample_images(pipeline, ["a cat"], num_inference_steps=1)
        assert pipeline._progress_bar_config == {"desc": "mine", "disable": False}


class Recorded(DiffusionPipeline):
    """A pipeline that writes down how it is called; an image comes first, and sides must be numbers."""

    def __init__(self, is_distilled: bool = False):
        super().__init__()
        self.register_to_config(is_distilled=is_distilled)
        self.calls: list[dict] = []

    def __call__(
        self,
        image=None,
        prompt: list[str] | None = None,
        negative_prompt: list[str] | None = None,
        negative_prompt_2: list[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int = 16,
        width: int = 16,
        num_inference_steps: int = 50,
        generator=None,
        output_type: str = "pil",
    ):
        self.calls.append({name: value for name, value in locals().items() if name not in ("self", "generator")})
        assert image is None and output_type == "np"
        return SimpleNamespace(images=np.zeros((len(prompt), height, width, 3)))


class WithTrueGuidance(Backbone):
    """A family whose guidance is written like that of Qwen-Image."""

    pipeline_class = Recorded

    @staticmethod
    def guidance_arguments(scale):
        return {"true_cfg_scale": scale, "negative_prompt": " "}

    @staticmethod
    def sampling_defaults(config):
        return {"guidance_scale": 1.0} if config["is_distilled"] else {}


class TestArguments:
    PROMPTS = ["a red circle", "a blue square", "a cat"]

    def calls(self, monkeypatch, is_distilled=False, **given) -> list[dict]:
        monkeypatch.setattr(sampling, "BACKBONES", (WithTrueGuidance,))
        pipeline = Recorded(is_distilled)
        sample_images(pipeline, self.PROMPTS, batch_size=2, disable_tqdm=True, **given)
        return pipeline.calls

    @pytest.mark.parametrize(
        ("given", "scale", "negative"),
        [
            ({}, 4.0, [" "] * 3),
            ({"guidance_scale": 2.5}, 2.5, [" "] * 3),
            ({"guidance_scale": 2.5, "true_cfg_scale": 7.0, "negative_prompt": "a dog"}, 7.0, ["a dog"] * 3),
            ({"negative_prompt": ["x", "y", "z"]}, 4.0, ["x", "y", "z"]),
            ({"negative_prompt": None}, 4.0, None),
            ({"is_distilled": True}, 1.0, [" "] * 3),
            ({"is_distilled": True, "guidance_scale": 3.0}, 3.0, [" "] * 3),
        ],
    )
    def test_guidance_as_its_users_write_it(self, monkeypatch, given, scale, negative):
        """The family's arguments, at its default or at what is asked for; an argument of the call's own goes before."""
        calls = self.calls(monkeypatch, **given)
        assert [call["true_cfg_scale"] for call in calls] == [scale, scale]
        assert [call["negative_prompt"] for call in calls] == (
            [negative[:2], negative[2:]] if negative else [None, None]
        )
        assert [call["prompt"] for call in calls] == [self.PROMPTS[:2], self.PROMPTS[2:]]

    def test_texts_for_each_prompt(self, monkeypatch):
        """Each batch has its own part of a list; another number of texts than of prompts is refused."""
        calls = self.calls(monkeypatch, negative_prompt_2=["x", "y", "z"])
        assert [call["negative_prompt_2"] for call in calls] == [["x", "y"], ["z"]]
        with pytest.raises(ValueError, match="`negative_prompt` has 2 texts for 3 prompts. Pass one for each, or one"):
            self.calls(monkeypatch, negative_prompt=["x", "y"])

    def test_sides_that_are_left_out(self, monkeypatch):
        """They are the pipeline's, of which some cannot be told None."""
        assert {(call["height"], call["width"]) for call in self.calls(monkeypatch)} == {(16, 16)}
        assert {(call["height"], call["width"]) for call in self.calls(monkeypatch, height=8)} == {(8, 16)}

    def test_an_argument_that_is_not_taken(self, monkeypatch):
        """It is named, in place of a TypeError."""
        with pytest.raises(ValueError, match="A `Recorded` takes no `max_sequence_length`. Leave it out"):
            self.calls(monkeypatch, max_sequence_length=16)

    def test_a_pipeline_of_no_family(self):
        """What holds where no family says otherwise: no guidance where the call has none."""
        pipeline = Recorded()
        sample_images(pipeline, self.PROMPTS, disable_tqdm=True)
        assert pipeline.calls[0]["true_cfg_scale"] == 4.0 and pipeline.calls[0]["negative_prompt"] is None

    def test_the_defaults_of_diffusers(self):
        """Those of the calls, also of a class of the user's own."""

        class Own(StableDiffusionPipeline):
            def __call__(self, prompt, guidance_scale: float = 6.5, **kwargs):
                return super().__call__(prompt, guidance_scale=guidance_scale, **kwargs)

        found = {
            kind: default_guidance(kind)
            for kind in (
                FluxPipeline,
                ZImagePipeline,
                Krea2Pipeline,
                Flux2KleinPipeline,
                SanaPipeline,
                DiTPipeline,
                Own,
            )
        }
        assert list(found.values()) == [3.5, 5.0, 4.5, 4.0, 4.5, 4.0, 6.5]
