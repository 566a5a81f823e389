# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a new user does, in two fresh environments: one that has this library, and one that only loads what was pushed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.stand_in import StandIn


ROOT = Path(__file__).parents[2]
PLAIN = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "pillow")
MAKE_DATA = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from trl_diffusion.quickstart.sampling import shipped
from trl_diffusion.quickstart.world import preference_dataset

HfApi().create_repo("tiny-base")
HfApi().upload_folder(repo_id="user/tiny-base", folder_path=shipped("base_pipeline"))
Path("pairs").mkdir()
preference_dataset(16, seed=0).to_parquet("pairs/train.parquet")
Path("unlabelled").mkdir()
preference_dataset(8, seed=1).remove_columns("instances").to_parquet("unlabelled/train.parquet")
"""
LOAD_MODELS = """
import importlib.util, json
import numpy as np
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from PIL import Image

assert importlib.util.find_spec("trl_diffusion") is None
whole = DiffusionPipeline.from_pretrained("user/whole")
assert np.asarray(whole("a red circle", num_inference_steps=2).images[0]).std() > 1
lora = DiffusionPipeline.from_pretrained("user/tiny-base")
lora.load_lora_weights("user/lora")
print(json.dumps(sorted(lora.get_active_adapters())))
"""
LOAD_DATA = """
from datasets import load_dataset

rows = load_dataset("user/my-pairs-instances", split="train")
streamed = list(load_dataset("user/my-pairs-instances", split="train", streaming=True))
assert [row["id"] for row in rows] == [row["id"] for row in streamed] and len(streamed) == 8
assert rows[0]["chosen"].size == streamed[0]["chosen"].size
assert sum(len(row["instances"]) for row in streamed) == 16
annotations = load_dataset("user/my-pairs-instances", "annotations", split="train")
assert annotations.features["status"].names == ["ok", "rejected", "error"]
"""


class Environment:
    """A fresh virtual environment, whose Hub is the stand-in."""

    def __init__(self, folder: Path, hub: StandIn, requirements: list[str]):
        self.folder, self.work = folder, folder / "work"
        self.work.mkdir(parents=True)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        self.variables = variables | hub.environment(token="hf_user", home=folder / "home") | {"OMP_NUM_THREADS": "2"}
        self.run(sys.executable, "-m", "venv", folder / "venv")
        self.run(self.python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *requirements)

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    def run(self, *command) -> str:
        done = subprocess.run(
            [str(part) for part in command], cwd=self.work, env=self.variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def script(self, code: str) -> str:
        return self.run(self.python, "-c", code)


@pytest.mark.slow
def test_a_new_user(tmp_path):
    """Trains on a folder, pushes, loads with plain diffusers; annotates, pushes, loads and streams; the card's code runs."""
    with StandIn() as hub:
        hub.add_user("user", "hf_user")
        mine = Environment(tmp_path / "mine", hub, [str(ROOT)])
        mine.script(MAKE_DATA)
        train = (mine.python.parent / "trl-diffusion", "instance-dpo", "--dataset_name", "pairs", "--max_steps", 4)
        train += ("--report_to", "none", "--push_to_hub", "--sample_prompts", "a red circle and a blue square")
        train += ("--num_inference_steps", 4, "--per_device_train_batch_size", 4, "--logging_steps", 1)
        mine.run(*train, "--model_name_or_path", "user/tiny-base", "--output_dir", "lora", "--use_peft")
        mine.run(*train, "--model_name_or_path", "user/tiny-base", "--output_dir", "whole")
        example = ROOT / "examples" / "scripts" / "annotate_pairs.py"
        oracle = ("--vlm", "oracle", "--detector", "oracle", "--output_dir", "annotations")
        mine.run(mine.python, example, "--dataset_name", "unlabelled", *oracle, "--push_to_hub", "my-pairs-instances")

        others = Environment(tmp_path / "others", hub, list(PLAIN))
        assert json.loads(others.script(LOAD_MODELS).splitlines()[-1])
        others.script(LOAD_DATA)
        for name in ("lora", "whole"):
            card = hub.files(f"user/{name}")["README.md"].decode()
            code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
            assert "user/tiny-base" in code or name == "whole"
            on_this_machine = code.replace('"cuda"', '"cpu"').replace("torch.float16", "torch.float32")
            others.script(on_this_machine + "\nassert image.size == (64, 64) or image.size == (32, 32)")
        for repository in hub.repositories:
            for path, content in hub.files(repository.id, repository.type).items():
                assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", path), path
                assert not [told for told in (str(tmp_path), "hf_user") if told.encode() in content], path
