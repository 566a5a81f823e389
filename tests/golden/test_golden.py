# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_diffusion.losses import PAIR_LOSSES

from ..families import FAMILIES
from .__main__ import difference
from .arms import ARMS, record
from .loss_compare import ROOT, compare


GOLDEN = json.loads(Path(__file__).with_name("losses.json").read_text(encoding="utf-8"))


def test_every_arm_is_recorded():
    """The file holds what `python -m tests.golden` compares."""
    assert GOLDEN.keys() == ARMS.keys()


def test_every_trainer_has_every_kind_of_model():
    """The three trainers of the two papers: noise and velocity, SDXL, and each flow transformer."""
    papers = ("iapo", "sft", "cpo")
    trained = {(trainer, family) for family, _, trainer, _ in ARMS.values() if trainer in papers}
    assert trained == {(trainer, family) for trainer in papers for family in ("sd", "sd_v", "sdxl", *FAMILIES)}


def test_every_objective_has_an_arm():
    """Each loss of pairs, and each switch that changes one."""
    settings = [settings for _, _, trainer, settings in ARMS.values() if trainer == "iapo"]
    assert {each.get("loss_type", "sigmoid") for each in settings} == PAIR_LOSSES.keys()
    for switch in ("safeguard_mu", "anchor_alpha", "grouped_instances", "label_smoothing"):
        assert any(each.get(switch) for each in settings), switch


def test_two_revisions_are_compared_in_what_both_log():
    """The largest difference, relative above 1; a series that broke off differs without bound; a new metric does not count."""
    before = {"a": {"loss": [1.0, 2.0], "rewards/accuracies": [1.0]}, "b": {"loss": [1.0]}, "gone": {"loss": [1.0]}}
    now = {
        "a": {"loss": [1.0, 2.5], "rewards/accuracies": [0.0], "new": [1.0]},
        "b": {"loss": []},
        "added": {"loss": [1.0]},
    }
    assert compare(before, now) == {"a": 0.25, "b": float("inf")}


@pytest.mark.slow
def test_a_revision_is_itself():
    """The same commit twice: two trainings are the same to the last digit, and the checkouts are gone."""
    command = [sys.executable, "-m", "tests.golden.loss_compare", "HEAD", "HEAD", "--tolerance", "0", "--arms"]
    ended = subprocess.run([*command, "iapo-sd-lora-random"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "1 arms are the same" in ended.stdout
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "/files" not in worktrees


@pytest.mark.parametrize(
    "name",
    [
        *("iapo-sdxl-lora-inversion", "sft-sd_v-full-random", "cpo-sd-lora-random"),
        *("iapo-flux-full-inversion", "cpo-sd3-lora-random", "iapo-flux_2-lora-random", "sft-flux_2_dev-lora-random"),
        *(
            "iapo-z_image-full-inversion",
            "cpo-qwen_image-lora-random",
            "cpo-krea_2-lora-random",
            "sft-sana-lora-random",
            "kto-sd-lora-random",
            "dspo-sd-lora-random",
            "grouped-sd3-lora-random",
        ),
    ],
)
def test_losses_are_the_recorded_ones(name):
    """Twenty steps log the losses that were recorded; 1e-4 leaves room for the rounding of another processor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recorded = record(name)
    finally:
        torch.set_num_threads(threads)
    for key in ("loss", "eval_loss"):
        assert difference(GOLDEN[name][key], recorded[key]) <= 1e-4
