# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The demo of the annotation writes the pages of both commands from the worlds of the quickstart."""

import re
import runpy
import sys
from pathlib import Path

from trl_diffusion.cli.main import main
from trl_diffusion.quickstart.paintings import ATTRIBUTES, painting_dataset
from trl_diffusion.quickstart.world import preference_dataset


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "scripts" / "annotation_demo.py"


def test_the_demo(tmp_path, monkeypatch, capsys):
    """Its verdicts and attributes are those of the worlds that it draws, and the file that it cuts off is the one error."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(tmp_path), "--num_rows", "7", "--seed", "3"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trl-diffusion")]
    assert [line.split()[1] for line in commands] == ["annotate-instances", "annotate-attributes"]

    page = (tmp_path / "instances" / "preview.html").read_text(encoding="utf-8")
    assert re.findall(r'<span class="status (\w+)">', page) == ["ok"] * 5 + ["error"]
    assert "chosen: the image is broken: image file is truncated" in page
    pairs = preference_dataset(7, seed=3)
    expected = [instance["preference"] for row in list(pairs)[:5] for instance in row["instances"]]
    names = pairs.features["instances"].feature["preference"].names
    assert re.findall(r"<b>better in (\w+)</b>", page) == [names[preference] for preference in expected]

    page = (tmp_path / "attributes" / "preview.html").read_text(encoding="utf-8")
    for row, article in zip(list(painting_dataset(7, seed=3))[:6], page.split("<article>")[1:], strict=True):
        shown = re.findall(r'<span class="chip (\w+)">(\w+)</span>', article)
        positive, negative = row["positive_attributes"], row["negative_attributes"]
        forms = {("positive", ATTRIBUTES[attribute][0]) for attribute in positive}
        assert set(shown) == forms | {("negative", ATTRIBUTES[attribute][1]) for attribute in negative}

    # What the check says of the file that is cut off is what the page "From pairs to an aligned model" quotes
    assert main(["check-dataset", "--dataset_name", str(tmp_path / "my_pairs")]) == 1
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    page = (ROOT / "docs" / "source" / "from_pairs_to_a_model.md").read_text(encoding="utf-8")
    assert said in " ".join(page.split())
