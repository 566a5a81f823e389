# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Baselines in the forms in which others publish them: LoRA files of any name, denoisers without a pipeline."""

import logging
import shutil
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.evaluation.loras import save_lora
from tests.evaluation.test_models import card, draw
from tests.hub.conftest import hub  # noqa: F401
from tests.original_layouts import sd_file
from tests.trainer.test_initial_lora import kohya
from trl_diffusion.evaluation.kinds import find_kind
from trl_diffusion.evaluation.models import guidance_of, load_pipeline, resolve_model
from trl_diffusion.lora_files import LORA_WEIGHTS_NAME


CPU = torch.device("cpu")
SPO = {  # as Step-aware Preference Optimization (SPO, arXiv:2406.04314) names its files
    "sd": "spo-sd-v1-5_4k-p_10ep_lora_diffusers.safetensors",
    "sdxl": "spo_sdxl_10ep_4k-data_lora_diffusers.safetensors",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Pipelines, a LoRA for each, and one more."""
    root = tmp_path_factory.mktemp("published")
    for family in SPO:
        tiny.PIPELINES[family]().save_pretrained(root / family)
        # Without a header only a LoRA whose alpha is its rank keeps its strength
        save_lora(tiny.PIPELINES[family](), root / f"{family} lora", seed=1, r=6, alpha=6, targets=("to_q", "to_v"))
    tiny.PIPELINES["sd3"]().save_pretrained(root / "sd3")
    save_lora(tiny.sd_pipeline(), root / "reversed", seed=2)
    tiny.sd_pipeline(seed=5).save_pretrained(root / "tuned")
    return {path.name: path for path in root.iterdir()}


def down_and_up(folder: Path) -> dict[str, torch.Tensor]:
    """A LoRA under the names that diffusers gave before it took those of peft; SPO has been published so."""
    names = {".lora_A.weight": ".lora.down.weight", ".lora_B.weight": ".lora.up.weight"}
    return {
        key.replace(old, names[old]): weight
        for key, weight in load_file(folder / LORA_WEIGHTS_NAME).items()
        for old in names
        if key.endswith(old)
    }


def processors(folder: Path) -> dict[str, torch.Tensor]:
    """The names before those, which were of attention processors."""
    weights = {}
    for key, weight in down_and_up(folder).items():
        layer, _, half = key.partition(".lora.")
        block, _, name = layer.rpartition(".")
        weights[f"{block}.processor.{name}_lora.{half}"] = weight
    return weights


FORMS = {
    "peft's names": lambda folder: load_file(folder / LORA_WEIGHTS_NAME),
    "down and up": down_and_up,
    "processors": processors,
    "kohya": kohya,
}


def write(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return path


def drawn(spec) -> np.ndarray:
    pipeline = load_pipeline(spec, torch.float32, CPU)
    with guidance_of(spec, pipeline):
        return draw(pipeline)


class TestLoraFiles:
    @pytest.mark.parametrize("family", SPO)
    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, folders, tmp_path, family, form):
        """A file and the folder that holds it alone give the images of the same weights in our own format."""
        folder, base = folders[f"{family} lora"], str(folders[family])
        file = write(tmp_path / "spo" / SPO[family], FORMS[form](folder))
        (tmp_path / "spo" / "README.md").write_text("# SPO\n")
        tiny.image(0).save(tmp_path / "spo" / "sample.png")
        expected = drawn(resolve_model("m", str(folder), base))
        for where in (file, file.parent):
            spec = resolve_model("m", str(where), base)
            assert (spec.kind, spec.path) == ("lora", str(file)) and spec.describe()["path"] == file.name
            np.testing.assert_allclose(drawn(spec), expected, atol=1e-5)
        assert abs(expected - drawn(resolve_model("b", base))).max() > 1e-2

    def test_nothing_says_the_strength(self, folders, tmp_path, caplog):
        """As in the files of SPO: alpha is the rank then, which is said."""
        file = write(tmp_path / SPO["sd"], down_and_up(folders["sd lora"]))
        with caplog.at_level(logging.WARNING):
            load_pipeline(resolve_model("m", str(file), str(folders["sd"])), torch.float32, CPU)
        assert f"The LoRA {file} says nothing of its strength" in caplog.text

    def test_a_tensor_that_nobody_uses(self, folders, tmp_path):
        """It is refused by name in these forms too."""
        file = write(tmp_path / "x.safetensors", down_and_up(folders["sd lora"]) | {"unet.lora.thing": torch.ones(3)})
        with pytest.raises(ValueError, match=f"The LoRA {file} .*"):
            load_pipeline(resolve_model("m", str(file), str(folders["sd"])), torch.float32, CPU)

    def test_our_own_name(self, folders):
        """The file of a training is its folder, with what is written there."""
        spec = resolve_model("m", str(folders["sd lora"] / LORA_WEIGHTS_NAME), str(folders["sd"]))
        assert spec == resolve_model("m", str(folders["sd lora"]), str(folders["sd"]))

    def test_several(self, folders, tmp_path):
        """They are named; a file that is no LoRA is none of them."""
        for name in ("a", "b"):
            write(tmp_path / f"{name}.safetensors", kohya(folders["sd lora"]))
        with pytest.raises(
            ValueError, match=r"several files.*: a.safetensors, b.safetensors. Name one of them: .*/a.sa"
        ):
            resolve_model("m", str(tmp_path), str(folders["sd"]))
        save_file(sd_file(), tmp_path / "b.safetensors")
        assert resolve_model("m", str(tmp_path), str(folders["sd"])).path == str(tmp_path / "a.safetensors")
        assert find_kind(str(tmp_path / "b.safetensors")).kind == "pipeline"

    def test_as_a_negative_lora(self, folders, tmp_path):
        """It is read in the same way."""
        file = write(tmp_path / "bad.safetensors", kohya(folders["reversed"]))
        given = (str(folders["sd lora"]), str(folders["sd"]))
        spec, other = (resolve_model("m", *given, str(negative)) for negative in (file, folders["sd lora"]))
        assert spec.describe()["negative_lora"] == "bad.safetensors"
        assert abs(drawn(spec) - drawn(other)).max() > 1e-3


class TestDenoisers:
    @pytest.mark.parametrize("is_bare", [False, True], ids=["repository", "folder"])
    def test_in_the_place_of_the_base_s(self, folders, tmp_path, is_bare):
        """A folder with `unet/` alone, or that folder, draws what the whole pipeline draws; the base gives the rest."""
        shutil.copytree(folders["tuned"] / "unet", tmp_path / "dpo" / "unet")
        card(tmp_path / "dpo", str(folders["sd"]))
        where = str(tmp_path / "dpo" / "unet" if is_bare else tmp_path / "dpo")
        spec = resolve_model("m", where, str(folders["sd"]) if is_bare else None)
        assert (spec.kind, spec.base) == ("denoiser", str(folders["sd"]))
        whole = tiny.sd_pipeline()
        whole.unet = tiny.sd_pipeline(seed=5).unet
        expected = draw(whole)
        assert np.array_equal(drawn(spec), expected)
        assert abs(expected - drawn(resolve_model("b", str(folders["sd"])))).max() > 1e-2
        guided = resolve_model("m", where, str(folders["sd"]), str(folders["reversed"]))
        assert guided.negative_lora_on is None and abs(drawn(guided) - expected).max() > 1e-3
        revision = spec.revision
        (tmp_path / "dpo" / "README.md").write_text("# Another card\n")
        assert find_kind(where).revision == revision

    def test_a_part_of_a_pipeline(self, folders):
        """Its whole pipeline is meant, as before."""
        with pytest.raises(ValueError, match="holds one component.* pass its pipeline"):
            resolve_model("m", str(folders["tuned"] / "unet"), str(folders["sd"]))

    def test_mistakes(self, folders, tmp_path):
        """No base, the base of another family or size, weights that are missing, another part."""
        shutil.copytree(folders["tuned"] / "unet", tmp_path / "dpo" / "unet")
        where = str(tmp_path / "dpo")
        with pytest.raises(ValueError, match="The base of the denoiser .* is unknown.*Pass .* as `base_model`"):
            resolve_model("m", where)
        with pytest.raises(ValueError, match="The base of the denoiser .* must be a pipeline"):
            resolve_model("m", where, str(folders["reversed"]))
        with pytest.raises(ValueError, match="differ in shape, such as .* Pass the pipeline that it was trained from"):
            load_pipeline(resolve_model("m", where, str(folders["sdxl"])), torch.float32, CPU)
        file = tmp_path / "dpo" / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        save_file({key: weights[key] for key in list(weights)[1:]}, file)
        with pytest.raises(ValueError, match="The denoiser .* has other weights than its files hold .missing"):
            load_pipeline(resolve_model("m", where, str(folders["sd"])), torch.float32, CPU)
        with pytest.raises(ValueError, match="holds a `UNet2DConditionModel`.* of .* is a `SD3Transformer2DModel`"):
            load_pipeline(resolve_model("m", where, str(folders["sd3"])), torch.float32, CPU)
        shutil.copytree(folders["sd"] / "vae", tmp_path / "vae")
        with pytest.raises(ValueError, match="holds one component, a `AutoencoderKL`, and no pipeline"):
            resolve_model("m", str(tmp_path / "vae"), str(folders["sd"]))
        write(tmp_path / "model.safetensors", sd_file())
        with pytest.raises(ValueError, match="must be a folder or Hub id with model_index.json, not the file"):
            resolve_model("m", where, str(tmp_path / "model.safetensors"))


def upload(repo_id: str, folder: Path) -> str:
    HfApi().create_repo(repo_id)
    return HfApi().upload_folder(repo_id=repo_id, folder_path=folder).oid


class TestOnTheHub:
    def test_a_lora_of_another_name(self, hub, folders, tmp_path, monkeypatch):  # noqa: F811
        """The only one is found and named, also in the cache; the name of the file finds it too; the revision is the commit."""
        repository = tmp_path / "spo"
        write(repository / SPO["sd"], down_and_up(folders["sd lora"]))
        card(repository, "user/base")
        upload("user/base", folders["sd"])
        commit = upload("org/SPO-SD-v1-5_4k-p_10ep_LoRA", repository)
        file = f"org/SPO-SD-v1-5_4k-p_10ep_LoRA/{SPO['sd']}"
        expected = drawn(resolve_model("m", str(folders["sd lora"]), str(folders["sd"])))
        for where in ("org/SPO-SD-v1-5_4k-p_10ep_LoRA", file):
            spec = resolve_model("m", where)
            assert (spec.kind, spec.path, spec.revision, spec.base) == ("lora", file, commit, "user/base")
            assert spec.describe()["path"] == file
            np.testing.assert_allclose(drawn(spec), expected, atol=1e-5)
        hub.fail("GET", ".*/api/models/.*", status=500, times=100)
        assert resolve_model("m", "org/SPO-SD-v1-5_4k-p_10ep_LoRA").path == file

        def refused(*_):
            raise httpx2.ConnectError("Connection refused")

        monkeypatch.setattr(HfApi, "model_info", refused)
        assert resolve_model("m", "org/SPO-SD-v1-5_4k-p_10ep_LoRA").path == file

    def test_several_loras(self, hub, folders, tmp_path):  # noqa: F811
        """They are named, and the name of one is taken; what is no LoRA is not."""
        for name in ("a.safetensors", "webui/b.safetensors"):
            write(tmp_path / "loras" / name, kohya(folders["sd lora"]))
        write(tmp_path / "loras" / "model.safetensors", sd_file())
        upload("user/loras", tmp_path / "loras")
        with pytest.raises(
            ValueError, match="several files.*: a.safetensors, model.safetensors, webui/b.safetensors. Name"
        ):
            resolve_model("m", "user/loras", str(folders["sd"]))
        assert resolve_model("m", "user/loras/webui/b.safetensors", str(folders["sd"])).kind == "lora"
        with pytest.raises(
            ValueError, match="is no LoRA.*https://huggingface.co/user/loras/blob/main/model.safetensors"
        ):
            resolve_model("m", "user/loras/model.safetensors", str(folders["sd"]))
        with pytest.raises(
            ValueError, match="user/loras/c.safetensors is no file here, and user/loras on the Hub gave no c"
        ):
            resolve_model("m", "user/loras/c.safetensors", str(folders["sd"]))

    def test_a_denoiser(self, hub, folders, tmp_path):  # noqa: F811
        """A repository with `unet/` alone, as Diffusion-DPO, Diffusion-KTO and InPO are published; its pickles stay there."""
        shutil.copytree(folders["tuned"] / "unet", tmp_path / "dpo" / "unet")
        (tmp_path / "dpo" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
        commit = upload("user/dpo", tmp_path / "dpo")
        spec = resolve_model("dpo", "user/dpo", str(folders["sd"]))
        assert (spec.kind, spec.path, spec.revision) == ("denoiser", "user/dpo", commit)
        whole = tiny.sd_pipeline()
        whole.unet = tiny.sd_pipeline(seed=5).unet
        assert np.array_equal(drawn(spec), draw(whole))
