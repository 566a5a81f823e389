# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
from datasets import Dataset, Features, Image, Value

from tests.data import layouts
from tests.data.layouts import png
from trl_diffusion.data.presets import PAIR, SINGLE, read_label, recognise, training_columns
from trl_diffusion.scripts.instance_dpo import make_parser


PICK_A_PIC = ["caption", "jpg_0", "jpg_1", "label_0", "ranking_id"]


@pytest.mark.parametrize(
    ("present", "names", "read_as", "columns"),
    [
        (PICK_A_PIC, PAIR, "Read as Pick-a-Pic", {"prompt": "caption", "image_1": "jpg_1", "id": "ranking_id"}),
        (["prompt", "path1", "path2"], PAIR, "Read as HPDv3", {"chosen": "path1", "rejected": "path2"}),
        (["caption.txt", "W.png", "l.JPG"], PAIR, "Read `caption.txt` as `prompt`, `W.png`", {"rejected": "l.JPG"}),
        (["png", "txt", "json"], SINGLE, "Read `txt` as `prompt`, `png` as `image`", {"image": "png"}),
        (["image", "txt"], SINGLE, "Read `txt` as `prompt`", {"image": "image"}),
    ],
)
def test_what_is_recognised(present, names, read_as, columns):
    """The sentence says what is read, and each of our names has its column."""
    sentence, found = recognise(present, names)
    assert sentence.startswith(read_as) and columns.items() <= found.items()


@pytest.mark.parametrize("present", [["text", "winner", "loser"], ["caption", "image"], ["prompt", "w", "l"], []])
def test_names_that_may_mean_anything_are_not_recognised(present):
    """Columns of tables are recognised as those of a public dataset alone."""
    assert recognise(present, PAIR) is None and recognise(present, SINGLE) is None


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ([*PICK_A_PIC, "prompt", "path1", "path2"], "several ways: Read as Pick-a-Pic; Read as HPDv3. Name"),
        (
            ["caption.txt", "text.txt", "w.png", "l.png"],
            "`prompt` may be any of the columns `caption.txt`, `text.txt`",
        ),
        (["txt", "w.png", "chosen.png", "l.png"], "`chosen` may be any of the columns `w.png`, `chosen.png`"),
    ],
)
def test_ambiguous_columns_are_refused(present, message):
    """Nothing is guessed: the message names the candidates and the flag."""
    with pytest.raises(ValueError, match=message):
        recognise(present, PAIR)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (1, 1),
        (0.0, 0),
        (0.5, 0.5),
        ("1.0", 1),
        (b"0", 0),
        (True, 1),
        (None, None),
        ("tie", None),
        (2, None),
        ("nan", None),
    ],
)
def test_labels(value, label):
    """Numbers, texts and bytes; whatever else there is is no label."""
    assert read_label(value) == label


@pytest.mark.parametrize("kind", [Dataset.with_format, Dataset.to_iterable_dataset])
@pytest.mark.parametrize("feature", [Value("binary"), Image()])
def test_labels_turn_images(kind, feature):
    """Rows keep their order and their ids, and columns their types; ties and what has no label are left out."""
    labels = [0, 1, 0.5, 0, None, 1]
    rows = [
        {"caption": f"p{n}", "jpg_0": png(n), "jpg_1": png(100 + n), "label_0": label, "ranking_id": n}
        for n, label in enumerate(labels)
    ]
    types = {"caption": Value("string"), "jpg_0": feature, "jpg_1": feature}
    types |= {"label_0": Value("float64"), "ranking_id": Value("int64")}
    turned = training_columns(kind(Dataset.from_list(rows, features=Features(types))))
    assert turned.features["chosen"] == turned.features["rejected"] == feature
    assert turned.features["id"] == Value("int64")
    if feature == Image():
        turned = turned.cast_column("chosen", Image(decode=False)).cast_column("rejected", Image(decode=False))
        turned = [row | {name: row[name]["bytes"] for name in ("chosen", "rejected")} for row in turned]
    found = [(row["id"], row["prompt"], row["chosen"], row["rejected"]) for row in turned]
    assert found == [
        (0, "p0", png(100), png(0)),
        (1, "p1", png(1), png(101)),
        (3, "p3", png(103), png(3)),
        (5, "p5", png(5), png(105)),
    ]


def test_turning_copies_no_image(tmp_path):
    """The rows are those of the files that the dataset was read from."""
    layouts.pick_a_pic(tmp_path)
    dataset = Dataset.from_parquet(str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    assert training_columns(dataset).cache_files[0] in dataset.cache_files


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"caption": "a", "label_0": 1.0, "image_0_uid": "x"}], "an edition of Pick-a-Pic without images"),
        ([dict.fromkeys(PICK_A_PIC, "x") | {"label_0": "0.5"}], "none of the 1 pairs has a label"),
        ([{"prompt": "a", "path1": "images/a.png", "path2": "images/b.png"}], "images of HPDv3 are in archives"),
    ],
)
def test_public_datasets_that_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        training_columns(Dataset.from_list(rows))


def test_the_trainers_columns_are_left_alone():
    """Their names need no recognition, whatever other columns there are."""
    row = {"prompt": "a", "chosen": png(0), "rejected": png(1), "path1": "a.png", "path2": "b.png"}
    dataset = Dataset.from_list([row])
    assert training_columns(dataset) is dataset


def test_columns_of_a_yaml_file(tmp_path):
    """In a recipe, `columns` is a mapping; on the command line, JSON."""
    (tmp_path / "a.yaml").write_text(f"output_dir: {tmp_path}\ncolumns:\n  prompt: json.caption\n")
    of_file = make_parser().parse_args_and_config(["--config", str(tmp_path / "a.yaml")])[0]
    flags = ["--output_dir", str(tmp_path), "--columns", '{"prompt": "json.caption"}', "--dataset_revision", "v1"]
    of_flags = make_parser().parse_args_and_config(flags)[0]
    assert of_file.mapping == of_flags.mapping == {"prompt": "json.caption"}
    assert of_flags.dataset_revision == "v1"
