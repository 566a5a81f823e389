# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from tests import tiny
from tests.cli.processes import run_distributed
from trl_diffusion.evaluation.generate import generate
from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.evaluation.prompts import load_prompts
from trl_diffusion.evaluation.protocols import Protocol


PROTOCOL = Protocol(num_inference_steps=2, guidance_scale=3.0, images_per_prompt=2)
# What each process draws and returns goes to a file of its own
SCRIPT = """
import os
import sys
from pathlib import Path
from trl_diffusion.evaluation import generate as module
from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.evaluation.prompts import load_prompts
from trl_diffusion.evaluation.protocols import Protocol

root = Path(sys.argv[1])
drawn, sample_images = [], module.sample_images

def spy(*args, **settings):
    drawn.extend(settings["keys"])
    return sample_images(*args, **settings)

module.sample_images = spy
rows = module.generate(
    resolve_model("m", str(root / "model")),
    load_prompts(root / "prompts.txt"),
    Protocol(num_inference_steps=2, guidance_scale=3.0, images_per_prompt=2),
    root / "two",
    batch_size=1,
    use_cpu=True,
)
lines = [" ".join(drawn), " ".join(row.path.name for row in rows if row.path.exists())]
(root / f"process-{os.environ['RANK']}").write_text("\\n".join(lines))
"""


def test_two_processes_draw_what_one_does(tmp_path):
    """
    Two processes deal out what is missing, none draws what the other does or what is there, each returns all images when all
    are there, and the files are those of one process.
    """
    tiny.sd_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na cat\n")
    spec, prompts = resolve_model("m", str(tmp_path / "model")), load_prompts(tmp_path / "prompts.txt")
    rows = generate(spec, prompts, PROTOCOL, tmp_path / "one", batch_size=1, use_cpu=True, disable_tqdm=True)
    generate(spec, prompts.select(1), PROTOCOL, tmp_path / "two", batch_size=1, use_cpu=True, disable_tqdm=True)

    (tmp_path / "script.py").write_text(SCRIPT)
    results = run_distributed([tmp_path / "script.py", tmp_path])
    assert all(result.returncode == 0 for result in results), "".join(result.stderr for result in results)
    ends = [(tmp_path / f"process-{rank}").read_text().split("\n") for rank in (0, 1)]
    assert [drawn.split() for drawn, _ in ends] == [["00001/0", "00002/0"], ["00001/1", "00002/1"]]
    assert {returned for _, returned in ends} == {" ".join(row.path.name for row in rows)}
    files = [{path.name: path.read_bytes() for path in (tmp_path / run).rglob("*.png")} for run in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == 6
    assert [result.stderr.count("Sampling with m:   0%") for result in results] == [1, 0]  # one bar
