# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Whatever people call a model is the model, or an error that says what is there in its place."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.original_layouts import sd_file
from trl_diffusion.backbones import load_backbone, load_pipeline, names
from trl_diffusion.backbones.names import find_model
from trl_diffusion.evaluation.models import resolve_model


LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pipeline's folder."""
    folder = tmp_path_factory.mktemp("models") / "pipeline"
    tiny.sd_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(folder) -> Path:
    """The same as a single file."""
    file = folder.parent / "single.safetensors"
    save_file(sd_file(), file)
    return file


def test_a_path_of_the_home_folder(folder, file, monkeypatch):
    """`~` is the home folder, in names of pipelines, of files and of configurations, and in an evaluation."""
    monkeypatch.setenv("HOME", str(folder.parent))
    expected = tiny.weights(load_pipeline(str(folder)).unet)
    for load in (load_backbone, load_pipeline):
        for loaded in (
            load("~/pipeline"),
            load("~/single.safetensors", config="~/pipeline"),
            load(str(file), config=folder),
        ):
            pipeline = getattr(loaded, "pipeline", loaded)
            assert tiny.max_difference(tiny.weights(pipeline.unet), expected) == 0
    assert resolve_model("m", "~/single.safetensors", "~/pipeline") == resolve_model("m", str(file), str(folder))


def test_a_link_of_the_hub_is_downloaded(folder, file, monkeypatch):
    """By its page or its download, at its revision and in its folder; what else follows in the link does not matter."""
    asked = []

    def download(repo, name, revision):
        asked.append((repo, name, revision))
        return str(file)

    monkeypatch.setattr(names, "hf_hub_download", download)
    for link in (
        "https://huggingface.co/user/model/blob/main/a.safetensors",
        "https://huggingface.co/user/model/resolve/v2/sub/a.ckpt?download=true",
        "https://hf.co/user/model/blob/main/a.safetensors",
    ):
        assert find_model(link) == str(file)
    assert asked == [
        ("user/model", "a.safetensors", "main"),
        ("user/model", "sub/a.ckpt", "v2"),
        ("user/model", "a.safetensors", "main"),
    ]
    link = "https://huggingface.co/user/model/blob/main/a.safetensors"
    assert tiny.max_difference(
        tiny.weights(load_pipeline(link, config=str(folder)).unet), tiny.weights(load_backbone(folder).denoiser)
    ) == 0  # fmt: skip
    assert resolve_model("m", link, str(folder)).path == str(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://civitai.com/api/download/models/1", "is no file on the Hub.* Download it first, and pass the file"),
        ("https://example.org/a.safetensors", "is no file on the Hub.* Download it first"),
        ("https://huggingface.co/user/model", "is the page of a model: pass its Hub id, user/model"),
        ("https://huggingface.co/user/model/blob/main/a.gguf", "is no .safetensors or .ckpt file"),
        ("https://huggingface.co/user/model/blob/main/a.safetensors", "cannot be downloaded"),
        ("/no/such/folder", "There is no folder or file '/no/such/folder'"),
        ("./nothing", "There is no folder or file './nothing'"),
        ("a/b/c", "There is no folder or file 'a/b/c'"),
        ("nothing.safetensors", "There is no file nothing.safetensors"),
        ("user/nothing.ckpt", "There is no file user/nothing.ckpt"),
        ("", "The name of the model is empty"),
    ],
)
def test_what_is_not_there(name, message):
    """A name that can be no Hub id is not looked for on the Hub; a link to elsewhere says that the file must be downloaded."""
    for load in (load_backbone, load_pipeline):
        with pytest.raises(ValueError, match=message):
            load(name)


def test_a_hub_id_is_left_alone():
    """Names that may be on the Hub are not judged by their form."""
    for name in ("user/model", "model", "user/model-v1.5", "user/a.b"):
        assert find_model(name) == name


@pytest.mark.parametrize("ending", ["gguf", "bin", "pt", "pth", "onnx"])
def test_files_of_other_formats(tmp_path, ending):
    """They are named as such, not read as configurations."""
    (tmp_path / f"m.{ending}").write_bytes(b"0000")
    with pytest.raises(
        ValueError, match=f"m.{ending} is no model that can be loaded: a single file is a .safetensors or .ckpt"
    ):
        load_backbone(tmp_path / f"m.{ending}")  # fmt: skip


def test_an_ending_in_capitals(tmp_path):
    """diffusers would read it as a pickle."""
    for name in ("A.SAFETENSORS", "A.Safetensors", "A.CKPT"):
        (tmp_path / name).write_bytes(b"0000")
        with pytest.raises(ValueError, match=f"rename it to A{Path(name).suffix.lower()}"):
            load_backbone(tmp_path / name)


def test_folders_without_a_pipeline(tmp_path, folder, file):
    """What a folder holds in place of a pipeline is said, with what to pass."""

    def refused(path: Path, message: str) -> None:
        for load in (load_backbone, load_pipeline):
            with pytest.raises(ValueError, match=f"^{re.escape(str(path))} holds {message}"):
                load(str(path))
        with pytest.raises(ValueError, match="cannot be evaluated: .*" + message):
            resolve_model("m", str(path))

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no pipeline: it has no model_index.json, and no .safetensors or .ckpt file")
    (tmp_path / "file").mkdir()
    shutil.copy(file, tmp_path / "file" / "V1.SAFETENSORS")
    refused(tmp_path / "file", "no pipeline .*, but the file V1.SAFETENSORS: pass .*/file/V1.SAFETENSORS itself")
    refused(folder / "unet", f"one component, a `UNet2DConditionModel`, and no pipeline: pass its pipeline, {folder}")
    refused(folder / "text_encoder", f"one component, a `CLIPTextModel`, and no pipeline: pass its pipeline, {folder}")
    shutil.copytree(folder / "vae", tmp_path / "vae")
    refused(tmp_path / "vae", "one component, a `AutoencoderKL`, and no pipeline: pass a folder with model_index.json")
    refused(folder.parent, f"no pipeline .*, but {folder} does: pass that folder")
    snapshot = tmp_path / "hub" / "models--user--model" / "snapshots" / "0a1b"
    shutil.copytree(folder, snapshot)
    for path in (snapshot.parent, snapshot.parent.parent, tmp_path / "hub"):
        refused(path, f"no pipeline .*, but {snapshot} does: pass that folder")
    checkpoint = tmp_path / "out" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, checkpoint / LORA)
    refused(checkpoint.parent, f"no pipeline .*, and a LoRA in {checkpoint}: pass the model that it was trained on")
    with pytest.raises(ValueError, match="holds a LoRA .* pass the model that it was trained on"):
        load_backbone(checkpoint)
    with pytest.raises(ValueError, match="is a file out of a pipeline's folder: pass the folder"):
        load_backbone(folder / "model_index.json")
