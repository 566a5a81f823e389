# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""`trl-diffusion check-dataset` accepts a dataset if and only if the trainer takes it, whichever trainer it is."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_from_disk

from tests import tiny
from trl_diffusion import (
    AttributeSFTConfig,
    AttributeSFTTrainer,
    ComplexPOConfig,
    ComplexPOTrainer,
    DDSPOConfig,
    DDSPOTrainer,
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    InstanceDPOConfig,
    InstanceDPOTrainer,
)
from trl_diffusion.cli.main import main
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer


INSTANCE = {
    "label": "cat",
    "chosen_box": [2.0, 4.0, 16.0, 20.0],
    "rejected_box": [4.0, 2.0, 20.0, 16.0],
    "preference": "rejected",
}
ATTRIBUTES = {"positive_attributes": ["hue"], "negative_attributes": ["kind"]}
PAIR = ("chosen", "rejected", "instances")
SINGLE = ("image", "label", *ATTRIBUTES)
BROKEN = {"bytes": b"not an image at all", "path": None}
FEATURES = Features(
    {
        "id": Value("string"),
        "prompt": Value("string"),
        **{name: Image() for name in ("image", "chosen", "rejected")},
        "label": Value("int64"),
        "positive_attributes": List(Value("string")),
        "negative_attributes": List(Value("string")),
        "instances": List(
            {
                "label": Value("string"),
                "chosen_box": List(Value("float32"), length=4),
                "rejected_box": List(Value("float32"), length=4),
                "preference": Value("string"),
            }
        ),
    }
)


def rows(features: Features = FEATURES, without: tuple[str, ...] = (), **changes) -> Dataset:
    """Two rows with the columns of every trainer; the changes are of the second."""
    images = [
        {name: tiny.image(3 * row + place) for place, name in enumerate(("image", "chosen", "rejected"))}
        for row in (0, 1)
    ]
    both = [
        {"id": f"r{row}", "prompt": "a cat", **images[row], "label": row, **ATTRIBUTES, "instances": [INSTANCE]}
        for row in (0, 1)
    ]
    both[1] |= changes
    return Dataset.from_list(both, features=features).remove_columns(list(without))


LABELS = ClassLabel(names=["hue", "kind", "pet"])
OTHERS = ClassLabel(names=["kind", "hue", "pet"])  # the same names in the order of another tree
DATASETS = {
    "sound": rows,
    "labels of the tree": lambda: rows(
        Features(FEATURES | {"positive_attributes": List(LABELS), "negative_attributes": List(LABELS)})
    ),
    "labels of another tree": lambda: rows(
        Features(FEATURES | {"positive_attributes": List(OTHERS), "negative_attributes": List(OTHERS)})
    ),
    "images alone": lambda: rows(without=(*PAIR, "label", *ATTRIBUTES)),
    "pairs alone": lambda: rows(without=SINGLE),
    "without the label": lambda: rows(without=("label",)),
    "without an image": lambda: rows(without=("image",)),
    "without a prompt": lambda: rows(prompt=None),
    "an empty prompt": lambda: rows(prompt=""),
    "an id that is null": lambda: rows(id=None),
    "a broken image": lambda: rows(image=BROKEN),
    "a broken rejected image": lambda: rows(rejected=BROKEN),
    "a broken image in another column": lambda: rows().add_column("more", [[], [BROKEN]], feature=List(Image())),
    "a box outside": lambda: rows(instances=[INSTANCE | {"chosen_box": [0.0, 0.0, 99.0, 5.0]}]),
    "another preference": lambda: rows(instances=[INSTANCE | {"preference": "better"}]),
    "no attributes in a row": lambda: rows(positive_attributes=[], negative_attributes=[]),
    "an unknown attribute": lambda: rows(positive_attributes=["hues"]),
    "an attribute of both kinds": lambda: rows(positive_attributes=["hue"], negative_attributes=["hue"]),
    "a label of 2": lambda: rows(label=2),
    "a label that is null": lambda: rows(label=None),
    "labels as text": lambda: rows(Features(FEATURES | {"label": Value("string")}), label="good"),
    "one label": lambda: rows(label=0),
}  # fmt: skip
# By the flags of the check: the trainer, its configuration and its settings
TRAINERS = {
    "instance-dpo": (InstanceDPOTrainer, InstanceDPOConfig, {}),
    "ddspo": (DDSPOTrainer, DDSPOConfig, {}),
    "diffusion-kto": (DiffusionKTOTrainer, DiffusionKTOConfig, {}),
    "attribute-sft": (AttributeSFTTrainer, AttributeSFTConfig, {}),
    "complex-po --target_prompts attributes": (ComplexPOTrainer, ComplexPOConfig, {"target_prompts": "attributes"}),
    "complex-po --target_prompts degraded": (ComplexPOTrainer, ComplexPOConfig, {"target_prompts": "degraded"}),
}
# What is no fault for a trainer that does not read that column, or does not mind
TAKEN = {
    "instance-dpo": {"pairs alone", "without an image", "a broken image"},
    "ddspo": {"pairs alone", "without an image", "a broken image"},
    "diffusion-kto": {"one label", "a broken rejected image"},
    "attribute-sft": {"no attributes in a row", "a broken rejected image"},
    "complex-po --target_prompts attributes": {"a broken rejected image"},
    "complex-po --target_prompts degraded": {
        "images alone",
        "a broken rejected image",
        "labels of another tree",
        "no attributes in a row",
        "labels as text",
    },
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The folder of every dataset, and the tiny tree."""
    folder = tmp_path_factory.mktemp("datasets")
    (folder / "tiny.yaml").write_text(tiny.CRITERIA)
    for name, make in DATASETS.items():
        make().save_to_disk(str(folder / name))
    return folder


def takes(trainer: DiffusionTrainer, dataset: Dataset) -> bool:
    """Whether an evaluation reads every row."""
    try:
        trainer.evaluate(dataset)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("flags", TRAINERS)
def test_it_accepts_what_the_trainer_takes_and_nothing_else(flags, stored, tmp_path, capfd):
    """For each trainer and every dataset, sound or with one fault: exit status 0 where an evaluation reads all rows, else 1."""
    trainer_class, config_class, settings = TRAINERS[flags]
    if config_class in (AttributeSFTConfig, ComplexPOConfig):
        settings = settings | {"criteria": str(stored / "tiny.yaml")}
    args = config_class(str(tmp_path), **tiny.FAST, **settings)
    trainer = trainer_class(tiny.sd_pipeline(), args=args, train_dataset=rows(), peft_config=tiny.lora())
    accepted, taken = set(), set()
    for name in DATASETS:
        command = ["check-dataset", "--dataset_name", str(stored / name), "--criteria", str(stored / "tiny.yaml")]
        status = main([*command, "--resolution", "32", "--trainer", *flags.split()])
        assert status in (0, 1), name
        accepted |= {name} if status == 0 else set()
        taken |= {name} if takes(trainer, load_from_disk(str(stored / name))) else set()
    assert accepted == taken
    assert {"sound", "an empty prompt", "a broken image in another column"} | TAKEN[flags] <= taken
    assert taken.isdisjoint({"without a prompt", "an id that is null"})


def test_pairs_are_no_labelled_images(stored, tmp_path, capsys):
    """The check says what the trainer says: how pairs become labelled images."""
    assert main(["check-dataset", "--dataset_name", str(stored / "pairs alone"), "--trainer", "diffusion-kto"]) == 1
    assert "`trl_diffusion.unpair_pairs` makes the columns" in capsys.readouterr().out


def test_without_attributes_nothing_is_said_of_instances_or_attributes(stored, tmp_path):
    """With degraded prompts, the report holds what is read: rows, images and prompts."""
    output = tmp_path / "report.json"
    flags = ["--trainer", "complex-po", "--target_prompts", "degraded", "--output", str(output)]
    assert main(["check-dataset", "--dataset_name", str(stored / "a box outside"), *flags]) == 0
    assert json.loads(output.read_text())["holds"].keys() == {"rows", "images", "prompts", "duplicates"}


def test_target_prompts_are_of_complex_po(stored, capsys):
    """Exit status 2 where another trainer is named."""
    flags = ["--trainer", "ddspo", "--target_prompts", "degraded"]
    assert main(["check-dataset", "--dataset_name", str(stored / "sound"), *flags]) == 2
    assert "`--target_prompts` is of `--trainer complex-po`, not of ddspo" in capsys.readouterr().err
