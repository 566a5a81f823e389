# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0


from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from examples.tiny_pipelines import make_base_pipeline
from trl_diffusion.data.formats import PREFERENCES, instance_pair_features
from trl_diffusion.masks import instance_masks, instance_regions, normalize_masks
from trl_diffusion.quickstart.crowds import (
    Crowd,
    crowd_dataset,
    crowd_prompts,
    inspect_crowd,
    parse_prompt,
    render,
    sample_crowd,
    score,
    shares_of_colors,
)
from trl_diffusion.quickstart.models import MODELS
from trl_diffusion.quickstart.sampling import generate, load_pipeline, shipped
from trl_diffusion.quickstart.world import BACKGROUND, COLORS, SIZE, Shape, coverage


PROMPT = "a red circle, a blue square and a green triangle"


def random_crowds(n: int, seed: int = 0) -> list[Crowd]:
    rng = np.random.default_rng(seed)
    return [sample_crowd(rng) for _ in range(n)]


def intersection(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def intersection_over_union(a, b) -> float:
    areas = [(x_max - x_min) * (y_max - y_min) for x_min, y_min, x_max, y_max in (a, b)]
    return intersection(a, b) / (sum(areas) - intersection(a, b))


def whole(shape: Shape) -> np.ndarray:
    return coverage(Shape(shape.kind, shape.color, shape.box, False))


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline(MODELS["unet"].crowds)


class TestCrowds:
    def test_prompt_names_the_shapes_from_front_to_back(self):
        """A prompt names colour and kind of A, B and C, and reads back; all words of the example are its own."""
        for crowd in random_crowds(20):
            assert parse_prompt(crowd.prompt) == tuple((shape.color, shape.kind) for shape in crowd.shapes)
        assert parse_prompt(PROMPT) == (("red", "circle"), ("blue", "square"), ("green", "triangle"))

    @pytest.mark.parametrize(
        "prompt", ["a red circle and a blue square", "a red circle, a red square and a green triangle", PROMPT + "!"]
    )
    def test_foreign_prompt_is_refused(self, prompt):
        """A prompt of another world, or with a colour twice, raises a ValueError that shows one that is right."""
        with pytest.raises(ValueError, match="a red circle, a blue square and a green triangle"):
            parse_prompt(prompt)

    def test_all_boxes_overlap_within_the_image(self):
        """
        All shapes lie whole within the image, in three colours. The boxes of any two overlap by a fifth on average. A is not
        hidden at all, B by a tenth, C by a fifth, and at least four tenths of each shape can be seen.
        """
        scenes = random_crowds(300)
        for crowd in scenes:
            assert len({shape.color for shape in crowd.shapes}) == 3
            assert all(0 <= side <= SIZE for shape in crowd.shapes for side in shape.box)
        shared = [
            [intersection(one.shapes[i].box, one.shapes[j].box) / 14.75**2 for i, j in ((0, 1), (0, 2), (1, 2))]
            for one in scenes
        ]
        assert np.min(shared) > 0 and np.mean(shared, axis=0) == pytest.approx([0.22, 0.19, 0.19], abs=0.03)
        hidden = []
        for crowd in scenes:
            a, b, c = (whole(shape) for shape in crowd.shapes)
            hidden.append([(b * a).sum() / b.sum(), (c * np.maximum(a, b)).sum() / c.sum()])
        assert np.mean(hidden, axis=0) == pytest.approx([0.11, 0.21], abs=0.02) and np.max(hidden) < 0.6

    def test_what_is_in_front_covers_what_is_behind(self):
        """Where A is whole there is A's colour, elsewhere B's where B is, then C's, then the background."""
        for crowd in random_crowds(20):
            free, expected = np.ones((SIZE, SIZE)), np.zeros((SIZE, SIZE, 3))
            for shape in crowd.shapes:
                expected += (free * coverage(shape))[..., None] * COLORS[shape.color]
                free *= 1 - coverage(shape)
            expected += free[..., None] * BACKGROUND
            assert np.abs(np.asarray(render(crowd)) - expected).max() <= 0.5 + 1e-9

    def test_bites_can_be_seen(self):
        """At least four fifths of every bite are in view, and there are bites in half of the shapes."""
        flags = []
        for crowd in random_crowds(200, seed=1):
            hidden = np.zeros((SIZE, SIZE))
            for shape in crowd.shapes:
                bite = whole(shape) - coverage(shape)
                assert ((1 - hidden) * bite).sum() >= 0.8 * bite.sum()
                assert (bite.sum() > 0) == shape.defective
                hidden = np.maximum(hidden, coverage(shape))
                flags.append(shape.defective)
        assert np.mean(flags) == pytest.approx(0.5, abs=0.06)  # 3 standard errors of 600 flags

    def test_same_seed_same_crowd(self):
        """Crowds, their renderings and prompts are functions of the seed."""
        first, again, other = random_crowds(5, seed=3), random_crowds(5, seed=3), random_crowds(5, seed=4)
        assert first == again != other
        assert render(first[0]).tobytes() == render(again[0]).tobytes()
        assert crowd_prompts(5, seed=3) == [crowd.prompt for crowd in first] != crowd_prompts(5, seed=4)


class TestOracle:
    @pytest.mark.parametrize("num_crowds", [200, pytest.param(2000, marks=pytest.mark.slow)])
    def test_agrees_with_the_renderer(self, num_crowds):
        """
        On renderings the oracle takes at most 1 of 100 whole shapes for bitten, and at most 1 of 100 bitten ones for whole; of
        A none. It matches 98 of 100 with their prompt and at most 1 of 100 with a wrong one, in each place. Boxes, with what is
        hidden of them, overlap the true ones by 0.8 or more in 96 of 100, and by 0.93 on average.
        """
        scenes, rows = random_crowds(num_crowds, seed=7), []
        for crowd, other in zip(scenes, scenes[1:] + scenes[:1], strict=True):
            image = render(crowd)
            seen, misled = inspect_crowd(image, crowd.prompt), inspect_crowd(image, other.prompt)
            for k, (shape, finding) in enumerate(zip(crowd.shapes, seen, strict=True)):
                right = parse_prompt(other.prompt)[k] == (shape.color, shape.kind)
                overlap = intersection_over_union(finding.box, shape.box) if finding.box else 0.0
                rows.append([shape.defective, finding.clean, finding.match, misled[k].match and not right, overlap])
        defective, clean, match, mistaken, overlap = (
            np.array(rows, dtype=float).reshape(num_crowds, 3, 5).transpose(2, 1, 0)
        )
        for k in range(3):
            bitten = defective[k] == 1
            assert clean[k][~bitten].mean() >= 0.99 and clean[k][bitten].mean() <= (0.01 if k else 0.0)
            assert match[k].mean() >= 0.98 and mistaken[k].mean() <= 0.01
            assert (overlap[k] >= 0.8).mean() >= 0.96 and overlap[k].mean() >= 0.93

    def test_shares_of_colors(self):
        """A pixel halfway between red and yellow is half of each, one of the background has no colour, pure blue is blue."""
        pixels = np.full((SIZE, SIZE, 3), BACKGROUND, dtype=np.uint8)
        pixels[0, 0] = COLORS["blue"]
        pixels[0, 1] = (230, 116, 32)  # the mean of (214, 40, 44) and (246, 192, 20)
        shares = shares_of_colors(Image.fromarray(pixels))
        assert list(COLORS) == ["red", "green", "blue", "yellow"]
        assert shares[:, 0, 0].tolist() == [0, 0, 1, 0]
        assert shares[:, 0, 1] == pytest.approx([0.5, 0, 0, 0.5], abs=1e-3)
        assert shares[:, 1:].max() == 0

    @pytest.mark.parametrize("garbage", ["blank", "noise", "stripes", "flood", "smear"])
    def test_garbage_is_neither_match_nor_clean(self, garbage):
        """A blank image, noise, texture, a flood of colour or a smear matches nothing and is not clean."""
        rng = np.random.default_rng(0)
        pixels = np.array(render(sample_crowd(rng, "a red square, a blue square and a green square", (False,) * 3)))
        if garbage == "blank":
            pixels[:] = BACKGROUND
        elif garbage == "noise":
            pixels = rng.integers(256, size=pixels.shape, dtype=np.uint8)
        elif garbage == "stripes":
            pixels[::2] = BACKGROUND
        elif garbage == "flood":
            pixels[:] = COLORS["red"]
        else:
            pixels[:] = pixels.mean(axis=0, keepdims=True)
        found = inspect_crowd(Image.fromarray(pixels), "a red square, a blue square and a green square")
        assert not any(finding.match or finding.clean for finding in found)

    def test_clean_does_not_ask_for_a_match(self):
        """A whole shape of the wrong colour or kind is clean and no match."""
        image = render(sample_crowd(np.random.default_rng(0), PROMPT, (False, False, False)))
        findings = inspect_crowd(image, "a blue circle, a red triangle and a yellow square")
        assert [(finding.match, finding.clean) for finding in findings] == [(False, True)] * 3

    def test_wrong_size_is_refused(self):
        """An image of another size raises a ValueError that says which size is wanted."""
        with pytest.raises(ValueError, match="32x32"):
            inspect_crowd(Image.new("RGB", (64, 64)), PROMPT)

    def test_scores_are_shares(self):
        """Of three images A is clean in two, B in one, C in all: the scores are these shares, and `clean` is that of B and C."""
        rng = np.random.default_rng(0)
        flags = [(False, False, False), (False, True, False), (True, True, False)]
        images = [render(sample_crowd(rng, PROMPT, each)) for each in flags]
        wrong = PROMPT.replace("red circle", "yellow circle")  # one of nine shapes does not match
        expected = {"clean_a": 2 / 3, "clean_b": 1 / 3, "clean_c": 1.0, "clean": 2 / 3, "match": 8 / 9, "n": 3}
        assert score(images, [PROMPT, PROMPT, wrong]) == pytest.approx(expected)


class TestPairs:
    @pytest.mark.parametrize(
        ("num_pairs", "rates", "ties", "conflicts"),
        [(50, (0.46, 0.2), 20, 37), (10, (0.0, 0.0), 0, 0), (7, (1.0, 0.5), 7, 7)],
    )
    def test_preferences_are_counted_exactly(self, num_pairs, rates, ties, conflicts):
        """A always agrees. Of the 2 n B and C, a share of the tie rate are ties, and of the rest a share of the conflict rate conflicts."""
        rows = crowd_dataset(num_pairs, 0, *rates)["instances"]
        assert all(PREFERENCES[instances[0]["preference"]] == "chosen" for instances in rows)
        others = [PREFERENCES[instance["preference"]] for instances in rows for instance in instances[1:]]
        assert (others.count("tie"), others.count("rejected"), len(others)) == (ties, conflicts, 2 * num_pairs)

    def test_images_tell_what_the_rows_say(self):
        """
        The oracle sees a preferred shape whole and the other bitten, and ties alike, in 98 of 100 instances, and 98 of 100
        shapes as their label names them, in their boxes.
        """
        rows = crowd_dataset(30, seed=5)
        assert rows.features == instance_pair_features()
        verdicts, places = [], []
        for row in rows:
            assert row["chosen"].format == row["rejected"].format == "PNG"
            seen = {side: inspect_crowd(row[side], row["prompt"]) for side in ("chosen", "rejected")}
            for k, instance in enumerate(row["instances"]):
                assert instance["label"] == " ".join(parse_prompt(row["prompt"])[k])
                better = int(seen["chosen"][k].clean) - int(seen["rejected"][k].clean)
                verdicts.append(PREFERENCES[instance["preference"]] == {1: "chosen", -1: "rejected", 0: "tie"}[better])
                for side, findings in seen.items():
                    overlap = intersection_over_union(findings[k].box, instance[f"{side}_box"])
                    places.append(findings[k].match and overlap > 0.7)
        assert np.mean(verdicts) >= 0.98 and np.mean(places) >= 0.98

    def test_same_seed_same_rows(self):
        """The rows, images included, are a function of the seed, and ids are unique."""
        table = [crowd_dataset(6, seed=seed).data.table for seed in (1, 1, 2)]
        assert table[0].equals(table[1]) and not table[0].equals(table[2])
        assert len(set(table[0]["id"].to_pylist())) == 6


def weight_masks(boxes: torch.Tensor, preferences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What each position of the latents weighs if the instances (B, N) are combined by their mean, by the mean of those that cover
    the position, and as a term each with its own sign: three masks (B, 8, 8), with w_neg=0.
    """
    judged, conflicts = preferences != PREFERENCES.index("tie"), preferences == PREFERENCES.index("rejected")
    mean, covering = (instance_masks(boxes, judged, conflicts, 8, 8, 0.0, how) for how in ("mean", "covering"))
    regions, signs = instance_regions(boxes, judged, 8, 8), torch.where(conflicts, -1.0, 1.0)[..., None, None]
    return mean, covering, normalize_masks((regions[:, :-1] * signs).sum(dim=1) + regions[:, -1])


class TestMasks:
    def test_a_position_of_two_instances_that_contradict_each_other(self):
        """
        Where A agrees and B contradicts the label, and both cover a position, its weight is 2/3, 1/2 and 0 of that of the
        background, for mean, covering and a term each; where B stands alone it is 2/3, 0 and -1.
        """
        boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.25, 0.0, 0.75, 0.5], [0.0, 0.75, 0.25, 1.0]]])
        masks = weight_masks(boxes, torch.tensor([[0, 1, 0]]))
        shared, alone, background = ([float(mask[0, 0, x]) for mask in masks] for x in (3, 5, 7))
        assert np.divide(shared, background) == pytest.approx([2 / 3, 1 / 2, 0])
        assert np.divide(alone, background) == pytest.approx([2 / 3, 0, -1])

    def test_the_masks_of_crowds_differ_where_boxes_overlap(self):
        """
        In the cells that are mostly shared by two instances or more, of pairs with a conflict, the weights differ by 0.16 (mean
        and covering), 0.66 (covering and a term each) and 0.79 (mean and a term each) on average; masks have a mean of 1.
        """
        rows = crowd_dataset(200, seed=0)["instances"]
        boxes = torch.tensor([[instance["chosen_box"] for instance in instances] for instances in rows]) / SIZE
        preferences = torch.tensor([[instance["preference"] for instance in instances] for instances in rows])
        mean, covering, grouped = weight_masks(boxes, preferences)
        shared = instance_regions(boxes, preferences != PREFERENCES.index("tie"), 8, 8)[:, :-1].sum(dim=1) > 1.5
        shared &= (preferences == PREFERENCES.index("rejected")).any(dim=1)[:, None, None]
        differences = [
            (a - b).abs()[shared].mean().item() for a, b in ((mean, covering), (covering, grouped), (mean, grouped))
        ]
        assert shared.sum() > 500 and differences == pytest.approx([0.157, 0.658, 0.788], abs=0.02)


class TestBasePipeline:
    def test_folder_is_small(self):
        """The shipped folder is at most 6 MB, weights and all."""
        files = Path(shipped(MODELS["unet"].crowds)).rglob("*")
        assert sum(file.stat().st_size for file in files if file.is_file()) <= 6_000_000

    def test_every_word_is_a_token(self, pipeline):
        """A prompt is one token a word, and one for the comma, between start and end."""
        ids = pipeline.tokenizer(PROMPT).input_ids
        tokens = [token.removesuffix("</w>") for token in pipeline.tokenizer.convert_ids_to_tokens(ids)]
        assert tokens[1:-1] == PROMPT.replace(",", " ,").split() and len(ids) == pipeline.tokenizer.model_max_length

    def test_vae_keeps_the_defect(self, pipeline):
        """After a round trip through the VAE the oracle still is right in 97 of 100; latents have unit std."""
        scenes = random_crowds(100, seed=2)
        pixels = torch.stack([torch.from_numpy(np.array(render(crowd))) for crowd in scenes])
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
            images = pipeline.image_processor.postprocess(pipeline.vae.decode(latents).sample)
        assert (latents * pipeline.vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.05)
        verdicts = [
            [finding.match, finding.clean != shape.defective]
            for crowd, image in zip(scenes, images, strict=True)
            for finding, shape in zip(inspect_crowd(image, crowd.prompt), crowd.shapes, strict=True)
        ]
        assert (np.mean(verdicts, axis=0) >= 0.97).all()

    def test_draws_what_the_prompt_names(self, pipeline):
        """The base draws nine of ten shapes as it is asked, and each of A, B and C clean neither always nor never."""
        prompts = crowd_prompts(64, seed=0)
        scores = score(generate(pipeline, prompts, seed=0), prompts)
        assert scores["match"] >= 0.9
        assert all(0.25 <= scores[f"clean_{label}"] <= 0.75 for label in "abc")

    def test_the_script_makes_such_a_pipeline(self, tmp_path, monkeypatch, pipeline):
        """What the script makes of this world draws its prompts, and has the parts of the shipped pipeline."""
        flags = ["--num_scenes", "64", "--num_vae_steps", "2", "--num_steps", "2", "--num_samples", "0"]
        monkeypatch.setattr("sys.argv", ["make", "--world", "crowds", "--output_dir", str(tmp_path), *flags])
        make_base_pipeline.main()
        made = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
        assert made(PROMPT, num_inference_steps=1).images[0].size == (SIZE, SIZE)
        assert made.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
        for ours, shipped_one in ((made.unet, pipeline.unet), (made.text_encoder, pipeline.text_encoder)):
            assert {name: p.shape for name, p in ours.named_parameters()} == {
                name: p.shape for name, p in shipped_one.named_parameters()
            }
