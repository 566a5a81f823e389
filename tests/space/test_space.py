# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What the Space computes, without its interface."""

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.space.conftest import SPACE
from trl_diffusion import Criteria, attribute_features
from trl_diffusion.quickstart.cpo import CRITERIA
from trl_diffusion.quickstart.paintings import inspect_painting, painting_dataset
from trl_diffusion.quickstart.world import evaluation_prompts, inspect_image, preference_dataset


PROMPT = "a green triangle and a yellow circle"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def painter():
    """The scenes with all their LoRAs."""
    sys.path.insert(0, str(SPACE))
    try:
        from painter import Painter
        from worlds import embedded_worlds

        return Painter(embedded_worlds()[0])
    finally:
        sys.path.remove(str(SPACE))


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(first, second) -> bool:
    return np.array_equal(pixels(first), pixels(second))


# ----- generating -----


def test_one_noise(painter):
    """The base drawn again after every other model is the same to the bit, and another seed is another image."""
    before = painter.draw("Base", PROMPT, seed=3)
    for title in painter.titles[1:]:
        painter.draw(title, PROMPT, seed=3, scale=1.5, npo=True)
    assert same(before, painter.draw("Base", PROMPT, seed=3))
    assert not same(before, painter.draw("Base", PROMPT, seed=4))


@pytest.mark.parametrize("npo", [False, True])
@pytest.mark.parametrize("title", ["Diffusion-DPO", "IAPO"])
def test_scale_0_is_the_base(painter, title, npo):
    """A LoRA of strength 0 draws the base's image to the bit; one half lies between, and is neither end."""
    base, half, whole = (painter.draw(title, PROMPT, 0, scale, npo) for scale in (0.0, 0.5, 1.0))
    assert same(base, painter.draw("Base", PROMPT, 0))
    assert not same(base, half) and not same(half, whole)


def test_a_strength_scales_the_weights(painter):
    """Strength s is the update of the LoRA times s: the noise prediction differs from that with s / 2, and each layer's scaling is s."""
    painter.draw("IAPO", PROMPT, 0, 0.75)
    layers = [module for module in painter.pipeline.unet.modules() if hasattr(module, "scaling") and module.scaling]
    adapter = painter.adapters["IAPO"]
    assert layers and all(layer.scaling[adapter] == 0.75 for layer in layers)
    assert all(layer.active_adapters == [adapter] for layer in layers)


def test_npo_is_the_guidance_of_two_models(painter):
    """With NPO a step's prediction is eps_neg + g (eps_pos - eps_neg), the reversed LoRA on top of the other, computed here one by one."""
    unet, scheduler = painter.pipeline.unet, painter.pipeline.scheduler
    guidance = painter.world.guidance_scale
    seen, step = [], scheduler.step

    def spied(noise_pred, timestep, sample, *args, **kwargs):
        seen.append((noise_pred.clone(), timestep, sample.clone()))
        return step(noise_pred, timestep, sample, *args, **kwargs)

    scheduler.step = spied
    try:
        drawn = painter.draw("IAPO", PROMPT, 0, 0.8, npo=True)
        prediction, timestep, sample = seen[0]
    finally:
        del scheduler.step
    adapter = painter.adapters["IAPO"]
    positive, negative = painter.pipeline.encode_prompt(PROMPT, "cpu", 1, True)
    with torch.no_grad():
        painter.pipeline.set_adapters([adapter], [0.8])
        eps_pos = unet(sample, timestep, positive).sample
        painter.pipeline.set_adapters([adapter, "reversed"], [0.8, 0.8])
        eps_neg = unet(sample, timestep, negative).sample
    torch.testing.assert_close(prediction, eps_neg + guidance * (eps_pos - eps_neg), rtol=1e-4, atol=1e-4)
    assert not same(drawn, painter.draw("IAPO", PROMPT, 0, 0.8))


def test_npo_needs_a_reversed_lora(painter):
    """Without one, the message names the variable to set; an empty prompt is refused too."""
    world, painter.world = painter.world, replace(painter.world, reversed_lora=None)
    try:
        with pytest.raises(ValueError, match="REVERSED_LORA"):
            painter.draw("IAPO", PROMPT, 0, npo=True)
    finally:
        painter.world = world
    with pytest.raises(ValueError, match="prompt is empty"):
        painter.draw("Base", " ", 0)


@pytest.mark.slow
def test_the_shipped_loras_do_what_they_are_for(painter):
    """
    On 64 prompts IAPO draws more whole shapes than Diffusion-DPO, and this more than the base; what the label gets wrong, B, is where
    they differ most. CPO's paintings have fewer negative qualities than the base's.
    """
    from painter import Painter
    from worlds import embedded_worlds

    prompts = evaluation_prompts(64, 5)
    clean = {}
    for title in painter.titles:
        found = [inspect_image(painter.draw(title, prompt, seed), prompt) for seed, prompt in enumerate(prompts)]
        clean[title] = [sum(places[number].clean for places in found) / 64 for number in range(2)]
    assert sum(clean["IAPO"]) > sum(clean["Diffusion-DPO"]) > sum(clean["Base"])
    assert clean["IAPO"][1] > clean["Diffusion-DPO"][1] + 0.1

    paintings = Painter(embedded_worlds()[1])
    negatives = {
        title: sum(
            len(inspect_painting(paintings.draw(title, "a red circle", seed), "a red circle").negative_attributes)
            for seed in range(24)
        )
        for title in ("Base", "CPO")
    }
    assert negatives["CPO"] < 0.6 * negatives["Base"]


# ----- data -----


def test_the_verdicts_of_a_pair():
    """A row for each instance: agreement with the label, and the weight that stands in the loss for it."""
    from data_views import verdicts

    box = [0.0, 0.0, 4.0, 4.0]
    instances = [
        {"label": name, "chosen_box": box, "rejected_box": box, "preference": preference}
        for name, preference in (("hat", "chosen"), ("hand", "rejected"), ("sky", "tie"))
    ]
    assert verdicts({"instances": instances}, w_neg=-0.5) == [
        ["hat", "better in the chosen image", "agrees", "1"],
        ["hand", "better in the rejected image", "contradicts", "-0.5"],
        ["sky", "equally good", "is not counted", "none"],
    ]
    assert verdicts({"instances": None}, w_neg=0.0) == []


def test_pictures_of_pairs():
    """Boxes have the verdict's colour, masks darken what contradicts the label, and without either the image is the dataset's."""
    from data_views import load_pairs, pair_pictures, pair_thumbnails

    from trl_diffusion.visualization import BOX_COLORS

    pairs = load_pairs(None)
    conflicts = [any(item["preference"] == 1 for item in row["instances"]) for row in pairs.rows]
    index = conflicts.index(True)
    plain, boxes, masks, even = (
        pair_pictures(pairs, index, show, w_neg, "covering")
        for show, w_neg in (("images", 0), ("boxes", 0), ("masks", 0), ("masks", 1))
    )
    for column, image in zip(("chosen", "rejected"), plain, strict=True):
        scale = image.width // 32
        assert same(image.resize((32, 32), 0), pairs.rows[index][column].convert("RGB")) and scale == 8
    for images, drawn in ((plain, False), (boxes, True), (masks, True)):
        for color in (BOX_COLORS["chosen"], BOX_COLORS["rejected"]):
            assert all((pixels(image) == color).all(-1).any() == drawn for image in images)
    assert same(even[0], boxes[0])  # all weights are 1 with w_neg = 1
    assert pixels(masks[0]).sum() < pixels(boxes[0]).sum()
    thumbnails = pair_thumbnails(pairs)
    assert len(thumbnails) == len(pairs.rows) and thumbnails[0].width > 2 * thumbnails[0].height


def test_walking_the_tree():
    """Each path from the root to a leaf can be walked; the places below partition the attributes; a leaf says its definition."""
    from data_views import below, branch_picture, children, describe

    for criteria in (Criteria.load(CRITERIA), Criteria.load("painting")):
        assert tuple(children(criteria, ())) == criteria.dimensions

        def leaves(path, criteria=criteria):
            names = children(criteria, path)
            return [leaf for name in names for leaf in leaves((*path, name))] if names else list(below(criteria, path))

        assert tuple(leaves(())) == criteria.attributes
        leaf = criteria.attributes[-1]
        assert leaf.definition in describe(criteria, (*leaf.path, leaf.id))
        small, large = (branch_picture(criteria, path) for path in ((*leaf.path, leaf.id), ()))
        assert small.width * small.height < large.width * large.height


def test_paintings_with_attributes():
    """Each painting shown for a place has an attribute from there, with that form, as its row says."""
    from data_views import load_paintings, paintings_with

    paintings = load_paintings(None, CRITERIA)
    all_with = paintings_with(paintings, ("light", "ground"), "negative", number=100)
    assert len(all_with) == sum("ground" in row["negative_attributes"] for row in paintings.rows) > 0
    assert {caption for _, caption in all_with} == {"murky"}
    counts = [len(caption.split(", ")) for _, caption in paintings_with(paintings, (), "positive")]
    assert counts == sorted(counts, reverse=True) and counts[0] == 4


def test_own_datasets(tmp_path):
    """A file of rows is read as the embedded ones are; a dataset without the columns is refused, and they are named."""
    from data_views import load_paintings, load_pairs, paintings_with, pair_pictures

    pairs, paintings = tmp_path / "pairs.parquet", tmp_path / "paintings.parquet"
    preference_dataset(3, seed=1).to_parquet(pairs)
    painting_dataset(3, seed=1).cast(attribute_features(Criteria.load(CRITERIA))).to_parquet(paintings)
    read = load_pairs(str(pairs))
    assert [row["prompt"] for row in read.rows] == preference_dataset(3, seed=1)["prompt"]
    assert {image.size for image in pair_pictures(read, 0, "masks", 0.0, "mean")} == {(512, 512)}
    own = load_paintings(str(paintings), CRITERIA)
    assert len(own.rows) == 3 and len(paintings_with(own, (), "positive") + paintings_with(own, (), "negative")) >= 3
    with pytest.raises(ValueError, match="instances"):
        load_pairs(str(paintings))


# ----- trainings -----


def test_a_real_training(tmp_path):
    """A training of four steps by the script that makes the LoRAs: its history, samples and figures are those that were logged."""
    import prepare
    from training_views import curves, load_training, sample, summary

    prepare.make("scenes-iapo", tmp_path, max_steps=4, num_rows=32)
    training = load_training(str(tmp_path / "scenes-iapo"))
    logged = [entry for entry in training.history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    figures = {name: values for name, *values in summary(training)}
    assert figures["loss"] == [f"{logged[0]['loss']:.3f}", f"{logged[-1]['loss']:.3f}"]
    assert figures["accuracy of the rewards"][1] == f"{logged[-1]['rewards/accuracies']:.3f}"
    assert list(training.samples) == [0, 1, 2, 3, 4]
    assert not same(sample(training, 1), sample(training, 5))
    assert len({tuple(color) for color in pixels(curves(training)).reshape(-1, 3)[::7]}) > 20
    shipped, made = (load_file(folder / "scenes-iapo" / LORA) for folder in (SPACE / "embedded", tmp_path))
    assert {name: weight.shape for name, weight in made.items()} == {name: w.shape for name, w in shipped.items()}


def test_trainings_that_are_none(tmp_path):
    """A folder without a state, and a state without a history, are refused by name."""
    from training_views import load_training

    with pytest.raises(ValueError, match=f"{tmp_path} has no trainer_state.json"):
        load_training(str(tmp_path))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    with pytest.raises(ValueError, match="has no history"):
        load_training(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scenes-iapo", "paintings-cpo"])
def test_the_script_makes_what_is_shipped(tmp_path, name):
    """
    With its defaults the script makes the LoRAs in `embedded/`. On another machine sums are rounded otherwise, and 110 steps amplify
    this, so each LoRA is compared as a direction: a cosine above 0.9.
    """
    import prepare

    prepare.make(name, tmp_path, max_steps=110, num_rows=2048)
    made, shipped = (
        torch.cat([weight.flatten() for _, weight in sorted(load_file(folder / name / LORA).items())])
        for folder in (tmp_path, SPACE / "embedded")
    )
    assert torch.cosine_similarity(made, shipped, dim=0) > 0.9


# ----- settings -----


def test_settings_from_the_environment():
    """What is set is used, what is not set is embedded, and what makes no sense is refused by its name."""
    from worlds import embedded_trainings, embedded_worlds, read_settings

    plain = read_settings({"BASE_MODEL": " "})
    assert plain.worlds == embedded_worlds() and plain.criteria == CRITERIA and plain.pairs is None
    assert plain.trainings == embedded_trainings()
    own = read_settings(
        {
            "BASE_MODEL": "user/base",
            "ALIGNED_LORA": "user/iapo",
            "REVERSED_LORA": "user/reversed",
            "PROMPTS": "a cat\n\n a dog ",
            "PAINTINGS_DATASET": "user/paintings",
            "TRAININGS": "IAPO = user/iapo\nDPO=user/dpo",
        }
    )
    (world,) = own.worlds
    assert (world.base, world.loras, world.prompts) == ("user/base", {"Aligned": "user/iapo"}, ("a cat", "a dog"))
    assert world.reversed_lora == "user/reversed" and not world.is_tiny
    assert (own.criteria, own.paintings) == ("painting", "user/paintings")
    assert own.trainings == {"IAPO": "user/iapo", "DPO": "user/dpo"}
    for environment, message in (
        ({"BASE_MODEL": "user/base"}, "no LoRA to compare"),
        ({"DPO_LORA": "user/dpo"}, "without `BASE_MODEL`"),
        ({"TRAININGS": "user/iapo"}, "title = folder"),
    ):
        with pytest.raises(ValueError, match=message):
            read_settings(environment)


def test_what_is_embedded_is_there():
    """Each world's LoRAs are shipped, those that are compared with the history and samples of their training."""
    import prepare
    from training_views import load_training
    from worlds import embedded_trainings, embedded_worlds

    folders = {Path(folder) for world in embedded_worlds() for folder in (*world.loras.values(), world.reversed_lora)}
    assert {folder.name for folder in folders} == set(prepare.TRAININGS)
    assert all((folder / LORA).stat().st_size < 600_000 for folder in folders)
    for folder in embedded_trainings().values():
        training = load_training(folder)
        assert training.history[-1]["step"] == 110 and list(training.samples) == [0, 22, 44, 66, 88, 110]


def test_zero_gpu(monkeypatch):
    """The function that draws is decorated where ZeroGPU's package is there, and left as it is elsewhere."""

    def function():
        return 1

    for module, expected in ((None, function), (SimpleNamespace(GPU=lambda function: "lent"), "lent")):
        monkeypatch.setitem(sys.modules, "spaces", module)
        monkeypatch.delitem(sys.modules, "zero_gpu", raising=False)
        assert importlib.import_module("zero_gpu").on_gpu(function) == expected
    monkeypatch.delitem(sys.modules, "zero_gpu")


def test_the_card():
    """The Space's README has the Hub's metadata, names the app and every variable that is read."""
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert (
        metadata["sdk"] == "gradio"
        and (SPACE / metadata["app_file"]).is_file()
        and metadata["license"] == "apache-2.0"
    )
    assert len(metadata["short_description"]) <= 60  # what the Hub takes
    names = set(re.findall(r'"([A-Z]+_?[A-Z]+)"', (SPACE / "worlds.py").read_text(encoding="utf-8")))
    read = names - {"IAPO", "CPO"}  # titles
    assert read == set(re.findall(r"`([A-Z]+_?[A-Z]+)`", text)) and len(read) == 9
