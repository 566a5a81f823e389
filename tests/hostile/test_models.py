# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Whatever is in a model's folder or file: it works or is refused in one line; nothing hangs, no pickle and no code is run."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.hostile.limits import Outcome, outcome
from tests.hostile.lora_cases import Bomb
from tests.hostile.model_cases import CASES, pickled
from tests.original_layouts import sd_file
from trl_diffusion.backbones import load_backbone, load_pipeline
from trl_diffusion.backbones.names import find_model
from trl_diffusion.backbones.vae import load_vae
from trl_diffusion.evaluation.models import guidance_without, pipeline_class_of, resolve_model
from trl_diffusion.evaluation.models import load_pipeline as load_evaluated
from trl_diffusion.scripts.check_dataset import prompt_fits


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.sd_pipeline().save_pretrained(folder / "good")
    save_file(sd_file(), folder / "file.safetensors")
    weights = sd_file()
    save_file({k: v for k, v in weights.items() if not k.startswith("cond_stage_model")}, folder / "part.safetensors")
    return folder


def evaluated(folder: Path) -> None:
    spec = resolve_model("model", str(folder))
    pipeline_class_of(spec), guidance_without(spec)
    load_evaluated(spec, torch.float32, "cpu")


DOORS = {
    "trained": load_backbone,
    "empty": lambda folder: load_backbone(folder, without_denoiser=True).load_denoiser(),
    "evaluated": evaluated,
    "vae": lambda folder: load_vae(folder, torch.float32, str(folder.parent / "good"), {}),
    "vae of its pipeline": lambda folder: load_vae(folder.parent / "good", torch.float32, str(folder), {}),
    "configuration": lambda folder: load_pipeline(str(folder.parent / "file.safetensors"), config=str(folder)),
    "rest of a file": lambda folder: load_pipeline(str(folder.parent / "part.safetensors"), config=str(folder)),
    "component": lambda folder: find_model(folder / "unet"),
    "tokenizers": lambda folder: prompt_fits(str(folder)),
}


def all_doors(folder: Path, doors: dict = DOORS) -> None:
    """Goes through all doors, and says which neither work nor refuse in one line."""
    wrong = []
    for name, door in doors.items():
        try:
            door(folder)
        except ValueError as error:
            if not Outcome("ValueError", str(error)).is_right:
                wrong.append(f"{name}: {str(error)[:300]!r}")
        except OSError as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]!r}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:300]!r}")
    if wrong:
        raise AssertionError(" | ".join(wrong))


SOME = ("index b''", "_class_name of code", "component of code", "AutoTokenizer with auto_map", "unet as diffusion_pytorch_model.bin",
        "text_encoder as pytorch_model.bin", "vae as diffusion_pytorch_model.bin", "unet shard '../../outside.safetensors'",
        "text_encoder shard 'evil.bin'", "fifo in place of unet/config.json", "unet/config.json layers_per_block=1000000000000",
        "scheduler/scheduler_config.json num_train_timesteps=1000000000000",
        "text_encoder/config.json quantization_config=1", "tokenizer/tokenizer_config.json model_max_length=x")  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_hostile_folder_is_refused_in_one_line_or_works(good, name):
    folder = good / "bad"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good / "good", folder)
    CASES[name](folder)
    how = outcome(lambda: all_doors(folder), seconds=60)
    assert how.kind == "ok", how
    assert not (good / "touched").exists()


def test_pickles_that_were_asked_for(good, tmp_path):
    """With `use_safetensors=False` tensors of a pickle are read; one that would run code is still refused, and not run."""
    expected = tiny.weights(load_backbone(good / "good").denoiser)
    for evil in (False, True):
        folder = tmp_path / f"evil-{evil}"
        shutil.copytree(good / "good", folder)
        pickled("unet", "diffusion_pytorch_model.bin", evil=evil)(folder)
        with pytest.raises(
            ValueError, match="as a pickle alone, diffusion_pytorch_model.bin.*pass `use_safetensors=False`"
        ):
            load_backbone(folder)
        if not evil:
            backbone = load_backbone(folder, use_safetensors=False)
            assert tiny.max_difference(tiny.weights(backbone.denoiser), expected) == 0
            continue
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_backbone(folder, use_safetensors=False)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors", ".bin", ".pt", ".pth", ".zip"])
def test_a_file_that_runs_code(tmp_path, ending):
    """Whatever it is called, code in a single file is not run."""
    torch.save({"state_dict": {"x": Bomb(tmp_path / "touched")}}, tmp_path / f"model{ending}")
    for door in (load_backbone, lambda name: load_pipeline(str(name)), lambda name: resolve_model("m", str(name))):
        with pytest.raises(ValueError, match="model" + ending):
            load_backbone(tmp_path / f"model{ending}")
            door(tmp_path / f"model{ending}")
    assert not (tmp_path / "touched").exists()


def test_a_link_out_of_the_folder_that_leads_to_weights_works(good, tmp_path):
    """The cache of the Hub is made of such links."""
    shutil.copytree(good / "good", tmp_path / "linked")
    shutil.rmtree(tmp_path / "linked" / "vae")
    os.symlink(good / "good" / "vae", tmp_path / "linked" / "vae")
    load_backbone(tmp_path / "linked")


@pytest.mark.parametrize("name", ["../x", "user/repo; rm -rf", "x" * 500, "user/" + "y" * 5000, "user/\u202eevil", "user/é", "a/b/c", "~", "",
                                  "user\\x", "user/x\x00", "file:///etc/passwd", "-x", "https://user:canary-password@127.0.0.1:9/a/b"])  # fmt: skip
def test_names_that_are_none(name):
    for door in (load_backbone, lambda name: load_pipeline(name), lambda name: resolve_model("m", name)):
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            door(name)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 7000
        assert "canary" not in str(raised.value)
