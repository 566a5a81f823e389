# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""`trl-diffusion check-dataset`: what it accepts trains, what it refuses would fail, and it counts by hand."""

import io
import json

import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage

from tests import tiny
from trl_diffusion import attribute_features
from trl_diffusion.cli.main import main
from trl_diffusion.criteria import parse_criteria
from trl_diffusion.data.check import as_text, check_dataset
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.formats import prepare_dataset


PAIR = ("prompt", "chosen", "rejected")
CRITERIA = parse_criteria(tiny.CRITERIA, "tiny.yaml")  # hue, kind, pet
IMAGE = ("prompt", "image", "positive_attributes", "negative_attributes")


def png(image: PILImage.Image, **settings) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **settings)
    return {"bytes": buffer.getvalue(), "path": None}


def instance(**changes) -> dict:
    boxes = {"chosen_box": [2.0, 4.0, 16.0, 20.0], "rejected_box": [4.0, 2.0, 20.0, 16.0]}
    return {"label": "cat", "preference": "rejected"} | boxes | changes


def row(number: int, **changes) -> dict:
    images = {"chosen": png(tiny.image(2 * number)), "rejected": png(tiny.image(2 * number + 1))}  # 40 x 32
    return {"id": f"r{number}", "prompt": f"a cat {number}", **images, "instances": [instance()]} | changes


BROKEN = {"bytes": b"not an image at all", "path": None}
BAD = [
    row(0),
    row(1, prompt=None, chosen=BROKEN),
    row(2, instances=[instance(chosen_box=[0.0, 0.0, 99.0, 5.0]), instance(preference="better")]),
    row(3, rejected={"bytes": row(3)["rejected"]["bytes"][:-600], "path": None}),
    row(4, id=None),
    row(5, chosen={"bytes": b"another that is none", "path": None}),
    row(6, id="r0"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_all_that_is_wrong_is_said_at_once(stream):
    """Nine faults in seven rows: each with its row, id and column, and none of the sound rows among them."""
    dataset = Dataset.from_list(BAD)
    report = check_dataset(dataset.to_iterable_dataset() if stream else dataset, PAIR, PAIR[1:], 32)
    found = {(fault["row"], fault["id"], fault["column"]) for fault in report["faults"]}
    assert found == {
        (1, "r1", "prompt"),
        (1, "r1", "chosen"),
        (2, "r2", "instances"),
        (3, "r3", "rejected"),
        (4, None, "id"),
        (5, "r5", "chosen"),
    }
    assert report["holds"]["duplicates"]["id"] == 1  # r0
    assert len(report["faults"]) == 7, "two of the instances of r2"
    unreadable = [reason for reason in report["reasons"] if reason["column"] == "chosen"]
    assert [(reason["count"], reason["rows"]) for reason in unreadable] == [(2, [1, 5])]
    text = "\n".join(as_text(report))
    assert "WRONG, 2 x chosen (rows 1, 5): The image in column `chosen` of the row with id 'r1' cannot be read" in text
    assert "5 of 7 rows would stop a training." in text


def test_what_it_accepts_trains_and_what_it_refuses_does_not():
    """Row by row, a fault is what the collator raises, word for word; sound rows are collated."""
    rows = [line for line in BAD if line["id"] is not None]
    dataset = prepare_dataset(Dataset.from_list(rows), "d", PAIR, PAIR[1:], [])
    faults = check_dataset(dataset, PAIR, PAIR[1:], 32)["faults"]
    for index, line in enumerate(dataset):
        messages = [fault["message"] for fault in faults if fault["row"] == index]
        if messages:
            with pytest.raises(ValueError) as error:
                InstancePairCollator(32)([line])
            assert str(error.value) in messages
        else:
            InstancePairCollator(32)([line])


def test_what_it_holds():
    """Counted by hand: sizes, transparency, orientation, prompts, instances, and three kinds of duplicates."""
    turned = PILImage.Exif()
    turned[0x0112] = 6
    clear = png(PILImage.new("RGBA", (20, 64), (255, 0, 0, 0)))
    rows = [
        row(0),
        row(1, instances=[], prompt=" "),
        row(
            2,
            chosen=clear,
            instances=[instance(), instance(label="dog", preference="tie"), instance(preference="chosen")],
        ),
        row(3, rejected=png(tiny.image(9), exif=turned), instances=[]),
        row(4) | {"chosen": row(4)["rejected"]},
        row(0) | {"id": "again"},
    ]
    report = check_dataset(Dataset.from_list(rows), PAIR, PAIR[1:], 32, fits=lambda prompt: len(prompt) < 7)
    assert report["faults"] == []
    held = report["holds"]
    assert held["rows"] == 6
    assert held["images"]["chosen"] == {
        **{"images": 6, "smaller": 1, "transparent": 1, "turned": 0, "animated": 0},
        **{"width": [20, 40, 40], "height": [32, 32, 64]},
    }
    assert held["images"]["rejected"]["turned"] == 1 and held["images"]["rejected"]["width"] == [32, 40, 40]
    assert held["prompts"] == {"empty": 1, "longer than the text encoders read": 5}
    assert held["instances"] == {
        **{"instances": 6, "rows without": 2, "conflicts": round(4 / 6, 4), "ties": round(1 / 6, 4)},
        **{"preferences": {"rejected": 4, "tie": 1, "chosen": 1}, "labels": {"cat": 5, "dog": 1}},
    }
    assert held["duplicates"] == {"id": 0, "prompt and images": 1, "chosen is rejected": 1}
    assert list(as_text(report))[-1] == "Nothing is wrong."
    json.dumps(report)


@pytest.mark.parametrize("needs", [False, True])
def test_attributes(needs):
    """Attributes are counted by dimension; a row without any is a fault for `complex-po` alone."""
    line = {"prompt": "a", "image": png(tiny.image(0))}
    rows = [
        {"id": "a", **line, "positive_attributes": ["hue", "kind"], "negative_attributes": ["pet"]},
        {"id": "b", **line, "positive_attributes": [], "negative_attributes": []},
        {"id": "c", **line, "positive_attributes": ["hues"], "negative_attributes": []},
        {"id": "d", **line, "positive_attributes": ["hue"], "negative_attributes": ["hue"]},
    ]
    dataset = Dataset.from_list(rows, features=attribute_features())
    report = check_dataset(dataset, IMAGE, ("image",), 32, CRITERIA, needs)
    assert [fault["id"] for fault in report["faults"]] == (["b"] if needs else []) + ["c", "d"]
    forms = report["holds"]["attributes"]["dimensions"]
    assert sum(counts.get("positive", 0) for counts in forms.values()) == 2
    assert sum(counts.get("negative", 0) for counts in forms.values()) == 1
    assert report["holds"]["attributes"]["rows without"] == 1
    assert report["holds"]["duplicates"] == {"id": 0, "prompt and images": 3}


def test_columns_that_are_missing_or_mistyped():
    """A missing column is said, and the others are read all the same; a type is said once, and not for each row again."""
    report = check_dataset(Dataset.from_list(BAD).remove_columns("prompt"), PAIR, PAIR[1:], 32)
    assert "lacks the column `prompt`" in report["faults"][0]["message"]
    assert {"chosen", "rejected", "instances", "id"} == {fault["column"] for fault in report["faults"]} - {"dataset"}
    bare = [row(number, instances=[instance(preference=1)]) for number in range(3)]
    faults = check_dataset(Dataset.from_list(bare), PAIR, PAIR[1:], 32)["faults"]
    assert [fault["column"] for fault in faults] == ["instances.preference"]
    assert check_dataset(Dataset.from_list([]), PAIR, PAIR[1:], 32)["faults"][0]["message"].startswith("`dataset`")
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    assert len(check_dataset(stream, PAIR, PAIR[1:], 32)["faults"]) > 0


class TestCommand:
    def save(self, rows: list[dict], folder) -> str:
        features = Dataset.from_list(rows).features
        dataset = Dataset.from_list(rows, features=Features(features | {"chosen": Image(), "rejected": Image()}))
        dataset.save_to_disk(str(folder / "pairs"))
        return str(folder / "pairs")

    def test_clean(self, tmp_path, capsys):
        """Exit status 0, and the kind is seen from the columns; the tokenizers alone tell which prompts are cut."""
        tiny.sd_pipeline().tokenizer.save_pretrained(tmp_path / "model" / "tokenizer")
        index = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}
        (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
        rows = [row(0, prompt="a cat"), row(1, prompt="a cat " * 20)]
        flags = ["--dataset_name", self.save(rows, tmp_path), "--model_name_or_path", str(tmp_path / "model")]
        assert main(["check-dataset", *flags]) == 0
        out = capsys.readouterr().out
        assert "longer than the text encoders read 1" in out and "Nothing is wrong." in out

    def test_wrong(self, tmp_path, capsys):
        """Exit status 1, and the JSON has every fault."""
        output = tmp_path / "reports" / "report.json"
        assert main(["check-dataset", "--dataset_name", self.save(BAD, tmp_path), "--output", str(output)]) == 1
        assert len(json.loads(output.read_text())["faults"]) == 7
        assert "5 of 7 rows would stop a training." in capsys.readouterr().out

    def test_misuse(self, tmp_path, capsys):
        """Exit status 2, with one line, where the trainer is not clear or a setting is impossible."""
        Dataset.from_dict({"prompt": ["a"]}, features=Features({"prompt": Value("string")})).save_to_disk(
            str(tmp_path / "d")
        )
        assert main(["check-dataset", "--dataset_name", str(tmp_path / "d")]) == 2
        assert "`--trainer` is missing: the columns prompt do not tell" in capsys.readouterr().err
        assert main(["check-dataset", "--dataset_name", str(tmp_path / "d"), "--resolution", "0"]) == 2
