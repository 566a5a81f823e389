# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0


from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Image, List, Value
from diffusers import StableDiffusionPipeline
from PIL import Image as PILImage

from examples.tiny_pipelines import make_base_pipeline
from trl_diffusion.quickstart import world
from trl_diffusion.quickstart.world import (
    COLORS,
    KINDS,
    PLACES,
    Scene,
    Shape,
    evaluation_prompts,
    inspect_image,
    judge,
    parse_prompt,
    preference_dataset,
    render,
    sample_scene,
)


BASE_PIPELINE = Path(world.__file__).parent / "base_pipeline"


def random_scenes(n: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(n)]


def intersection_over_union(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(BASE_PIPELINE, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class TestScenes:
    def test_prompt_names_a_then_b(self):
        """A prompt names colour and kind of A, then of B, and reads back."""
        for scene in random_scenes(20):
            assert parse_prompt(scene.prompt) == tuple((shape.color, shape.kind) for shape in scene.shapes)

    def test_foreign_prompt_is_refused(self):
        """A prompt that is not of this world raises a ValueError that shows one that is."""
        with pytest.raises(ValueError, match="a red circle and a blue square"):
            parse_prompt("a purple hexagon")

    def test_shapes_keep_to_their_places(self):
        """A is left of B, larger, and both lie whole within the image."""
        for scene in random_scenes(200):
            a, b = (shape.box for shape in scene.shapes)
            assert 0 <= a[0] and a[2] <= PLACES[1].columns[0] <= b[0] and b[2] <= world.SIZE
            assert min(a[1], b[1]) >= 0 and max(a[3], b[3]) <= world.SIZE
            assert a[2] - a[0] > b[2] - b[0]

    @pytest.mark.parametrize("kind", KINDS)
    def test_areas(self, kind):
        """A whole shape covers its share of its box, and a bite takes about a fifth of that, wherever it is."""
        box = (4.0, 6.0, 20.0, 22.0)
        whole = world.coverage(Shape(kind, "red", box, False)).sum()
        assert whole == pytest.approx(world.AREA[kind] * 16 * 16, rel=0.02)
        for bite_at in np.linspace(0, 1, 12, endpoint=False):
            bitten = world.coverage(Shape(kind, "red", box, True, bite_at)).sum()
            assert bitten / whole == pytest.approx(1 - world.BITE_AREA, abs=0.05)

    def test_same_seed_same_scene(self):
        """Scenes, their renderings and the prompts of an evaluation are functions of the seed."""
        first, again, other = random_scenes(5, seed=3), random_scenes(5, seed=3), random_scenes(5, seed=4)
        assert first == again != other
        assert render(first[0]).tobytes() == render(again[0]).tobytes()
        assert evaluation_prompts(5, seed=3) == evaluation_prompts(5, seed=3) != evaluation_prompts(5, seed=4)


class TestOracle:
    def test_agrees_with_the_renderer(self):
        """On renderings the oracle is right at least 99 times in 100 on match, on a wrong prompt, and on clean."""
        scenes, verdicts = random_scenes(200), []
        for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True):
            image = render(scene)
            findings, misled = inspect_image(image, scene.prompt), inspect_image(image, other.prompt)
            for i, shape in enumerate(scene.shapes):
                same = parse_prompt(other.prompt)[i] == (shape.color, shape.kind)
                verdicts.append([findings[i].match, misled[i].match == same, findings[i].clean != shape.defective])
        assert (np.mean(verdicts, axis=0) >= 0.99).all()

    def test_finds_the_box(self):
        """At least 95 boxes in 100 overlap the true one by 0.9 or more, bitten or not."""
        overlaps = []
        for scene in random_scenes(150, seed=1):
            for finding, shape in zip(inspect_image(render(scene), scene.prompt), scene.shapes, strict=True):
                overlaps.append(intersection_over_union(finding.box, shape.box))
        assert np.mean(np.array(overlaps) >= 0.9) >= 0.95

    @pytest.mark.parametrize("garbage", ["blank", "noise", "stripes", "flood", "smear"])
    def test_garbage_is_neither_match_nor_clean(self, garbage):
        """A blank image, noise, texture, a flood of colour or a smear matches nothing and is not clean."""
        rng = np.random.default_rng(0)
        prompt = "a red circle and a red square"
        if garbage == "blank":
            image = PILImage.new("RGB", (world.SIZE, world.SIZE), world.BACKGROUND)
        elif garbage == "noise":
            image = PILImage.fromarray(rng.integers(256, size=(world.SIZE, world.SIZE, 3), dtype=np.uint8))
        elif garbage == "flood":
            image = PILImage.new("RGB", (world.SIZE, world.SIZE), COLORS["red"])
        elif garbage == "stripes":
            pixels = np.array(render(sample_scene(rng, prompt, (False, False))))
            pixels[::2] = world.BACKGROUND
            image = PILImage.fromarray(pixels)
        else:
            pixels = np.array(render(sample_scene(rng, prompt, (False, False))))
            image = PILImage.fromarray(np.tile(pixels.mean(0, keepdims=True), (world.SIZE, 1, 1)).astype(np.uint8))
        assert [(finding.match, finding.clean) for finding in inspect_image(image, prompt)] == [(False, False)] * 2

    def test_clean_does_not_ask_for_a_match(self):
        """A whole shape of the wrong colour or kind is clean and no match."""
        rng = np.random.default_rng(0)
        image = render(sample_scene(rng, "a red circle and a blue square", (False, False)))
        findings = inspect_image(image, "a green circle and a blue triangle")
        assert [(finding.match, finding.clean) for finding in findings] == [(False, True), (False, True)]

    def test_wrong_size_is_refused(self):
        """An image of another size raises a ValueError that says which size is wanted."""
        with pytest.raises(ValueError, match="32x32"):
            inspect_image(PILImage.new("RGB", (64, 64)), "a red circle and a blue square")

    def test_judge_is_antisymmetric(self):
        """The judge prefers the whole shape, swaps its verdict with the images, and calls equals a tie."""
        rng = np.random.default_rng(0)
        prompt = "a red circle and a blue square"
        first, second = (render(sample_scene(rng, prompt, flags)) for flags in [(False, True), (True, False)])
        assert judge(first, second, prompt) == ["first", "second"]
        assert judge(second, first, prompt) == ["second", "first"]
        assert judge(first, first, prompt) == ["tie", "tie"]


class TestPreferenceDataset:
    def test_features(self):
        """The columns are those that instance-aware preference training reads."""
        features = preference_dataset(2, seed=0).features
        assert list(features) == ["id", "prompt", "chosen", "rejected", "instances"]
        assert features["chosen"] == features["rejected"] == Image()
        assert features["instances"] == List(
            {
                "label": Value("string"),
                "chosen_box": List(Value("float32"), length=4),
                "rejected_box": List(Value("float32"), length=4),
                "preference": ClassLabel(names=["chosen", "rejected", "tie"]),
            }
        )

    @pytest.mark.parametrize(("num_pairs", "conflict_rate", "conflicts"), [(50, 0.46, 23), (10, 0.0, 0), (7, 1.0, 7)])
    def test_conflicts_are_counted_exactly(self, num_pairs, conflict_rate, conflicts):
        """Exactly round(conflict_rate * num_pairs) pairs have the clean B in the rejected image, and A always agrees."""
        rows = preference_dataset(num_pairs, seed=0, conflict_rate=conflict_rate)["instances"]
        assert all(instances[0]["preference"] == 0 for instances in rows)
        assert sum(instances[1]["preference"] == 1 for instances in rows) == conflicts

    def test_images_tell_what_the_rows_say(self):
        """In every pair the oracle sees the preferred instance clean and the other not, both in their boxes."""
        for row in preference_dataset(30, seed=5):
            seen = {side: inspect_image(row[side], row["prompt"]) for side in ("chosen", "rejected")}
            assert row["chosen"].format == row["rejected"].format == "PNG"
            for i, instance in enumerate(row["instances"]):
                better = ("chosen", "rejected")[instance["preference"]]
                assert instance["label"] == " ".join(parse_prompt(row["prompt"])[i])
                for side, findings in seen.items():
                    assert findings[i].match and findings[i].clean == (side == better)
                    assert intersection_over_union(findings[i].box, instance[f"{side}_box"]) > 0.85

    def test_same_seed_same_rows(self):
        """The rows, images included, are a function of the seed, and ids are unique."""
        table = [preference_dataset(6, seed=seed).data.table for seed in (1, 1, 2)]
        assert table[0].equals(table[1]) and not table[0].equals(table[2])
        assert len(set(table[0]["id"].to_pylist())) == 6


class TestBasePipeline:
    def test_folder_is_small(self):
        """The shipped folder is at most 6 MB, weights and all."""
        assert sum(file.stat().st_size for file in BASE_PIPELINE.rglob("*") if file.is_file()) <= 6_000_000

    def test_every_word_is_a_token(self, pipeline):
        """A prompt is one token a word between start and end, and the empty prompt is as long when padded."""
        ids = pipeline.tokenizer(["a red circle and a blue square", ""], padding="max_length").input_ids
        assert len(ids[0]) == len(ids[1]) == 10
        tokens = [token.removesuffix("</w>") for token in pipeline.tokenizer.convert_ids_to_tokens(ids[0])]
        assert tokens[1:8] == "a red circle and a blue square".split()

    def test_vae_keeps_the_defect(self, pipeline):
        """After a round trip through the VAE the oracle still is right at least 99 times in 100; latents have unit std."""
        scenes = random_scenes(100, seed=2)
        pixels = torch.stack([torch.from_numpy(np.array(render(scene))) for scene in scenes])
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
            images = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)
        assert (latents * pipeline.vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.05)
        verdicts = [
            [finding.match, finding.clean != shape.defective]
            for scene, image in zip(scenes, images, strict=True)
            for finding, shape in zip(inspect_image(image, scene.prompt), scene.shapes, strict=True)
        ]
        assert (np.mean(verdicts, axis=0) >= 0.99).all()

    def test_draws_what_the_prompt_names(self, pipeline):
        """The base draws what it is asked for, and clean shapes neither always nor never."""
        prompts = evaluation_prompts(64, seed=0)
        images = pipeline(
            prompts, num_inference_steps=10, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)
        ).images
        findings = [inspect_image(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        match_a, match_b = np.mean([[finding.match for finding in pair] for pair in findings], axis=0)
        clean_a, clean_b = np.mean([[finding.clean for finding in pair] for pair in findings], axis=0)
        assert match_a >= 0.93 and match_b >= 0.93
        assert 0.25 <= clean_a <= 0.75 and 0.25 <= clean_b <= 0.75

    def test_it_denoises_what_a_trainer_encodes(self, pipeline):
        """
        On latents sampled from the posterior, as trainers take them, the base predicts noise as well as on the means: its
        errors are a small part of the noise's variance of 1.
        """
        scenes = random_scenes(32, seed=3)
        pixels = torch.stack([torch.from_numpy(np.array(render(scene))) for scene in scenes])
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            posterior = pipeline.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
            latents = posterior.sample(generator) * pipeline.vae.config.scaling_factor
            noise = torch.randn(latents.shape, generator=generator)
            timesteps = torch.arange(32) * 31
            noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
            prompts = [scene.prompt for scene in scenes]
            prompt_embeds, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
            error = (pipeline.unet(noisy, timesteps, prompt_embeds).sample - noise).square().mean().item()
        assert posterior.std.max() < 1e-3
        assert error < 0.1


def test_the_script_that_makes_the_pipeline_runs_and_repeats_itself(tmp_path, monkeypatch):
    """The same seed and step counts give the same weights; the folder is a pipeline that draws."""
    weights = []
    for name in ("first", "second"):
        flags = ["--num_scenes", "64", "--num_vae_steps", "3", "--num_steps", "3", "--num_samples", "0"]
        monkeypatch.setattr("sys.argv", ["make_base_pipeline", "--output_dir", str(tmp_path / name), *flags])
        make_base_pipeline.main()
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / name, local_files_only=True)
        weights.append([*pipeline.unet.parameters(), *pipeline.vae.parameters(), *pipeline.text_encoder.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))
    assert pipeline("a red circle and a blue square", num_inference_steps=1).images[0].size == (32, 32)
    shipped = StableDiffusionPipeline.from_pretrained(BASE_PIPELINE, local_files_only=True)
    for made, ours in ((pipeline.unet, shipped.unet), (pipeline.text_encoder, shipped.text_encoder)):
        assert {name: p.shape for name, p in made.named_parameters()} == {
            name: p.shape for name, p in ours.named_parameters()
        }
