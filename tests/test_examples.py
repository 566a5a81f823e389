# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Every example script is run, and every YAML file that a user can read or is given is what it says it is."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset, load_dataset, load_from_disk
from safetensors.torch import load_file
from transformers.utils import is_torch_bf16_gpu_available

from tests import tiny
from tests.cli import processes
from tests.evaluation.loras import save_lora
from tests.families import FAMILIES
from tests.hub.conftest import hub  # noqa: F401
from tests.metrics.test_clip_scorers import clip_folder
from trl_diffusion import Criteria, unpair_pairs
from trl_diffusion.cli.main import LAUNCHED_COMMANDS, script_of
from trl_diffusion.criteria import parse_criteria
from trl_diffusion.evaluation.protocols import load_protocol
from trl_diffusion.quickstart.paintings import painting_dataset
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.quickstart.world import preference_dataset


ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(EXAMPLES.glob("configs/*.yaml"))
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def start(script: str, *args) -> subprocess.CompletedProcess:
    return processes.run([EXAMPLES / "scripts" / script, *args])


def run(script: str, *args, here: pytest.MonkeyPatch | None = None) -> str:
    """What a script prints. With `here` it runs in this process, whose clients know the stand-in of the Hub."""
    if here is not None:
        here.setattr(sys, "argv", [script, *map(str, args)])
        runpy.run_path(str(EXAMPLES / "scripts" / script), run_name="__main__")
        return ""
    result = start(script, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_script_is_run():
    """A new script in the folder cannot be forgotten in this file."""
    run_here = set(re.findall(r"\brun\(\s*\"(\w+\.py)\"", Path(__file__).read_text()))
    assert run_here == {path.name for path in EXAMPLES.glob("scripts/*.py")}


# ---- YAML files ----


class Recipe(NamedTuple):
    """A recipe, and the command that its comments name: command and flags."""

    command: str
    flags: list[str]


def read_recipe(path: Path) -> Recipe:
    (line,) = re.findall(r"^# +trl-diffusion (.*)$", path.read_text(), re.MULTILINE)
    command, *flags = shlex.split(line)
    assert flags[:2] == ["--config", f"examples/configs/{path.name}"]
    return Recipe(command, flags)


@each_recipe
def test_every_recipe_is_a_configuration(path, tmp_path, monkeypatch):
    """
    The command that its comments name is one as it stands, on any machine: all keys are known, and the precision is the machine's.
    """
    monkeypatch.chdir(ROOT)
    command, flags = read_recipe(path)
    assert command in LAUNCHED_COMMANDS
    *_, given_by_file, given = (
        script_of(command)
        .make_parser()
        .parse_args_and_config(flags, return_remaining_strings=True, separate_remaining_strings=True)
    )
    assert given_by_file == given == []
    flags = [*flags, "--output_dir", str(tmp_path)]
    script_args, training_args, model_args = script_of(command).make_parser().parse_args_and_config(flags)
    assert model_args.model_name_or_path and script_args.dataset_name
    assert model_args.use_peft or command in ("instance-dpo", "diffusion-kto")
    assert training_args.sample_prompts
    assert training_args.bf16 == is_torch_bf16_gpu_available()


# By folder: what reads its files
READERS: dict[str, Callable[[str], Any]] = {
    "examples/configs": lambda path: read_recipe(Path(path)),  # and each one is parsed above
    "trl_diffusion/accelerate_configs": load_config_from_file,
    "trl_diffusion/criteria_trees": Criteria.load,
    "trl_diffusion/protocols": load_protocol,
    "trl_diffusion/quickstart": Criteria.load,
    "docs/source": lambda path: yaml.safe_load(Path(path).read_text()),
}
FILES = [
    path
    for folder in ("trl_diffusion", "examples", "docs", "datasets_builders")
    for path in sorted((ROOT / folder).rglob("*.y*ml"))
]


def test_yaml_files_are_seen():
    """The test below does not pass for want of files."""
    assert {str(path.parent.relative_to(ROOT)) for path in FILES} == READERS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_yaml_file_is_read(path):
    """By what reads files of its folder; a folder that is not known fails."""
    assert READERS[str(path.parent.relative_to(ROOT))](str(path))


def yaml_blocks() -> list[tuple[str, str]]:
    """The YAML in the pages of the repository, with where it stands."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs" / "source").glob("*.md")), *FILES_OF_BUILDERS]
    return [
        (f"{page.name}:{number}", block)
        for page in pages
        for number, block in enumerate(
            re.findall(r"^```ya?ml\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        )
    ]


FILES_OF_BUILDERS = sorted((ROOT / "datasets_builders").rglob("*.md"))


@pytest.mark.parametrize(("where", "block"), [pytest.param(*item, id=item[0]) for item in yaml_blocks()])
def test_every_yaml_of_a_page_is_read(where, block, tmp_path, monkeypatch):
    """It is a tree of criteria, or the file of a training, with values that the flags take."""
    content = yaml.safe_load(block)
    if "tree" in content:
        assert parse_criteria(block, where).attributes
        return
    for name in content.get("env", {}):
        monkeypatch.setenv(name, "")  # and so restored
    (tmp_path / "recipe.yaml").write_text(block)
    flags = ["--config", str(tmp_path / "recipe.yaml")]
    _, training_args, model_args, _ = (
        script_of("instance-dpo").make_parser().parse_args_and_config(flags, return_remaining_strings=True)
    )
    assert model_args.model_name_or_path == content["model_name_or_path"]
    assert training_args.output_dir == content["output_dir"]


def test_yaml_of_pages_is_seen():
    """The test above does not pass for want of pages."""
    assert len(yaml_blocks()) >= 2


# What a recipe's name ends with, and the tiny pipeline that stands for its base
STANDS_FOR = {
    "sd15": (tiny.sd_pipeline, {}),
    "sdxl": (tiny.sdxl_pipeline, {}),
    "sdxl_lora": (tiny.sdxl_pipeline, {}),
    "sd35_medium": (FAMILIES["sd3"].make, FAMILIES["sd3"].settings),
    "flux": (FAMILIES["flux"].make, FAMILIES["flux"].settings),
    "flux2_klein": (FAMILIES["flux_2"].make, FAMILIES["flux_2"].settings),
    "krea2": (FAMILIES["krea_2"].make, FAMILIES["krea_2"].settings),
    "qwen_image": (FAMILIES["qwen_image"].make, FAMILIES["qwen_image"].settings),
    "sana": (FAMILIES["sana"].make, FAMILIES["sana"].settings),
    "z_image": (FAMILIES["z_image"].make, FAMILIES["z_image"].settings),
}


def base_of(path: Path) -> str:
    return max((name for name in STANDS_FOR if path.stem.endswith(f"_{name}")), key=len)


@pytest.fixture(scope="module")
def standing_for(tmp_path_factory) -> Callable[[str], tuple[Path, dict[str, int]]]:
    """From a base to the folder of its tiny pipeline, with data beside it, and what a training must be told of it."""
    folder = tmp_path_factory.mktemp("recipes")

    def find(base: str) -> tuple[Path, dict[str, int]]:
        make, settings = STANDS_FOR[base]
        if not (folder / base).exists():
            make().save_pretrained(folder / base / "model")
            tiny.pairs(4).to_parquet(folder / base / "pairs.parquet")
            paintings().to_parquet(folder / base / "paintings.parquet")
            unpair_pairs(tiny.pairs(4)).to_parquet(folder / base / "labelled.parquet")
        return folder / base, {"resolution": 32, **settings}

    return find


def paintings() -> Dataset:
    """Tiny paintings with attributes of the shipped tree, which the recipes name."""
    tree = Criteria.load("painting")
    ids = dict(zip(("hue", "kind", "pet"), (tree.select(name)[0].id for name in tree.dimensions)))

    def rename(row):
        return {name: [ids[attribute] for attribute in row[name]] for name in row if name.endswith("_attributes")}

    return tiny.paintings(4).map(rename)


def train(path: Path, folder: Path, settings: dict[str, int], output_dir: Path, *flags) -> Any:
    """One step of a recipe, on a tiny pipeline, with its own settings but for sizes, and for 4 and 8 bits, which need a GPU."""
    command, given = read_recipe(path)
    data = {"instance-dpo": "pairs", "diffusion-kto": "labelled"}.get(command, "paintings")
    recipe = yaml.safe_load(path.read_text())
    small = {
        **settings,
        "model_name_or_path": folder / "model",
        "dataset_name": folder / f"{data}.parquet",
        "output_dir": output_dir,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "num_inference_steps": 1,
        "report_to": "none",
        **{name: False for name in ("load_in_4bit", "load_in_8bit") if name in recipe},
        **({"sample_model": folder / "model"} if "sample_model" in recipe else {}),
        **({"precompute_dir": output_dir / "files"} if recipe.get("precompute") else {}),
    }
    flags = ["--config", path, *(part for name, value in small.items() for part in (f"--{name}", value)), *flags]
    script = script_of(command)
    args = script.make_parser().parse_args_and_config([*map(str, flags)])
    script.main(*args)
    return args


@pytest.mark.slow
@each_recipe
def test_every_recipe_trains(path, standing_for, tmp_path):
    """
    With a tiny pipeline of its family for its base, the trainer takes every setting of the recipe, draws its samples, and saves what
    it says: a LoRA, an expert, or all weights.
    """
    folder, settings = standing_for(base_of(path))
    flags = []
    if read_recipe(path).command == "complex-po":
        stage = path.with_name(f"attribute_sft_{base_of(path)}.yaml")
        train(stage, folder, settings, tmp_path / "expert")
        assert (tmp_path / "expert" / "attribute_expert.json").exists()
        flags = ["--expert", tmp_path / "expert"]
    _, training_args, model_args = train(path, folder, settings, tmp_path / "out", *flags)
    weights = "pytorch_lora_weights.safetensors" if model_args.use_peft else "model_index.json"
    assert (tmp_path / "out" / weights).exists()
    assert (tmp_path / "out" / "samples" / "step-000001.png").exists() or training_args.sample_steps > 1
    assert list((tmp_path / "out" / "samples").glob("*.png"))


# ---- Scripts ----


def test_a_folder_of_ones_own_format_trains(tmp_path):
    """pairs_from_jsonl.py makes the columns with the images' bytes unchanged, and instance_dpo.py trains on them."""
    (tmp_path / "images").mkdir()
    lines = []
    for index, row in enumerate(tiny.pairs(4)):
        for column in ("chosen", "rejected"):
            row[column].save(tmp_path / "images" / f"{index}_{column}.jpg")
        lines.append(
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "chosen": f"images/{index}_chosen.jpg",
                "rejected": f"images/{index}_rejected.jpg",
                "licence": "of no interest",
                "instances": [
                    {
                        "label": instance["label"],
                        "box_chosen": instance["chosen_box"],
                        "box_rejected": instance["rejected_box"],
                        "better": ["chosen", "rejected", "tie"][instance["preference"]],
                        "why": "drawn by eye",
                    }
                    for instance in row["instances"]
                ],
            }
        )
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    out = run("pairs_from_jsonl.py", "--input_dir", tmp_path, "--output_dir", tmp_path / "dataset")
    assert "Wrote 4 pairs with 8 instances" in out

    dataset = load_dataset(str(tmp_path / "dataset"), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset["instances"] == tiny.pairs(4)["instances"]
    table = dataset.with_format("arrow")[:]
    assert table["chosen"][2]["bytes"].as_py() == (tmp_path / "images" / "2_chosen.jpg").read_bytes()

    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    run(
        "instance_dpo.py", "--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "dataset",
        "--output_dir", tmp_path / "out", "--use_peft", "--max_steps", 1, "--report_to", "none",
    )  # fmt: skip
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_pairs_are_annotated_and_joined(tmp_path):
    """annotate_pairs.py finds the instances of the quickstart's scenes, and writes what the trainer takes."""
    (tmp_path / "data").mkdir()
    pairs = preference_dataset(6, seed=0)
    pairs.remove_columns("instances").to_parquet(tmp_path / "data" / "train.parquet")
    flags = ["--dataset_name", tmp_path / "data", "--vlm", "oracle", "--detector", "oracle"]
    out = run("annotate_pairs.py", *flags, "--output_dir", tmp_path / "out")
    assert "3 of 12 instances contradict their pair's label." in out  # 46 % of the six B, none of the A
    dataset = load_from_disk(tmp_path / "out" / "dataset")
    assert dataset.features == pairs.features and dataset["id"] == pairs["id"]
    for found, true in zip(dataset["instances"], pairs["instances"], strict=True):
        assert [instance["preference"] for instance in found] == [instance["preference"] for instance in true]


def test_the_pages_of_the_annotation_are_shown(tmp_path):
    """annotation_demo.py writes the page of each command, and says how to make it."""
    out = run("annotation_demo.py", "--output_dir", tmp_path / "demo", "--num_rows", 6)
    assert "annotate-instances" in out and "annotate-attributes" in out
    assert all((tmp_path / "demo" / name / "preview.html").is_file() for name in ("instances", "attributes"))


def test_paintings_are_annotated_and_joined(tmp_path):
    """annotate_paintings.py finds the attributes of the quickstart's paintings, and writes what the trainers take."""
    (tmp_path / "data").mkdir()
    paintings = painting_dataset(6, seed=0)
    unlabelled = paintings.remove_columns(["positive_attributes", "negative_attributes"])
    unlabelled.to_parquet(tmp_path / "data" / "train.parquet")
    flags = ["--dataset_name", tmp_path / "data", "--vlm", "oracle", "--criteria", shipped("criteria.yaml")]
    out = run("annotate_paintings.py", *flags, "--output_dir", tmp_path / "out")
    assert "6 of 6 images have attributes." in out
    dataset = load_from_disk(tmp_path / "out" / "dataset")
    for name in ("id", "positive_attributes", "negative_attributes"):
        assert list(map(sorted, dataset[name])) == list(map(sorted, paintings[name]))


LORA = "pytorch_lora_weights.safetensors"


def flags_of_both_stages(folder: Path) -> list:
    """The flags of complex_po.py for one training of an epoch, and one of two steps."""
    (folder / "criteria.yaml").write_text(tiny.CRITERIA)
    (folder / "data").mkdir()
    tiny.paintings(4).to_parquet(folder / "data" / "train.parquet")
    tiny.sd_pipeline().save_pretrained(folder / "model")
    return [
        *("--model_name_or_path", folder / "model", "--dataset_name", folder / "data", "--max_steps", 2),
        *("--criteria", folder / "criteria.yaml", "--expert_dir", folder / "expert", "--expert_epochs", 1),
        *("--output_dir", folder / "out", "--lora_r", 4, "--report_to", "none", "--use_cpu", "--save_steps", 1),
        *("--per_device_train_batch_size", 2, "--seed", 5, "--learning_rate", 0.1, "--expert_learning_rate", 0.1),
    ]


def test_both_stages_of_cpo_in_one_script(tmp_path):
    """
    complex_po.py trains an expert, then the model that it teaches. Stopped in either training, the same command ends on the
    weights of a run that was not: it keeps an expert that is finished, and one that is not goes on at its checkpoint.
    """
    flags = flags_of_both_stages(tmp_path)
    run("complex_po.py", *flags)
    expected = {name: load_file(tmp_path / name / LORA) for name in ("expert", "out")}
    finished = (tmp_path / "expert" / LORA).stat().st_mtime_ns

    def stop_in(name: str) -> None:
        """The folder of a training after its first step."""
        for file in ("trainer_state.json", LORA, "checkpoint-2/" + LORA):
            (tmp_path / name / file).unlink(missing_ok=True)
        (tmp_path / name / "checkpoint-2").rename(tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")

    stop_in("out")
    run("complex_po.py", *flags, "--resume_from_checkpoint", "true")
    assert tiny.max_difference(expected["out"], load_file(tmp_path / "out" / LORA)) == 0
    assert (tmp_path / "expert" / LORA).stat().st_mtime_ns == finished

    stop_in("expert")
    (tmp_path / "out").rename(tmp_path / "earlier")
    run("complex_po.py", *flags, "--resume_from_checkpoint", "true")
    for name, weights in expected.items():
        assert tiny.max_difference(weights, load_file(tmp_path / name / LORA)) == 0


def test_both_stages_are_pushed_apart(hub, tmp_path, monkeypatch):  # noqa: F811
    """The expert has a repository of its own, private like the model's, on the same branch and by the same token."""
    flags = flags_of_both_stages(tmp_path)
    flags += ["--push_to_hub", "--hub_model_id", "org/cpo", "--hub_private_repo", "true", "--hub_token", "hf_user"]
    flags += ["--hub_strategy", "checkpoint", "--hub_revision", "trial"]
    run("complex_po.py", *flags, here=monkeypatch)
    for name, folder in (("org/cpo", "out"), ("org/cpo-expert", "expert")):
        files = hub.files(name, revision="trial")
        assert files[LORA] == (tmp_path / folder / LORA).read_bytes()
        assert f"last-checkpoint/{LORA}" in files and "README.md" in files
        assert ("attribute_expert.json" in files) == (folder == "expert")
    assert {(facts.id, facts.private) for facts in hub.repositories} == {("org/cpo", True), ("org/cpo-expert", True)}


def test_an_expert_and_its_model_need_two_folders(tmp_path):
    """Before anything is trained."""
    flags = [*flags_of_both_stages(tmp_path), "--expert_dir", tmp_path / "out"]
    result = start("complex_po.py", *flags)
    assert result.returncode != 0 and "`--expert_dir` is `--output_dir`" in result.stderr
    assert not (tmp_path / "out").exists()


def test_base_model_and_arm_are_compared(hub, tmp_path, monkeypatch):  # noqa: F811
    """compare_models.py scores images of the three from the same prompts, and pushes all of them with their scores."""
    monkeypatch.chdir(tmp_path)
    clip_folder(Path("laion/CLIP-ViT-H-14-laion2B-s32B-b79K"))
    tiny.sd_pipeline().save_pretrained("base")
    for seed, name in enumerate(("dpo", "iapo")):
        save_lora(tiny.sd_pipeline(), Path(name), seed=seed)
    Path("prompts.txt").write_text("a red circle\na blue square\n")
    Path("protocol.yaml").write_text("name: short\nsource: this test\nnum_inference_steps: 1\nguidance_scale: 2.0\n")
    flags = ["--base_model", "base", "--model", "iapo", "--arm", "dpo", "--prompts", "prompts.txt", "--use_cpu"]
    flags += ["--protocol", "protocol.yaml", "--metrics", "clip_score", "--push_to_hub", "org/results", "--private"]
    run("compare_models.py", *flags, here=monkeypatch)
    summary = json.loads(Path("evaluation", "summary.json").read_text())
    assert list(summary["models"]) == ["base", "arm", "model"] and summary["baseline"] == "base"
    rows = load_dataset("org/results", split="train").to_list()
    assert sorted((row["model"], row["prompt"]) for row in rows) == sorted(
        (model, prompt) for model in summary["models"] for prompt in ("a red circle", "a blue square")
    )
    means = {
        name: sum(row["clip_score"] for row in rows if row["model"] == name) / 2 for name in ("base", "arm", "model")
    }
    for name, mean in means.items():
        assert summary["scores"][name]["clip_score"]["mean"] == pytest.approx(mean)
    assert len({row["image"]["bytes"] for row in rows if row["prompt"] == "a red circle"}) == 3
    assert [facts.private for facts in hub.repositories] == [True]
