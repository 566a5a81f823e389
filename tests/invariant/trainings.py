# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Trainings through the command line, as a user starts them, and by how much two of them differ."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import tiny
from tests.cli.processes import COMMAND, ROOT, run, run_distributed
from trl_diffusion import unpair_pairs


TRAINERS = {
    "instance_dpo": "instance-dpo",
    "attribute_sft": "attribute-sft",
    "complex_po": "complex-po",
    "ddspo": "ddspo",
    "diffusion_kto": "diffusion-kto",
}
# What a dataset has: pairs, images with a label, or else paintings
DATASETS = {"instance_dpo": "pairs", "ddspo": "pairs", "diffusion_kto": "labelled"}
KINDS = ("sd", "sd_v", "sdxl", "sd3")  # noise, velocity, two text encoders and the size of the image, flow
NUM_ROWS = 11  # in steps of 4 rows, the last step of an epoch has 3
# Momentum has a state to resume, and a difference shows in the weights as large as it is
SETTINGS = {
    "lora_r": 4,
    "max_steps": 5,
    "logging_steps": 1,
    "save_steps": 100,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "learning_rate": 1,
    "max_grad_norm": 0.05,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "activation_checkpointing": False,
}
# What a log says of the machine, and the part of the epoch, which transformers counts in micro-batches
NOT_COMPARED = ("runtime", "per_second", "total_flos", "epoch")


@dataclass
class Run:
    """
    How a training ended.

    Attributes:
        folder (`Path`):
            Its output directory.
        stderr (`str`, *optional*):
            What its processes said.
        weights (`dict[str, torch.Tensor]`):
            What is trained.
        logs (`dict[int, dict[str, float]]`):
            The metrics of each step that was logged.
    """

    folder: Path
    stderr: str = ""
    weights: dict[str, torch.Tensor] = field(init=False)
    logs: dict[int, dict[str, float]] = field(init=False)

    def __post_init__(self):
        files = [
            self.folder / "pytorch_lora_weights.safetensors",
            *self.folder.glob("*/diffusion_pytorch_model.safetensors"),
        ]
        self.weights = load_file(next(file for file in files if file.exists() and "vae" not in file.parts))
        checkpoint = max(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        self.logs = {}
        for entry in state["log_history"]:
            metrics = {name: value for name, value in entry.items() if not any(part in name for part in NOT_COMPARED)}
            self.logs.setdefault(entry["step"], {}).update(metrics)


def difference(one: Run, other: Run) -> float:
    """The largest difference of a weight, or of a metric that both logged, which is relative where it is above 1."""
    assert one.weights.keys() == other.weights.keys()
    found = [(one.weights[name] - other.weights[name]).abs().max().item() for name in one.weights]
    for step in one.logs.keys() & other.logs.keys():
        for name in one.logs[step].keys() & other.logs[step].keys():
            a, b = one.logs[step][name], other.logs[step][name]
            if name == "rewards/accuracies" and abs(one.logs[step]["rewards/margins"]) <= 1e-4:
                continue  # policy and reference are nearly one model: the sign of a row's margin may be a rounding error
            found.append(abs(a - b) / max(1.0, abs(a)))
    return max(found)


class Trainings:
    """
    Runs trainings of tiny models.

    Args:
        folder (`Path`):
            Where models, datasets and results are kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.kept: dict[str, Run] = {}

    def model(self, kind: str) -> Path:
        folder = self.folder / f"model-{kind}"
        if not folder.exists():
            tiny.PIPELINES[kind]().save_pretrained(folder)
        return folder

    def dataset(self, trainer: str) -> Path:
        kind = DATASETS.get(trainer, "paintings")
        folder = self.folder / kind
        if not folder.exists():
            folder.mkdir()
            if kind == "labelled":
                rows = unpair_pairs(tiny.pairs(NUM_ROWS)).select(range(NUM_ROWS))
            else:
                rows = tiny.pairs(NUM_ROWS) if kind == "pairs" else tiny.paintings(NUM_ROWS)
            for split in ("train", "test"):
                rows.to_parquet(folder / f"{split}.parquet")
            (self.folder / "criteria.yaml").write_text(tiny.CRITERIA)
        return folder

    def flags(self, trainer: str, kind: str) -> dict[str, object]:
        """What every training of this kind is told."""
        flags = {"model_name_or_path": self.model(kind), "dataset_name": self.dataset(trainer), **SETTINGS}
        flags |= {"use_peft": True} | tiny.settings(tiny.PIPELINES[kind]())
        if trainer in DATASETS:
            return flags | {"beta": 5}
        flags |= {"criteria": self.folder / "criteria.yaml"}
        if trainer == "complex_po":
            flags |= {"expert": self.reference("attribute_sft", kind).folder, "beta": 5}
        return flags

    def reference(self, trainer: str, kind: str) -> Run:
        """The training that others are compared to, which is run once."""
        name = f"reference-{trainer}-{kind}"
        if name not in self.kept:
            self.kept[name] = self.run(trainer, kind, name)
        return self.kept[name]

    def arguments(self, trainer: str, kind: str, **changed: object) -> list:
        """The flags of a training; `None` leaves one out."""
        values = {flag: value for flag, value in (self.flags(trainer, kind) | changed).items() if value is not None}
        return [
            part
            for flag, value in values.items()
            for part in (f"--{flag}", *(value if isinstance(value, list) else [value]))
        ]

    def run(
        self,
        trainer: str,
        kind: str,
        name: str,
        processes: int = 1,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        **changed: object,
    ) -> Run:
        """
        Runs a training.

        Args:
            trainer (`str`), kind (`str`):
                What is trained, and with which model.
            name (`str`):
                Name of the output directory.
            processes (`int`, *optional*, defaults to 1):
                Number of processes.
            cwd (`Path`, *optional*):
                The current directory.
            env (`dict[str, str]`, *optional*):
                Variables that are added to the environment.
            **changed:
                Flags that differ from those of the reference.
        """
        folder = self.folder / name
        args = self.arguments(trainer, kind, output_dir=folder, **changed)
        command, settings = ["-c", COMMAND, TRAINERS[trainer], *args], {"cwd": cwd, "env": os.environ | (env or {})}
        ended = [run(command, **settings)] if processes == 1 else run_distributed(command, processes, **settings)
        assert all(process.returncode == 0 for process in ended), "\n".join(process.stderr for process in ended)
        return Run(folder, "\n".join(process.stderr for process in ended))
