# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Each script is one file that runs alone: its header names what it needs, and it works outside of the repository."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import tiny
from tests.cli import processes
from tests.evaluation.loras import save_lora
from tests.invariant.test_imports import MODULES, imports, imports_of
from trl_diffusion import unpair_pairs
from trl_diffusion.cli.main import COMMANDS, script_of
from trl_diffusion.quickstart.paintings import painting_dataset
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.quickstart.world import preference_dataset


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOLDERS = ("trl_diffusion/scripts", "examples/scripts", "examples/tiny_pipelines")
HEADER = re.compile(
    r"^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", re.MULTILINE
)  # as PEP 723 has it
TRAININGS = {"attribute_sft", "complex_po", "ddspo", "diffusion_kto", "instance_dpo"}
DISTRIBUTIONS = packages_distributions()


def is_run(path: Path) -> bool:
    """Whether a file is a script that runs alone: one of a package's modules, run with `-m`, is not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    is_module = any(isinstance(node, ast.ImportFrom) and node.level and node in tree.body for node in ast.walk(tree))
    return "__main__" in path.read_text(encoding="utf-8") and not is_module


SCRIPTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")) if is_run(path)]
OF_COMMANDS = {Path(script_of(command).__file__).stem: command for command in COMMANDS}
each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")


def header(path: Path) -> dict:
    """The metadata of a script, read as PEP 723 reads it."""
    (found,) = [match for match in HEADER.finditer(path.read_text(encoding="utf-8")) if match["type"] == "script"]
    lines = found["content"].splitlines(keepends=True)
    return tomllib.loads("".join(line[2:] if line.startswith("# ") else line[1:] for line in lines))


def requirements(path: Path) -> dict[str, Requirement]:
    return {item.name: item for item in map(Requirement, header(path)["dependencies"])}


def test_all_scripts_are_seen():
    """Each command has a file, and each file of the commands' folder that can be run is a command's."""
    own = {path.stem for path in SCRIPTS if path.parent == ROOT / FOLDERS[0]}
    assert own == set(OF_COMMANDS) and len(SCRIPTS) >= len(COMMANDS) + 6
    assert set((ROOT / FOLDERS[1]).glob("*.py")) <= set(SCRIPTS)


@each_script
def test_the_header_names_what_the_file_needs(path):
    """It is read as uv reads it, has the package's versions of Python, and names each package that the file imports."""
    metadata, needed = header(path), requirements(path)
    assert metadata.keys() == {"requires-python", "dependencies"}
    assert metadata["requires-python"] == PROJECT["requires-python"]
    assert next(iter(needed)) == "trl-diffusion"
    roots = {name.split(".")[0] for name, _ in imports_for_types_too(path)} - sys.stdlib_module_names
    others = roots - {
        "trl_diffusion",
        "datasets_builders",
    }  # the builders are of the repository, and push what was annotated
    packages = {canonicalize_name(DISTRIBUTIONS.get(name, [name])[0]) for name in others}
    assert packages == {canonicalize_name(name) for name in needed} - {"trl-diffusion"}


def imports_for_types_too(path: Path) -> list[tuple[str, bool]]:
    found = imports(path.read_text(encoding="utf-8"), path.stem)
    assert not any(name.startswith(".") for name, _ in found)
    return found


@each_script
def test_the_header_names_known_packages(path):
    """Dependencies of this package without versions of their own, and extras that there are."""
    known = {canonicalize_name(Requirement(item).name) for item in PROJECT["dependencies"]} | {"trl-diffusion"}
    for name, requirement in requirements(path).items():
        assert canonicalize_name(name) in known and not requirement.specifier and not requirement.url
        assert requirement.extras <= EXTRAS.keys()
    assert all(not item.extras for name, item in requirements(path).items() if name != "trl-diffusion")


def reached(path: Path) -> set[str]:
    """All top-level packages that a script imports by way of this package's modules, inside of functions too."""
    seen, waiting = set(), [name for name, _ in imports(path.read_text(encoding="utf-8"), path.stem)]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [other for other, _ in imports_of(name)] if name in MODULES else []
    return {name.split(".")[0] for name in seen}


@each_script
def test_the_header_has_the_extras_that_flags_need(path):
    """
    Ray where it runs the roles; matplotlib for the curves on a model card and for reports, torchmetrics for these; bitsandbytes and a
    tracker for trainings.
    """
    extras, packages = requirements(path)["trl-diffusion"].extras, reached(path)
    runs_roles = "trl_diffusion" in path.parts and "ray" in packages
    assert ("ray" in extras) == runs_roles
    trains = path.stem in TRAININGS
    assert not trains or "matplotlib" in packages
    assert ("evaluation" in extras) == (trains or "torchmetrics" in packages)
    assert ({"quantization", "trackio"} <= extras) == trains


@each_script
def test_no_script_hides_a_package(path):
    """The folder of a script that is run comes first where Python looks for modules: none there is called like a package."""
    for sibling in path.parent.glob("*.py"):
        if sibling.stem != "__init__":
            assert sibling.stem not in sys.stdlib_module_names | DISTRIBUTIONS.keys()
            assert find_spec(sibling.stem) is None


@each_script
def test_the_file_runs_elsewhere(path, tmp_path):
    """A copy of the file alone, in a folder without the repository, prints its flags."""
    copy = Path(shutil.copy(path, tmp_path))
    ended = processes.run([copy, "--help"], cwd=tmp_path)
    assert ended.returncode == 0 and ended.stdout.startswith("usage:"), ended.stderr
    assert list(tmp_path.iterdir()) == [copy]


# ---- Each command's script, run as a file ----


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What the scripts read: a tiny model, a LoRA on it, pairs, paintings, a tree and prompts."""
    folder = tmp_path_factory.mktemp("data")
    tiny.sd_pipeline().save_pretrained(folder / "model")
    save_lora(tiny.sd_pipeline(), folder / "lora")
    tiny.pairs(4).to_parquet(folder / "pairs.parquet")
    tiny.paintings(4).to_parquet(folder / "paintings.parquet")
    unpair_pairs(tiny.pairs(4)).to_parquet(folder / "labelled.parquet")
    preference_dataset(4, seed=0).remove_columns("instances").to_parquet(folder / "scenes.parquet")
    painting_dataset(4, seed=0).to_parquet(folder / "pictures.parquet")
    (folder / "criteria.yaml").write_text(tiny.CRITERIA)
    (folder / "prompts.txt").write_text("a red circle\na blue square and a red circle\n")
    return folder


TRAINING = ["--max_steps", 1, "--report_to", "none", "--lora_r", 4, "--output_dir", "out"]


def of_cpo(data: Path) -> list:
    flags = ["--model_name_or_path", data / "model", "--dataset_name", data / "paintings.parquet"]
    return [*flags, "--criteria", data / "criteria.yaml", *TRAINING]


# By script: flags, what must be there afterwards, and what is printed
RUNS: dict[str, tuple[Callable[[Path], list], str | None, str]] = {
    "instance_dpo": (
        lambda data: [
            *("--model_name_or_path", data / "model", "--dataset_name", data / "pairs.parquet", "--use_peft"),
            *TRAINING,
        ],
        "out/pytorch_lora_weights.safetensors",
        "Training completed.",
    ),
    "attribute_sft": (of_cpo, "out/attribute_expert.json", "Training completed."),
    "complex_po": (
        lambda data: [*of_cpo(data), "--expert", "expert"],
        "out/pytorch_lora_weights.safetensors",
        "Training completed.",
    ),
    "ddspo": (
        lambda data: [
            *("--model_name_or_path", data / "model", "--dataset_name", data / "pairs.parquet", "--use_peft"),
            *TRAINING,
        ],
        "out/pytorch_lora_weights.safetensors",
        "Training completed.",
    ),
    "diffusion_kto": (
        lambda data: [
            *("--model_name_or_path", data / "model", "--dataset_name", data / "labelled.parquet", "--use_peft"),
            *TRAINING,
        ],
        "out/pytorch_lora_weights.safetensors",
        "Training completed.",
    ),
    "annotate_instances": (
        lambda data: [
            *("--dataset_name", data / "scenes.parquet", "--vlm", "oracle", "--detector", "oracle"),
            *("--output_dir", "out"),
        ],
        "out",
        "rows 4, ok 4",
    ),
    "annotate_attributes": (
        lambda data: [
            *("--dataset_name", data / "pictures.parquet", "--vlm", "oracle", "--criteria", shipped("criteria.yaml")),
            *("--output_dir", "out"),
        ],
        "out",
        "rows 4, ok 4",
    ),
    "evaluate_models": (
        lambda data: [
            *("--models", f"base={data / 'model'}", f"lora={data / 'lora'}", "--base_model", data / "model"),
            *("--prompts", data / "prompts.txt", "--num_inference_steps", 2, "--metrics", "caption_match"),
            *("--vlm", "oracle", "--detector", "oracle", "--use_cpu", "--output_dir", "out"),
        ],
        "out/summary.json",
        "Evaluated base, lora",
    ),
    "model_card": (lambda data: ["model", "--overwrite"], "model/README.md", "Wrote README.md in model."),
    "check_dataset": (
        lambda data: ["--dataset_name", data / "pairs.parquet", "--output", "out.json"],
        "out.json",
        "4",
    ),
    "export_lora": (
        lambda data: [data / "lora", "--output", "out.safetensors"],
        "out.safetensors",
        "out.safetensors",
    ),
    "show_masks": (
        lambda data: [
            *("--dataset_name", data / "pairs.parquet", "--num_rows", 2, "--resolution", 32, "--output_dir", "out"),
        ],
        "out/0001.png",
        "Drew 2 rows",
    ),
    "show_criteria": (lambda data: ["--criteria", data / "criteria.yaml", "--output", "out.png"], "out.png", "pet: cat"),
    "quickstart": (
        lambda data: [
            *("--num_pairs", 64, "--num_paintings", 64, "--max_steps", 1, "--num_samples", 4, "--output_dir", "out"),
        ],
        "out/results.json",
        "Done in",
    ),
    "env": (lambda data: [], None, "- trl-diffusion: "),
}  # fmt: skip

TRAINED_FIRST = {"complex_po": ("attribute_sft", "expert"), "model_card": ("instance_dpo", "model")}


def test_each_script_is_run():
    """A new command cannot be forgotten below."""
    assert RUNS.keys() == OF_COMMANDS.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "quickstart" else name for name in RUNS]
)
def test_the_script_does_its_work_as_a_file(name, data, tmp_path):
    """A copy of the file, outside of the repository, does what the command does."""
    flags, written, printed = RUNS[name]
    if name in TRAINED_FIRST:
        script, folder = TRAINED_FIRST[name]
        ended = run_copy(script, tmp_path, [*RUNS[script][0](data), "--output_dir", folder])
        assert ended.returncode == 0, ended.stderr
    ended = run_copy(name, tmp_path, flags(data))
    assert ended.returncode == 0, ended.stderr
    assert printed in ended.stdout and (written is None or (tmp_path / written).exists())


@pytest.mark.parametrize("name", ["annotate_pairs", "annotate_paintings"])
def test_what_cannot_be_pushed_is_not_annotated(name, tmp_path):
    """Outside of a clone there are no builders of datasets, which is said before anything is annotated."""
    copy = shutil.copy(ROOT / "examples" / "scripts" / f"{name}.py", tmp_path)
    flags = ["--dataset_name", "none", "--output_dir", tmp_path / "out", "--push_to_hub", "user/name"]
    ended = subprocess.run([sys.executable, copy, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and "run this file in a clone" in ended.stderr
    assert not (tmp_path / "out").exists()


def run_copy(name: str, folder: Path, flags: list) -> subprocess.CompletedProcess:
    command = [shutil.copy(ROOT / FOLDERS[0] / f"{name}.py", folder), *flags]
    if name != "quickstart":  # whose own processes start as those of a main module do
        return processes.run(command, cwd=folder)
    start = [sys.executable, *map(str, command)]
    return subprocess.run(start, cwd=folder, capture_output=True, text=True, timeout=300)
