# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What libraries say about themselves is held back; what is cut off prompts is said once."""

import logging
import subprocess
import sys

import pytest

from tests import tiny
from tests.cli.processes import COMMAND
from trl_diffusion.cli.quiet import PIPELINES, quiet
from trl_diffusion.notes import NOTES


@pytest.mark.parametrize("make", [tiny.sd_pipeline, tiny.sdxl_pipeline])
def test_what_is_cut_off_is_counted(make, capsys, monkeypatch):
    """Two long prompts of three, encoded twice: two endings, one line, and no warning of the pipeline's."""
    pipeline = make()
    logger = logging.getLogger(type(pipeline).__module__)
    monkeypatch.setattr(logger, "level", logging.WARNING)  # whatever other tests set
    logger.manager._clear_cache()
    assert type(pipeline).__module__.removeprefix("diffusers.pipelines.") in PIPELINES
    with quiet() as cut:
        for _ in range(2):
            pipeline.encode_prompt(
                ["red " * 100, "blue " * 100, "a cat"],
                device="cpu",
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
    assert cut not in logger.filters  # what follows in this process is told as before
    assert len(cut.endings) == 2
    cut.say("evaluate")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2 different endings were cut off, such as 'blue" in error


def test_notes_are_held_back_and_others_are_not():
    """Of each logger, exactly the notes that are listed."""
    for name, texts in NOTES.items():
        for text in (*texts, "something else"):
            record = logging.LogRecord(name, logging.WARNING, "", 0, text, None, None)
            assert bool(logging.getLogger(name).filter(record)) == (text == "something else")


def test_a_training_prints_nothing_of_its_libraries(tmp_path):
    """Behind the progress bar, stderr is empty; long prompts are one line."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    rows = tiny.pairs(4).map(lambda row: {"prompt": row["prompt"] + " red" * 100})
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    flags = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data", "--max_steps", 3]
    flags += ["--report_to", "none", "--num_processes", 1, "--disable_tqdm", "true", "--output_dir", tmp_path / "out"]
    command = [sys.executable, "-c", COMMAND, "instance-dpo", *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip() and "it/s" not in line and "?it" not in line]
    assert len([line for line in lines if "were cut off" in line]) == 1
    assert not [line for line in lines if "torchvision" in line or "accelerate" in line or "truncated" in line]


def test_a_notebook_is_as_quiet_as_a_command():
    """Importing the trainers prints no note about torchvision."""
    code = "from trl_diffusion import InstanceDPOTrainer; import diffusers; diffusers.StableDiffusionPipeline"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "torchvision" not in result.stderr + result.stdout
