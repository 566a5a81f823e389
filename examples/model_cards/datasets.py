# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The cards of datasets: of the two reference recipes, and of two small ones that the quickstart's oracle annotates."""

import shutil
import tempfile
from pathlib import Path

from datasets_builders.common import main, make_parser, planned_card
from datasets_builders.painting_attributes import PaintingAttributes
from datasets_builders.pickapic_instance import PickapicInstance
from trl_diffusion.annotation.records import prepare_rows
from trl_diffusion.annotation.run import run, run_locally
from trl_diffusion.cards.facts import PICTURES
from trl_diffusion.quickstart.cpo import CRITERIA

from .tiny import EXPERIMENTS, SEED


NUM_ROWS = 256
REFERENCE = {
    "pickapic-instance": (PickapicInstance, {"source": "user/pick-a-pic-v2"}),
    "painting-attributes": (PaintingAttributes, {"source": "user/paintings"}),
}
TINY = {
    "quickstart-scenes": ("scenes", PickapicInstance, None),
    "quickstart-paintings": ("paintings", PaintingAttributes, CRITERIA),
}


def reference_card(name: str) -> str:
    """The card of a dataset that nobody has built yet."""
    builder_class, options = REFERENCE[name]
    return str(planned_card(builder_class, f"user/{name}", **options))


def make(output_dir: Path) -> None:
    """Annotates and builds the small datasets, and keeps their cards with the pictures."""
    for name, (world, builder_class, criteria) in TINY.items():
        with tempfile.TemporaryDirectory() as scratch:
            source, built = Path(scratch) / f"unlabelled-{world}", Path(scratch) / name
            source.mkdir()
            unlabelled = EXPERIMENTS[world].unlabelled_rows(NUM_ROWS, SEED)
            unlabelled.to_parquet(source / "train.parquet")
            rows, columns = prepare_rows(unlabelled, EXPERIMENTS[world].find_columns)
            task = EXPERIMENTS[world].annotation_task({"name": str(source), "split": "train"}, columns)
            finished = run(rows, task, Path(scratch) / "annotations", run_locally, disable_tqdm=True)
            flags = [
                "--dataset_name",
                str(source),
                "--annotations_dir",
                str(finished.folder),
                "--output_dir",
                str(built),
            ]
            parser = make_parser(builder_class.__module__.rpartition(".")[2], builder_class.DEFAULT_CONFIG_NAME)
            main(builder_class, parser.parse_args(flags), criteria)
            shutil.rmtree(output_dir / name, ignore_errors=True)
            (output_dir / name).mkdir(parents=True)
            shutil.copy(built / "README.md", output_dir / name)
            shutil.copytree(built / PICTURES, output_dir / name / PICTURES, ignore=shutil.ignore_patterns("*.parquet"))
