# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import subprocess
import sys

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from safetensors import safe_open

from tests import tiny
from tests.cli import processes
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer, visualization
from trl_diffusion.cli.main import COMMANDS, main
from trl_diffusion.quickstart.paintings import painting_dataset
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.quickstart.world import preference_dataset


def run(*args) -> subprocess.CompletedProcess:
    return processes.run(["-c", processes.COMMAND, *args])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.sd_pipeline().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    tiny.pairs().to_parquet(folder / "data" / "train.parquet")
    return folder


def test_help_lists_every_command_without_importing_torch():
    """`trl-diffusion --help` names each command, and answers at once."""
    code = "import sys; from trl_diffusion.cli import main; main(['--help'] if sys.argv[1:] else []); "
    result = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_its_flags(command, capsys):
    """`trl-diffusion COMMAND --help` prints a usage line with the command's name."""
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"trl-diffusion {command}" in capsys.readouterr().out


def test_env_names_versions(capsys):
    """`trl-diffusion env` prints the versions that a bug report needs."""
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert all(f"- {package}: " in out for package in ("trl-diffusion", "trl", "diffusers", "torch"))


def test_training_from_yaml_and_flags(folders, tmp_path):
    """Flags win over the YAML file; the result is a LoRA file with its metadata, and a card."""
    (tmp_path / "config.yaml").write_text(
        f"model_name_or_path: {folders / 'model'}\ndataset_name: {folders / 'data'}\nuse_peft: true\nlora_r: 4\n"
        "lora_alpha: 8\nbeta: 100\nmax_steps: 5\nreport_to: none\nnum_processes: 1\n"
    )
    result = run(
        "instance-dpo", "--config", tmp_path / "config.yaml", "--max_steps", 1, "--output_dir", tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert '"unet.lora_alpha": 8' in file.metadata()["lora_adapter_metadata"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| beta | 100 |" in card and "| optimizer steps | 1 |" in card


def test_both_stages_of_cpo(folders, tmp_path):
    """`attribute-sft` saves an expert that `complex-po` takes; both train a LoRA without being asked to."""
    (tmp_path / "criteria.yaml").write_text(tiny.CRITERIA)
    (tmp_path / "data").mkdir()
    tiny.paintings(4).to_parquet(tmp_path / "data" / "train.parquet")
    flags = ["--model_name_or_path", folders / "model", "--dataset_name", tmp_path / "data", "--max_steps", 1]
    flags += ["--criteria", tmp_path / "criteria.yaml", "--lora_r", 4, "--report_to", "none", "--num_processes", 1]
    result = run("attribute-sft", *flags, "--output_dir", tmp_path / "expert")
    assert result.returncode == 0, result.stderr
    result = run("complex-po", *flags, "--output_dir", tmp_path / "out")
    assert result.returncode != 0 and "`--expert` is missing" in result.stderr
    result = run("complex-po", *flags, "--expert", tmp_path / "expert", "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert '"unet.r": 4' in file.metadata()["lora_adapter_metadata"]
    assert "| loss_type | stabilized |" in (tmp_path / "out" / "README.md").read_text()


def test_a_mistake_is_one_readable_line(capsys):
    """A ValueError ends a command with status 2 and its message, without a traceback."""
    assert main(["instance-dpo", "--output_dir", "x", "--w_neg", "2"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("trl-diffusion instance-dpo: error: `w_neg` must be at most 1") and "Traceback" not in error
    )


def test_a_mistake_in_the_data_is_named_by_the_training(folders, tmp_path):
    """A split that does not exist is an error that lists those that do."""
    result = run(
        "instance-dpo", "--model_name_or_path", folders / "model", "--dataset_name", folders / "data",
        "--dataset_train_split", "validation", "--output_dir", tmp_path, "--report_to", "none",
    )  # fmt: skip
    assert result.returncode != 0
    assert "The dataset has no split `validation`; it has train." in result.stderr


def test_show_masks_draws_a_picture_a_row(folders, tmp_path, capsys):
    """`trl-diffusion show-masks` writes one picture for each row, both images side by side."""
    flags = [
        "--dataset_name",
        str(folders / "data"),
        "--num_rows",
        "3",
        "--resolution",
        "32",
        "--vae_scale_factor",
        "4",
    ]
    assert main(["show-masks", *flags, "--output_dir", str(tmp_path)]) == 0
    pictures = sorted(path.name for path in tmp_path.iterdir())
    assert pictures == ["0000.png", "0001.png", "0002.png"]
    assert Image.open(tmp_path / "0000.png").width == 2 * (512 + 8) + 8
    assert "Drew 3 rows" in capsys.readouterr().out


@pytest.mark.parametrize("make", [tiny.sd_pipeline, tiny.sd3_pipeline, tiny.flux_pipeline])
def test_show_masks_draws_those_of_the_training(folders, tmp_path, monkeypatch, make):
    """For each family, the masks in the pictures are the ones that the trainer weighs the errors of the latents with."""
    drawn = []
    monkeypatch.setattr(
        visualization, "mask_overlay", lambda pixels, mask, *rest: drawn.append(mask) or tiny.image(0, 32, 32)
    )
    flags = [
        "--dataset_name",
        str(folders / "data"),
        "--num_rows",
        "2",
        "--resolution",
        "32",
        "--vae_scale_factor",
        "4",
    ]
    assert (
        main(["show-masks", *flags, "--w_neg", "0.25", "--box_margin", "0.1", "--output_dir", str(tmp_path / "masks")])
        == 0
    )
    settings = {"resolution": 32, "w_neg": 0.25, "box_margin": 0.1} | (
        {} if make is tiny.sd_pipeline else {"max_sequence_length": 16}
    )
    args = InstanceDPOConfig(str(tmp_path / "out"), **tiny.FAST | settings)
    dataset = load_dataset(str(folders / "data"), split="train").select(range(2))
    trainer = InstanceDPOTrainer(make(), args=args, train_dataset=dataset, peft_config=tiny.lora())
    batch = trainer.data_collator(list(dataset))
    masks = trainer.prepare_batch(batch, tiny.latents(trainer, batch))["masks"]
    assert masks.shape == (4, 8, 8)  # the chosen images of both rows, then the rejected ones
    assert torch.equal(torch.stack([drawn[n] for n in (0, 2, 1, 3)]), masks)
    assert masks.min() < 0.9 < 1 < masks.max()


def test_annotating_pairs_and_going_on(tmp_path, capsys):
    """`trl-diffusion annotate-instances` writes shards and says what they hold; the same command again changes nothing."""
    (tmp_path / "data").mkdir()
    preference_dataset(6, seed=0).remove_columns("instances").to_parquet(tmp_path / "data" / "train.parquet")
    flags = ["--dataset_name", tmp_path / "data", "--vlm", "oracle", "--detector", "oracle", "--rows_per_shard", 4]
    command = [*map(str, ["annotate-instances", *flags, "--crop_size", 64, "--output_dir", tmp_path / "out"])]
    assert main(command) == 0
    assert "rows 6, ok 6, rejected 0, error 0" in capsys.readouterr().out
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert sorted(path.name for path in files if path.suffix == ".parquet") == [
        "annotations-000000.parquet",
        "annotations-000001.parquet",
    ]
    assert main(command) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == files
    assert main([*command, "--dataset_streaming"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {next(iter(files)).parent.name}

    assert main([*command, "--preview", "2"]) == 0
    assert "Nothing else was written" in capsys.readouterr().out
    assert (tmp_path / "out" / "preview.html").read_text().count("<article>") == 2


def test_annotating_images(tmp_path, capsys):
    """`trl-diffusion annotate-attributes` takes any columns by a mapping, and a tree of one's own."""
    (tmp_path / "data").mkdir()
    dataset = painting_dataset(3, seed=0).rename_columns({"image": "picture", "prompt": "title"})
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    flags = ["--dataset_name", tmp_path / "data", "--criteria", shipped("criteria.yaml"), "--vlm", "oracle"]
    flags += ["--columns", '{"image": "picture", "prompt": "title"}', "--output_dir", tmp_path / "out"]
    assert main(["annotate-attributes", *map(str, flags)]) == 0
    assert "rows 3, ok 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--dataset_split", "test"],
            "The dataset has no split `test`; it has train. Name one with `--dataset_split`.",
        ),
        (["--columns", "{"], "`--columns` is not valid JSON"),
        (["--columns", '{"prompt": "text"}'], "The dataset lacks text"),
        (
            ["--vlm", "no/such-model"],
            "'no/such-model' is neither a folder nor a model on the Hub or in its cache",
        ),
        (["--vlm_base_url", "localhost:8000", "--vlm", "x"], "The server's address must be like"),
        (["--max_error_rate", "2"], "`--max_error_rate` must be in [0, 1]"),
        (["--judge_prompt", "missing.md"], "The prompt of the judge cannot be read"),
    ],
)
def test_mistakes_in_annotating(folders, tmp_path, capsys, flags, message):
    """A mistake is one readable line, before any model is loaded."""
    base = ["--dataset_name", str(folders / "data"), "--vlm", "oracle", "--detector", "oracle"]
    assert main(["annotate-instances", *base, "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_evaluating(tmp_path):
    """`trl-diffusion evaluate` samples from both bases of the quickstart, and the oracle tells which of them knows scenes."""
    (tmp_path / "prompts.txt").write_text("a red circle and a blue square\na green square and a red triangle\n")
    models = [f"scenes={shipped('base_pipeline')}", f"paintings={shipped('painting_base')}"]
    flags = ["--models", *models, "--prompts", tmp_path / "prompts.txt", "--num_inference_steps", 10]
    flags += ["--guidance_scale", 2, "--metrics", "caption_match", "--vlm", "oracle", "--detector", "oracle"]
    flags += ["--use_cpu", "--num_processes", 1, "--output_dir", tmp_path / "out"]
    result = run("evaluate", *flags)
    assert result.returncode == 0, result.stderr
    assert "Evaluated scenes, paintings: look at report.md and gallery.html" in result.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    means = {model: scores["caption_match"]["mean"] for model, scores in summary["scores"].items()}
    assert means["scenes"] > 0.7 > 0.3 > means["paintings"]
    assert summary["win_rates"]["paintings"]["caption_match"]["win_rate"] < 0.5
    result = run("evaluate", *flags, "--seed", 1)
    assert result.returncode != 0 and "seed" in result.stderr.splitlines()[-1]
