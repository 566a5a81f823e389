# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""No id, name, label or path that comes from elsewhere leads out of the folder that it is for, from Python or by command."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.hostile.texts import NAMES, TEXTS
from trl_diffusion.annotation.run import Run
from trl_diffusion.evaluation.generate import match_images
from trl_diffusion.evaluation.models import ModelSpec, parse_model, resolve_model
from trl_diffusion.evaluation.prompts import Prompt, PromptSet, load_prompts
from trl_diffusion.evaluation.run import evaluate_models
from trl_diffusion.evaluation.scores import score_metric
from trl_diffusion.hub import check_repository_name, push_files
from trl_diffusion.safe_names import check_part_of_path, check_relative_path, check_safe_name


# Names that are no path elsewhere, only unusual
UNUSUAL = ["%2e%2e/evil", "~", "-rf", ".hidden", "a b", "é", "$(touch evil)", "`touch evil`", "a;b", "a|b", "*", "?"]
LEADING = [name for name in NAMES if name not in UNUSUAL]
BELOW = ["a/b", "~/evil", *(name for name in UNUSUAL if name != "~")]  # as paths


def inside(base: Path, path: Path) -> bool:
    return base.resolve() in Path(path).resolve().parents


@pytest.mark.parametrize("name", [*NAMES, *TEXTS])
def test_names_of_files(tmp_path, name):
    """What passes is a file in the folder: never elsewhere, and never a folder in between."""
    for check in (check_safe_name, check_part_of_path):
        try:
            check(name, "name")
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
        else:
            assert (tmp_path / name).parent == tmp_path and inside(tmp_path, tmp_path / name)
    try:
        check_relative_path(name, "path")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
    else:
        assert inside(tmp_path, tmp_path / name)


@pytest.mark.parametrize("name", LEADING)
def test_what_leads_elsewhere_is_refused(name):
    with pytest.raises(ValueError, match="name"):
        check_part_of_path(name, "name")
    if name not in BELOW:
        with pytest.raises(ValueError, match="path"):
            check_relative_path(name, "path")


@pytest.mark.parametrize("name", [name for name in [*NAMES, *TEXTS] if name])
def test_models_and_prompts_of_an_evaluation(tmp_path, name):
    """Models and prompts cannot even be made with a name that is no file's name on every system."""
    with pytest.raises(ValueError, match="cannot be part of a file's name"):
        ModelSpec(name, "somewhere", "pipeline", "main")
    with pytest.raises(ValueError, match="cannot be part of a file's name"):
        Prompt(name, "a cat")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "x.png")
    with pytest.raises(ValueError, match="cannot be part of a file's name"):
        resolve_model(name, str(tmp_path / "images"))
    if "=" not in name:
        with pytest.raises(ValueError, match="is not a valid model name"):
            parse_model(f"{name}={tmp_path}")
    (tmp_path / "prompts.json").write_text(json.dumps([{"id": name, "prompt": "a cat"}]))
    with pytest.raises(ValueError, match="cannot be part of a file name"):
        load_prompts(tmp_path / "prompts.json")


def test_models_that_differ_in_case_only(tmp_path):
    """On some systems they would share a folder."""
    specs = [ModelSpec(name, "somewhere", "pipeline", "main") for name in ("Model", "model")]
    with pytest.raises(ValueError, match="Two models are called model"):
        evaluate_models(specs, None, None, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", LEADING)
def test_metrics_and_splits(tmp_path, name):
    """The files of scores and the folder of a run are named after them."""
    with pytest.raises(ValueError, match="The metric .* would lead to another folder"):
        score_metric(name, lambda: None, None, [], tmp_path / "out", 1, False, True, {})
    task = SimpleNamespace(split=name, fingerprint="0")
    with pytest.raises(ValueError, match="The split .* would lead to another folder"):
        Run(task, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in LEADING if name not in BELOW])
def test_images_that_a_folder_names(tmp_path, name):
    """An image outside the folder is not taken into an evaluation, which could be pushed."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "evil", "PNG")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "prompt_id": "p"}))
    with pytest.raises(ValueError, match="file_name"):
        match_images(folder, PromptSet("set", None, "", (Prompt("p", "a cat"),)), 1)


@pytest.mark.parametrize("name", [name for name in LEADING if name not in BELOW])
def test_paths_in_a_repository(monkeypatch, name):
    """Nothing is asked of the Hub for a path that leads out of the repository."""
    monkeypatch.setattr("trl_diffusion.hub.HfApi", None)
    with pytest.raises(ValueError, match="path in the repository"):
        push_files({"README.md": b"", name: b"x"}, "user/name", commit_message="Push")


@pytest.mark.parametrize(
    "name", ["../x", "user/repo; rm -rf", "a" * 97, "user/é", "user/../x", "user\\x", "a/b/c", "x\x00", "\u202ex", ""]
)
def test_names_of_repositories(name):
    with pytest.raises(ValueError, match="is no name on the Hub"):
        check_repository_name(name)
