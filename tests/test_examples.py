# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from datasets import load_dataset, load_from_disk
from transformers.utils import is_torch_bf16_gpu_available

from tests import tiny
from tests.cli import processes
from trl_diffusion.cli.main import LAUNCHED_COMMANDS
from trl_diffusion.quickstart.world import preference_dataset


EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *args) -> str:
    result = processes.run([EXAMPLES / "scripts" / script, *args])
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_configuration(path, tmp_path):
    """A shipped YAML file is a configuration on any machine, as it is: all its keys are known, and the precision is the machine's."""
    command, flags = re.search(r"trl-diffusion (\S+) --config (.*)", path.read_text()).groups()
    assert command in LAUNCHED_COMMANDS and flags.startswith(f"examples/configs/{path.name} ")
    script = import_module(f"trl_diffusion.scripts.{command.replace('-', '_')}")
    flags = ["--config", str(path), *flags.split()[1:], "--output_dir", str(tmp_path)]
    script_args, training_args, model_args = script.make_parser().parse_args_and_config(flags)
    assert model_args.model_name_or_path and script_args.dataset_name
    assert model_args.use_peft or command == "instance-dpo"
    assert training_args.sample_prompts
    assert training_args.bf16 == is_torch_bf16_gpu_available()


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


def test_both_stages_of_cpo_in_one_script(tmp_path):
    """complex_po.py trains an expert, then the model that it teaches."""
    (tmp_path / "criteria.yaml").write_text(tiny.CRITERIA)
    (tmp_path / "data").mkdir()
    tiny.paintings(4).to_parquet(tmp_path / "data" / "train.parquet")
    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    run(
        "complex_po.py", "--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data",
        "--criteria", tmp_path / "criteria.yaml", "--expert_dir", tmp_path / "expert", "--expert_epochs", 1,
        "--output_dir", tmp_path / "out", "--max_steps", 1, "--lora_r", 4, "--report_to", "none",
    )  # fmt: skip
    for folder in ("expert", "out"):
        assert (tmp_path / folder / "pytorch_lora_weights.safetensors").exists()
