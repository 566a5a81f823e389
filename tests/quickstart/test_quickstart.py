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

import pytest
import torch
from PIL import Image

from trl_diffusion.scripts.quickstart import ARMS, QuickstartArguments, load_base, main, run_arm


@pytest.fixture(autouse=True)
def threads():
    """The quickstart sets the number of threads of its own processes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small(output_dir, **changes) -> QuickstartArguments:
    return QuickstartArguments(str(output_dir), **{"num_pairs": 64, "max_steps": 2, "num_samples": 16, **changes})


def test_it_writes_results_pictures_and_a_report(tmp_path):
    """Every model has its shares of all the images; the picture holds a column a model; the report names the figures."""
    main(small(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results)[:4] == ["base", *ARMS] == ["base", "dpo", "iapo", "iapo_covering"]
    for name in ("base", *ARMS):
        assert set(results[name]) == {"clean_a", "clean_b", "match_a", "match_b", "n"}
        assert results[name]["n"] == 16
        assert all(0 <= results[name][key] <= 1 for key in results[name] if key != "n")
    assert (
        results["seed"] == 0 and results["seconds"] > 0 and {"trl", "diffusers", "torch"} <= set(results["versions"])
    )
    assert Image.open(tmp_path / "samples.png").width == 8 + 4 * (160 + 8)
    report = (tmp_path / "report.md").read_text()
    assert f"| IAPO | {results['iapo']['clean_a']:.3f} | {results['iapo']['clean_b']:.3f} |" in report


def test_it_repeats_itself_and_every_arm_trains(tmp_path):
    """The same seed draws the same images, bit for bit; another arm or another seed draws others."""
    images = {}
    for key, name, seed in (("once", "iapo", 0), ("twice", "iapo", 0), ("dpo", "dpo", 0), ("seed", "iapo", 1)):
        images[key] = [image.tobytes() for image in run_arm(name, small(tmp_path, seed=seed))[1]]
    assert images["once"] == images["twice"]
    assert images["once"] != images["dpo"] and images["once"] != images["seed"]


def test_training_leaves_the_shipped_pipeline_alone(tmp_path):
    """What comes with the package is read and never written."""
    before = load_base().unet.state_dict()
    run_arm("dpo", small(tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in load_base().unet.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 5, 6])
def test_instances_help(tmp_path, seed):
    """
    On every seed: IAPO draws B clean more often than Diffusion-DPO and A as often, the covering masks more often still, and
    the images still show what the prompt names.
    """
    main(QuickstartArguments(str(tmp_path), seed=seed))
    results = json.loads((tmp_path / "results.json").read_text())
    base, dpo, iapo, covering = (results[name] for name in ("base", *ARMS))
    assert iapo["clean_b"] - dpo["clean_b"] >= 0.04
    assert iapo["clean_a"] >= dpo["clean_a"] - 0.02
    assert iapo["match_a"] >= base["match_a"] - 0.03
    assert covering["clean_b"] >= iapo["clean_b"] + 0.04
    assert base["match_b"] >= 0.75
