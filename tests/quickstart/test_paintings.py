# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0


from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Image, List, Value
from diffusers import StableDiffusionPipeline
from PIL import Image as PILImage
from PIL import ImageFilter

from examples.tiny_pipelines import make_base_pipeline, make_painting_expert
from trl_diffusion.criteria import Criteria
from trl_diffusion.quickstart import paintings
from trl_diffusion.quickstart.paintings import (
    ATTRIBUTES,
    Painting,
    PaintingFinding,
    inspect_painting,
    painting_dataset,
    parse_prompt,
    render,
    sample_painting,
)
from trl_diffusion.quickstart.world import BACKGROUND, COLORS, KINDS, SIZE, evaluation_prompts
from trl_diffusion.trainer.attributes import read_expert


FOLDER = Path(paintings.__file__).parent
PAINTING_BASE = FOLDER / "painting_base"


def random_paintings(n: int, seed: int = 0) -> list[Painting]:
    rng = np.random.default_rng(seed)
    return [sample_painting(rng) for _ in range(n)]


def shares_right(findings: list[PaintingFinding], painted: list[Painting]) -> np.ndarray:
    """How often the oracle is right on the match, then on each attribute."""
    return np.mean(
        [
            [finding.match]
            + [(name in finding.negative_attributes) == (name in one.negative_attributes) for name in ATTRIBUTES]
            for finding, one in zip(findings, painted, strict=True)
        ],
        axis=0,
    )


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(PAINTING_BASE, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class TestPaintings:
    def test_words_are_those_of_the_criteria(self):
        """The four attributes are the leaves of `criteria.yaml`, in its order and its words, each one word."""
        leaves = Criteria.load(FOLDER / "criteria.yaml").attributes
        assert {leaf.id: (leaf.positive, leaf.negative) for leaf in leaves} == ATTRIBUTES
        assert [leaf.id for leaf in leaves] == list(ATTRIBUTES)
        assert all(word.isalpha() for pair in ATTRIBUTES.values() for word in pair)

    def test_prompt_names_colour_and_kind(self):
        """A prompt names colour and kind and reads back, and a painting can be asked for by its prompt."""
        for painting in random_paintings(20):
            assert parse_prompt(painting.prompt) == (painting.shape.color, painting.shape.kind)
            assert sample_painting(np.random.default_rng(0), painting.prompt).prompt == painting.prompt

    @pytest.mark.parametrize("prompt", ["a purple hexagon", "a red circle, whole", "a red circle and a blue square"])
    def test_foreign_prompt_is_refused(self, prompt):
        """A prompt that is not of this world, or has attribute words, raises a ValueError that shows one that is."""
        with pytest.raises(ValueError, match="'a red circle'"):
            parse_prompt(prompt)

    def test_each_quality_is_negative_half_of_the_time(self):
        """Each of the four is negative in half of the paintings, independently, so that one in 16 has no negative."""
        counts = np.array([[name in one.negative_attributes for name in ATTRIBUTES] for one in random_paintings(4000)])
        assert counts.mean(0) == pytest.approx(0.5, abs=0.035)  # more than four standard errors
        assert np.mean(counts.sum(1) == 0) == pytest.approx(1 / 16, abs=0.016)
        assert np.corrcoef(counts.T) == pytest.approx(np.eye(4), abs=0.07)

    def test_attributes_are_in_one_of_two_lists(self):
        """Asked for negatives, a painting has just these, in the order of the tree, and the others are positive."""
        painting = sample_painting(np.random.default_rng(0), "a red circle", {"ground", "chroma"})
        assert painting.negative_attributes == ("chroma", "ground")
        assert painting.positive_attributes == ("outline", "placement")

    def test_shapes_lie_within_the_image(self):
        """Every shape lies whole within the image and leaves the edge to the ground."""
        boxes = np.array([painting.shape.box for painting in random_paintings(500)])
        assert boxes.min() >= 1 and boxes.max() <= SIZE - 1

    def test_same_seed_same_painting(self):
        """Paintings, their renderings and the prompts of an evaluation are functions of the seed."""
        first, again, other = random_paintings(5, seed=3), random_paintings(5, seed=3), random_paintings(5, seed=4)
        assert first == again != other
        assert render(first[0]).tobytes() == render(again[0]).tobytes()
        prompts = [evaluation_prompts(5, seed, sample_painting) for seed in (3, 3, 4)]
        assert prompts[0] == prompts[1] != prompts[2]
        assert prompts[0] == [painting.prompt for painting in first]


class TestOracle:
    @pytest.mark.parametrize(("blur", "noise", "share"), [(0.0, 0.0, 0.99), (0.6, 6.0, 0.95)])
    def test_agrees_with_the_renderer(self, blur, noise, share):
        """
        On 500 renderings the oracle is right at least 99 times in 100 on the match and on each attribute, and 95 times
        after a blur of 0.6 pixels and noise of 6 levels, as autoencoders leave them.
        """
        rng, painted, findings = np.random.default_rng(1), random_paintings(500), []
        for painting in painted:
            pixels = np.asarray(render(painting).filter(ImageFilter.GaussianBlur(blur)))
            pixels = np.clip(pixels + noise * rng.standard_normal(pixels.shape), 0, 255).round().astype(np.uint8)
            findings.append(inspect_painting(PILImage.fromarray(pixels), painting.prompt))
        assert (shares_right(findings, painted) >= share).all()

    def test_every_attribute_is_in_one_of_two_lists(self):
        """What is found has each attribute once, in the order of the tree."""
        for painting in random_paintings(20):
            finding = inspect_painting(render(painting), painting.prompt)
            assert sorted(finding.positive_attributes + finding.negative_attributes) == sorted(ATTRIBUTES)
            for found in (finding.positive_attributes, finding.negative_attributes):
                assert found == tuple(name for name in ATTRIBUTES if name in found)

    @pytest.mark.parametrize("negatives", [(), ("chroma", "ground"), tuple(ATTRIBUTES)])
    @pytest.mark.parametrize(("color", "kind"), [("red", "circle"), ("green", "triangle"), ("yellow", "square")])
    def test_only_the_prompt_named_is_a_match(self, color, kind, negatives):
        """Of the twelve prompts one matches, and what is found besides does not depend on the prompt."""
        image = render(sample_painting(np.random.default_rng(0), f"a {color} {kind}", negatives))
        findings = {
            prompt: inspect_painting(image, prompt) for prompt in (f"a {c} {k}" for c in COLORS for k in KINDS)
        }
        assert [prompt for prompt, finding in findings.items() if finding.match] == [f"a {color} {kind}"]
        assert {finding.negative_attributes for finding in findings.values()} == {negatives}

    @pytest.mark.parametrize("garbage", ["blank", "murky", "noise", "stripes", "flood", "smear"])
    def test_garbage_is_no_match(self, garbage):
        """A blank canvas, noise, texture, a flood of colour or a smear is no match, and but for its ground all negative."""
        rng = np.random.default_rng(0)
        pixels = np.array(render(sample_painting(rng, "a red circle", ())))
        if garbage == "blank":
            pixels[:] = BACKGROUND
        elif garbage == "murky":
            pixels[:] = paintings.MURKY
        elif garbage == "noise":
            pixels = rng.integers(256, size=pixels.shape, dtype=np.uint8)
        elif garbage == "flood":
            pixels[:] = COLORS["red"]
        elif garbage == "stripes":
            pixels[::2] = BACKGROUND
        else:
            pixels[:] = pixels.mean(0, keepdims=True)
        finding = inspect_painting(PILImage.fromarray(pixels), "a red circle")
        assert not finding.match
        assert set(finding.negative_attributes) >= {"outline", "chroma", "placement"}

    def test_wrong_size_is_refused(self):
        """An image of another size raises a ValueError that says which size is wanted."""
        with pytest.raises(ValueError, match="32x32"):
            inspect_painting(PILImage.new("RGB", (64, 64)), "a red circle")


class TestPaintingDataset:
    def test_features(self):
        """The columns are those that training on attributes reads."""
        assert painting_dataset(2, seed=0).features == {
            "id": Value("string"),
            "prompt": Value("string"),
            "image": Image(),
            "positive_attributes": List(Value("string")),
            "negative_attributes": List(Value("string")),
        }

    def test_images_show_what_the_rows_say(self):
        """Images decode, and in every one the oracle sees the prompt and the attributes of its row."""
        for row in painting_dataset(30, seed=5):
            finding = inspect_painting(row["image"], row["prompt"])
            assert row["image"].format == "PNG" and row["image"].size == (SIZE, SIZE)
            assert finding.match
            assert list(finding.positive_attributes) == row["positive_attributes"]
            assert list(finding.negative_attributes) == row["negative_attributes"]

    def test_same_seed_same_rows(self):
        """The rows, images included, are a function of the seed, and ids are unique and say the seed."""
        table = [painting_dataset(6, seed=seed).data.table for seed in (1, 1, 2)]
        assert table[0].equals(table[1]) and not table[0].equals(table[2])
        assert table[0]["id"].to_pylist() == [f"painting-1-{i:05d}" for i in range(6)]


class TestPaintingBase:
    def test_folder_is_small(self):
        """The shipped folder is at most 6 MB, weights and all."""
        assert sum(file.stat().st_size for file in PAINTING_BASE.rglob("*") if file.is_file()) <= 6_000_000

    def test_every_word_is_a_token(self, pipeline):
        """Each word and each comma is one token between start and end, and the longest prompt fits."""
        for color, kind, form in [("red", "circle", 0), ("yellow", "triangle", 1)]:
            words = ", ".join([f"a {color} {kind}", *(pair[form] for pair in ATTRIBUTES.values())])
            ids = pipeline.tokenizer(words).input_ids
            tokens = [token.removesuffix("</w>") for token in pipeline.tokenizer.convert_ids_to_tokens(ids)]
            assert tokens[1:-1] == words.replace(",", " ,").split()
            assert len(ids) <= pipeline.tokenizer.model_max_length == 16

    def test_attribute_words_are_told_apart(self, pipeline):
        """What the encoder says of the words that no caption had differs as much as what it says of red and blue."""

        def states(prompt):
            ids = pipeline.tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
            with torch.no_grad():
                return pipeline.text_encoder(ids)[0][0]

        words = [positive for positive, _ in ATTRIBUTES.values()]
        prompt = states(", ".join(["a red circle", *words]))
        trained = (prompt - states(", ".join(["a blue circle", *words])))[2].norm()
        for index, (positive, negative) in enumerate(ATTRIBUTES.values()):
            others = [negative if word == positive else word for word in words]
            silent = (prompt - states(", ".join(["a red circle", *others])))[5 + 2 * index].norm()
            assert silent > 0.7 * trained

    def test_vae_keeps_the_qualities(self, pipeline):
        """After a round trip through the VAE the oracle still is right at least 98 times in 100; latents have unit std."""
        painted = random_paintings(200, seed=2)
        pixels = torch.stack([torch.from_numpy(np.array(render(painting))) for painting in painted])
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
            images = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)
        assert (latents * pipeline.vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.05)
        findings = [inspect_painting(image, one.prompt) for image, one in zip(images, painted, strict=True)]
        assert (shares_right(findings, painted) >= 0.98).all()

    def test_draws_what_the_prompt_names(self, pipeline):
        """The base draws what it is asked for, with about two negatives, none of them always or never."""
        prompts = evaluation_prompts(32, 0, sample_painting)
        images = pipeline(
            prompts, num_inference_steps=10, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)
        ).images
        findings = [inspect_painting(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        negatives = np.array([[name in finding.negative_attributes for name in ATTRIBUTES] for finding in findings])
        assert np.mean([finding.match for finding in findings]) >= 0.9
        assert 1.2 <= negatives.sum(1).mean() <= 2.4  # 1.8 on many images, give or take three standard errors
        assert (negatives.mean(0) > 0).all() and (negatives.mean(0) < 1).all()


def test_the_script_that_makes_the_base_runs_and_repeats_itself(tmp_path, monkeypatch):
    """The same seed and step counts give the same weights, of the shapes that are shipped."""
    weights = []
    for name in ("first", "second"):
        flags = ["--num_scenes", "64", "--num_vae_steps", "3", "--num_steps", "3", "--num_samples", "0"]
        command = ["make_base_pipeline", "--world", "paintings", "--output_dir", str(tmp_path / name), *flags]
        monkeypatch.setattr("sys.argv", command)
        make_base_pipeline.main()
        made = StableDiffusionPipeline.from_pretrained(tmp_path / name, local_files_only=True)
        weights.append([*made.unet.parameters(), *made.vae.parameters(), *made.text_encoder.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))
    shipped = StableDiffusionPipeline.from_pretrained(PAINTING_BASE, local_files_only=True)
    for ours, theirs in ((made.unet, shipped.unet), (made.text_encoder, shipped.text_encoder)):
        assert {name: p.shape for name, p in ours.named_parameters()} == {
            name: p.shape for name, p in theirs.named_parameters()
        }
    assert made.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()


@pytest.mark.parametrize(("form", "low", "high"), [("positive", 0.0, 0.7), ("negative", 3.3, 4.0)])
def test_the_expert_draws_the_qualities_as_they_are_named(form, low, high):
    """With all attributes positive it draws hardly any negative, with all of them negative nearly nothing else."""
    pipeline = StableDiffusionPipeline.from_pretrained(PAINTING_BASE, local_files_only=True)
    pipeline.load_lora_weights(str(PAINTING_BASE.parent / "painting_expert"))
    scores = make_painting_expert.measure(pipeline, form, num_samples=32, seed=1)
    assert low <= scores["negatives"] <= high and scores["match"] >= 0.9


def test_the_script_that_makes_the_expert_runs(tmp_path, monkeypatch):
    """At a few steps it writes what the second stage takes: a LoRA, and what it was trained on, as shipped."""
    flags = ["--num_paintings", "64", "--max_steps", "2", "--num_samples", "0"]
    monkeypatch.setattr("sys.argv", ["make_painting_expert", "--output_dir", str(tmp_path), *flags])
    threads = torch.get_num_threads()
    make_painting_expert.main()
    torch.set_num_threads(threads)
    made, _, described = read_expert(tmp_path)
    shipped, _, shipped_description = read_expert(PAINTING_BASE.parent / "painting_expert")
    assert described == shipped_description
    assert {name: weight.shape for name, weight in made.items()} == {
        name: weight.shape for name, weight in shipped.items()
    }
