# Copyright 2026 The trl_diffusion authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import tiny


ROOT = Path(__file__).parents[2]


def test_two_processes_equal_one(tmp_path):
    """Two processes with a batch of 2 each train what one with a batch of 4 does, and log the same metrics."""
    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    tiny.pairs().to_parquet(tmp_path / "data" / "train.parquet")
    ends, logs = [], []
    for processes in (1, 2):
        output_dir = tmp_path / f"processes-{processes}"
        launcher = [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            f"--master_port={29511 + processes}",
        ]
        subprocess.run(
            [sys.executable, *launcher, "-m", "trl_diffusion.scripts.instance_dpo"]
            + ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data"]
            + ["--output_dir", output_dir, "--use_peft", "--lora_r", "4", "--max_steps", "3", "--logging_steps", "1"]
            + ["--optim", "sgd", "--learning_rate", "1", "--max_grad_norm", "0", "--beta", "20"]
            + ["--per_device_train_batch_size", str(4 // processes), "--gradient_accumulation_steps", "2"]
            + [
                "--report_to",
                "none",
                "--use_cpu",
                "True",
                "--disable_tqdm",
                "True",
                "--activation_checkpointing",
                "False",
            ],
            check=True,
            capture_output=True,
            cwd=ROOT,
        )
        ends.append(load_file(output_dir / "pytorch_lora_weights.safetensors"))
        state = json.loads((output_dir / "checkpoint-3" / "trainer_state.json").read_text())
        logs.append(state["log_history"])
    assert max((ends[0][name] - ends[1][name]).abs().max() for name in ends[0]) <= 1e-5
    assert max(value.abs().max() for name, value in ends[0].items() if "lora_B" in name or "lora.up" in name) > 1e-3
    for one, two in zip(*logs, strict=True):
        for name in ("loss", "rewards/margins", "errors/chosen"):
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5)
