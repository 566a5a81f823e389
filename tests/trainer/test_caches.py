# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Caches of a training never lie: whatever changed under its names is encoded again, and nothing else."""

import copy
import json
import logging
import os
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, Image, load_from_disk
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.trainer.test_precompute import (
    IMAGES,
    INVERSIONS,
    PROMPTS,
    assert_same_batches,
    computed,
    expert_trainer,
    iapo,
)
from trl_diffusion.trainer.fingerprints import module_fingerprint
from trl_diffusion.trainer.prompt_list import kept_prompts
from trl_diffusion.trainer.run_record import dataset_fingerprint


SETTINGS = {"noise_source": "inversion", "inversion_steps": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def missing(capsys) -> dict[str, str]:
    """How many of how many rows were missing of what was precomputed since the last call."""
    return dict(re.findall(r"^Precomputing (.*): ([\d,]+ of [\d,]+) rows are", capsys.readouterr().out, re.M))


# ----- images -----


def in_memory(folder: Path, rows: Dataset) -> Dataset:
    return Dataset.from_dict(rows.to_dict(), rows.features)


def in_files(folder: Path, rows: Dataset) -> Dataset:
    """Images as files; where one has another content, it keeps size and time as far as a program can set them."""
    folder.mkdir(exist_ok=True)
    columns = rows.cast_column("chosen", Image(decode=False)).cast_column("rejected", Image(decode=False)).to_dict()
    for name in ("chosen", "rejected"):
        for number, image in enumerate(columns[name]):
            path = folder / f"{name}-{number}.png"
            if not path.exists() or path.read_bytes() != image["bytes"]:
                path.write_bytes(image["bytes"])
                os.utime(path, (1e9, 1e9))
            columns[name][number] = {"bytes": None, "path": str(path)}
    return Dataset.from_dict(columns, rows.features)


def in_an_arrow_file(folder: Path, rows: Dataset) -> Dataset:
    """A file that is replaced in place."""
    in_memory(folder, rows).save_to_disk(folder / "new")
    os.replace(next((folder / "new").glob("*.arrow")), folder / "rows.arrow")
    shutil.rmtree(folder / "new")
    os.utime(folder / "rows.arrow", (1e9, 1e9))
    return Dataset.from_file(str(folder / "rows.arrow"))


def in_a_saved_folder(folder: Path, rows: Dataset) -> Dataset:
    """What `save_to_disk` wrote, whose fingerprint is in a file."""
    shutil.rmtree(folder, ignore_errors=True)
    in_memory(folder, rows).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text()) | {"_fingerprint": "same"}
    (folder / "state.json").write_text(json.dumps(state))
    return load_from_disk(str(folder))


PLACES = {"memory": in_memory, "files": in_files, "arrow": in_an_arrow_file, "saved": in_a_saved_folder}


def with_value(rows: Dataset, name: str, value) -> Dataset:
    columns = [dict(row) for row in rows]
    columns[3][name] = value
    return Dataset.from_list(columns, rows.features)


def placed(kind: str, folder: Path, rows: Dataset) -> Dataset:
    folder.mkdir(exist_ok=True)
    dataset = PLACES[kind](folder, rows)
    dataset._fingerprint = "same"
    return dataset


@pytest.mark.parametrize("kind", PLACES)
def test_a_replaced_image_costs_its_row(tmp_path, capsys, kind):
    """Under the same name and fingerprint: its latents and its noised row are made again, none else, and are the live ones."""
    rows = tiny.pairs(6)
    other = with_value(rows, "chosen", tiny.image(99, *rows[3]["chosen"].size))
    iapo(tmp_path, dataset=placed(kind, tmp_path / "data", rows), **SETTINGS)
    assert missing(capsys) == {IMAGES: "6 of 6", PROMPTS: "2 of 2", INVERSIONS: "6 of 6"}
    iapo(tmp_path, dataset=placed(kind, tmp_path / "data", rows), **SETTINGS)
    assert missing(capsys) == {}
    dataset = placed(kind, tmp_path / "data", other)
    again = iapo(tmp_path, dataset=dataset, **SETTINGS)
    assert missing(capsys) == {IMAGES: "1 of 6", INVERSIONS: "1 of 6"}
    assert_same_batches(iapo(tmp_path, dataset=dataset, precompute=False, **SETTINGS), again, epochs=(0,))
    iapo(tmp_path, dataset=placed(kind, tmp_path / "data", rows), **SETTINGS)
    assert missing(capsys) == {}


OTHER_VALUES = {
    "prompt": ("prompt", "a blue dog", {PROMPTS: "1 of 3"}),
    "id": ("id", "another", {}),
    "instances": ("instances", [], {}),
}


@pytest.mark.parametrize("change", OTHER_VALUES)
def test_another_value_of_a_row_costs_that_row(tmp_path, capsys, change):
    """Although the dataset says that it is the same."""
    name, value, more = OTHER_VALUES[change]
    iapo(tmp_path, dataset=placed("memory", tmp_path / "data", tiny.pairs(6)), **SETTINGS)
    missing(capsys)
    dataset = placed("memory", tmp_path / "data", with_value(tiny.pairs(6), name, value))
    again = iapo(tmp_path, dataset=dataset, **SETTINGS)
    assert missing(capsys) == {IMAGES: "1 of 6", INVERSIONS: "1 of 6"} | more
    assert_same_batches(iapo(tmp_path, dataset=dataset, precompute=False, **SETTINGS), again, epochs=(0,))


def test_other_attributes_of_a_row_cost_that_row(tmp_path, capsys):
    """And its prompts are those of these attributes."""
    criteria = tmp_path / "tiny.yaml"
    criteria.write_text(tiny.CRITERIA)
    rows = tiny.paintings(6)
    other = with_value(rows, "positive_attributes", [])
    other._fingerprint = rows._fingerprint
    expert_trainer(tmp_path, str(criteria), dataset=rows)
    missing(capsys)
    found = expert_trainer(tmp_path, str(criteria), dataset=other)
    assert missing(capsys)[IMAGES] == "1 of 6" and found.train_dataset[3]["positive_attributes"] == []


def test_a_transform_that_makes_other_rows_is_made_again(tmp_path, capsys):
    """Its function answers otherwise than before."""
    word = ["red"]

    def transform(batch):
        return {**batch, "prompt": [f"{prompt} and a {word[0]}" for prompt in batch["prompt"]]}

    iapo(tmp_path, dataset=tiny.pairs(6).with_transform(transform), **SETTINGS)
    missing(capsys)
    iapo(tmp_path, dataset=tiny.pairs(6).with_transform(transform), **SETTINGS)
    assert missing(capsys) == {}
    word[0] = "blue"
    iapo(tmp_path, dataset=tiny.pairs(6).with_transform(transform), **SETTINGS)
    assert missing(capsys) == {IMAGES: "6 of 6", PROMPTS: "2 of 2", INVERSIONS: "6 of 6"}


def test_a_row_is_found_in_any_dataset(tmp_path, capsys):
    """In another order, with fewer rows, from files in place of memory: nothing is encoded again."""
    rows = tiny.pairs(6)
    iapo(tmp_path, dataset=rows)
    missing(capsys)
    iapo(tmp_path, dataset=rows.select([5, 2, 4, 0]), max_steps=2)
    iapo(tmp_path, dataset=placed("files", tmp_path / "data", rows))
    iapo(tmp_path, dataset=datasets.concatenate_datasets([rows.select([3, 4]), rows.select([0])]), max_steps=2)
    assert missing(capsys) == {}


# ----- models -----


@pytest.mark.parametrize("name", ["vae", "text_encoder", "unet"])
def test_every_element_of_every_weight_counts(name):
    """One element of one tensor, wherever it is, and a precision; another module with the same weights has the same hash."""
    module = getattr(tiny.sd_pipeline(), name)
    fingerprint, generator = module_fingerprint(module), torch.Generator().manual_seed(0)
    assert fingerprint == module_fingerprint(getattr(tiny.sd_pipeline(), name))
    for weight in module.state_dict().values():
        flat = weight.detach().view(-1)
        place = torch.randint(len(flat), (), generator=generator)
        before = flat[place].clone()
        flat[place] = before + 1 if not weight.is_floating_point() else torch.nextafter(before, torch.tensor(9.0))
        assert module_fingerprint(module) != fingerprint
        flat[place] = before
    assert module_fingerprint(module) == fingerprint
    assert module_fingerprint(copy.deepcopy(module).half()) != fingerprint


def test_tiles_of_a_vae_count():
    """An image that is encoded in tiles has other latents; the size of tiles that are not used is no matter."""
    vae = tiny.sd_pipeline().vae
    whole = module_fingerprint(vae)
    vae.tile_latent_min_size = 4
    assert module_fingerprint(vae) == whole
    vae.enable_tiling()
    tiled = module_fingerprint(vae)
    vae.tile_latent_min_size = 8
    assert len({whole, tiled, module_fingerprint(vae)}) == 3


def one_weight(path: Path) -> None:
    """Changes one element of one tensor, which is neither the first nor the last."""
    tensors = load_file(path)
    largest = max(tensors.values(), key=torch.numel)
    largest.view(-1)[largest.numel() // 3 + 1] += 1e-3
    save_file(tensors, path, {"format": "pt"})


def other_settings(path: Path, **settings) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


FOLDER_CHANGES = {
    "vae": (lambda folder: one_weight(folder / "vae/diffusion_pytorch_model.safetensors"), {IMAGES, INVERSIONS}),
    "vae's scale": (
        lambda folder: other_settings(folder / "vae/config.json", scaling_factor=0.5),
        {IMAGES, INVERSIONS},
    ),
    "force_upcast": (
        lambda folder: other_settings(folder / "vae/config.json", force_upcast=False),
        {IMAGES, INVERSIONS},
    ),
    "text encoder": (lambda folder: one_weight(folder / "text_encoder/model.safetensors"), {PROMPTS, INVERSIONS}),
    "denoiser": (lambda folder: one_weight(folder / "unet/diffusion_pytorch_model.safetensors"), {INVERSIONS}),
    "schedule": (
        lambda folder: other_settings(folder / "scheduler/scheduler_config.json", beta_end=0.02),
        {INVERSIONS},
    ),
}


@pytest.mark.parametrize("change", FOLDER_CHANGES)
def test_a_models_file_that_is_replaced_in_place_is_another_model(tmp_path, capsys, change):
    """One element of its weights, or one setting: what depends on it is encoded again, nothing else."""
    model = tmp_path / "model"
    tiny.sd_pipeline().save_pretrained(model)
    iapo(tmp_path, str(model), **SETTINGS)
    assert computed(capsys) == {IMAGES, PROMPTS, INVERSIONS}
    replace, expected = FOLDER_CHANGES[change]
    replace(model)
    iapo(tmp_path, str(model), **SETTINGS)
    assert computed(capsys) == expected


def test_one_weight_of_the_reference_counts(tmp_path, capsys):
    """Its inversions are its own."""
    for place in (None, 1000):
        other = tiny.other_unet()
        weight = max(other.unet.parameters(), key=torch.numel)
        if place is not None:
            weight.data.view(-1)[place + 1] += 1e-3
        iapo(tmp_path, ref_model=other, **SETTINGS)
        assert INVERSIONS in computed(capsys)


# ----- the list of prompts -----


@pytest.mark.parametrize("damage", ["a byte", "cut off", "empty"])
def test_a_damaged_list_of_prompts_is_named_and_made_anew(tmp_path, caplog, damage):
    """Also where the prompts of the rows that are looked at are right."""
    path, dataset = tmp_path / "list.arrow", Dataset.from_dict({"prompt": [f"prompt {row}" for row in range(500)]})
    given = path, [dataset], ["prompt"], lambda row: [row["prompt"], None]
    expected = kept_prompts(*given).to_pylist()
    whole = path.read_bytes()
    place = whole.index(b"prompt 321")
    path.write_bytes(
        {"a byte": whole[:place] + b"x" + whole[place + 1 :], "cut off": whole[:-9], "empty": b""}[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert kept_prompts(*given).to_pylist() == expected
    assert f"{path} is damaged" in caplog.text and path.read_bytes() == whole


# ----- the record of a run -----


def test_the_record_of_a_run_tells_images_in_files_by_their_content(tmp_path):
    """As it does those in memory, wherever they lie; one that is replaced is told."""
    rows = tiny.pairs(6)
    columns = ("id", "prompt", "chosen", "rejected", "instances")
    before = dataset_fingerprint(placed("files", tmp_path / "data", rows), columns)
    assert before == dataset_fingerprint(rows, columns)
    other = with_value(rows, "chosen", tiny.image(99, *rows[3]["chosen"].size))
    assert dataset_fingerprint(placed("files", tmp_path / "data", other), columns) != before
