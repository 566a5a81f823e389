# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import ast
import io
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, List, load_dataset, load_dataset_builder
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt

from datasets_builders import common, dataset_card, example_pictures
from datasets_builders.common import card_pictures, make_card, planned_card
from datasets_builders.dataset_card import byte_size, public, size_category, spread
from datasets_builders.painting_attributes import PaintingAttributes
from datasets_builders.pickapic_instance import PickapicInstance
from datasets_builders.pickapic_instance.pickapic_instance import count_orders
from tests.datasets_builders import sources
from tests.datasets_builders.fake_hub import REPO, FakeHub
from tests.hub.card_rules import check_card
from trl_diffusion.annotation.join import load_annotations
from trl_diffusion.annotation.records import STATUSES
from trl_diffusion.annotation.vlm import shipped_prompt
from trl_diffusion.criteria import Criteria
from trl_diffusion.data.column_checks import MASKS
from trl_diffusion.data.formats import PREFERENCES
from trl_diffusion.quickstart.oracle import OracleVLM
from trl_diffusion.scripts import annotate_attributes, annotate_instances
from trl_diffusion.segmentation import encode_rle
from trl_diffusion.visualization import BOX_COLORS


HOSTILE = [
    "# a heading\n\n## another\n- a list\n1. two\n> quoted\n---",
    "a | b | c\n|---|---|\n| d |",
    "<script>alert(1)</script><img src=x onerror=alert(1)><!-- <details>",
    "</details></summary></table>",
    "[a link](https://evil.example) ![p](https://evil.example/p.png) <https://evil.example> www.evil.example a@evil.example",
    "```\n# out of the block\n````\n`code` ``` ~~~\n~~~",
    "{{ name }} {% for x in y %} {{ 7 * 7 }} {# #}",
    '"quoted": {yaml: [1, &a *a]}\n---\nlicense: mit\n...\n',
    "\\ \\| \\` *bold* __bold__ ~~gone~~ $x$ $$y$$ :smile: @user [^1] [x]: y",
    "\u202eevil\u202c \u200b \x00 \x1b[31m 雪🦅 \ud800",
    " ",
    "W" * 3000,
]


class FirstVLM(OracleVLM):
    """As a judge it prefers what it is shown first, and says so among other text."""

    def generate(self, requests):
        texts = super().generate(requests)
        is_verdict = [request.text.startswith("The two images show the same thing") for request in requests]
        return ['I see.\n```json\n{"better": "A"}\n```' if first else text for first, text in zip(is_verdict, texts)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Pairs in the columns of Pick-a-Pic, annotated and built: `source`, `annotations`, `out`."""
    folder = tmp_path_factory.mktemp("pairs")
    sources.save(folder / "source", train=sources.pick_a_pic(12))
    sources.annotate_pairs(
        sources.pick_a_pic(12),
        folder / "annotations",
        tie_policy="keep",
        vlm=sources.StumblingVLM(),
        name="user/pickapic",
    )
    sources.build_pairs(folder / "source", folder / "annotations", folder / "out")
    return folder


@pytest.fixture(scope="module")
def paintings(tmp_path_factory) -> Path:
    """Paintings, annotated and built."""
    folder = tmp_path_factory.mktemp("paintings")
    sources.save(folder / "source", train=sources.paintings(16))
    sources.annotate_paintings(sources.paintings(16), folder / "annotations")
    sources.build_paintings(folder / "source", folder / "annotations", folder / "out")
    return folder


def builder_of(folder: Path, tmp_path: Path, **options) -> common.AnnotatedDatasetBuilder:
    builder_class = PickapicInstance if folder.name.startswith("pairs") else PaintingAttributes
    options = {"criteria": sources.CRITERIA, **options}
    return builder_class(
        config_name="annotations",
        cache_dir=str(tmp_path / "cache"),
        annotations_dir=str(folder / "annotations"),
        source=str(folder / "source"),
        **options,
    )


def described_by(builder: common.AnnotatedDatasetBuilder) -> dict:
    return builder.describe(builder.annotations())


def infos_of(folder: Path) -> dict:
    """The configurations of a built folder."""
    names = [path.name for path in folder.iterdir() if any(path.glob("*.parquet"))]
    builders = {
        name: load_dataset_builder(str(folder), name) for name in sorted(names, key=lambda name: name == "annotations")
    }
    return {name: builder.info for name, builder in builders.items()}


@pytest.fixture(scope="module")
def known(pairs, paintings, tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    """What the builders say of both datasets, and their configurations."""
    scratch = tmp_path_factory.mktemp("known")
    return {
        name: (described_by(builder_of(folder, scratch)), infos_of(folder / "out"))
        for name, folder in (("pairs", pairs), ("paintings", paintings))
    }


def table_after(text: str, beginning: str) -> list[list[str]]:
    """The first table after a text."""
    return sources.tables(text[text.index(beginning) :])[0]


# ----- columns -----


def leaves(features: Features, prefix: str = "") -> dict[str, object]:
    """Every column and every field of an object, in a second way: by a list of paths."""
    found = {}
    for name, feature in features.items():
        found[prefix + name] = feature
        if isinstance(feature, List) and isinstance(feature.feature, dict):
            found |= leaves(feature.feature, f"{prefix}{name}.")
    return found


def test_every_column_of_every_configuration_is_described(pairs, paintings):
    """The tables of columns have each column and field once, in order, with the type that `datasets` shows."""
    for folder in (pairs, paintings):
        text = sources.card_of(folder / "out")[1]
        for name, info in infos_of(folder / "out").items():
            lines = table_after(text, f"### `{name}`")
            expected = leaves(info.features)
            assert [line[0].strip("`") for line in lines] == list(expected)
            for _, type_name, *_, meaning in lines:
                assert type_name.strip("`") and meaning.strip()
            types = {line[0].strip("`"): line[1].strip("`") for line in lines}
            assert types["id"] == types["prompt"] == repr(expected["id"]) == "Value('string')"
    assert types["status"] == "ClassLabel(names=['ok', 'rejected', 'error'])"
    assert types["positive_attributes"] == "List(ClassLabel(names=['outline', 'chroma', 'placement', 'ground']))"
    lines = {line[0]: line[1:] for line in table_after(sources.card_of(pairs / "out")[1], "### `annotations`")}
    assert lines["`instances.chosen_box`"][:3] == ["`List(Value('float32'), length=4)`", "(4,)", "pixels"]


def test_a_column_without_a_meaning_is_an_error():
    """A column that nobody has described does not get into a card without a word."""
    with pytest.raises(KeyError, match="novelty"):
        dataset_card.describe_columns(Features({"novelty": List({"depth": {"a": List({})}})}), {})


# ----- pictures -----


def shows(picture: np.ndarray, row: dict) -> bool:
    """Whether a picture shows both images of a row, enlarged to 384 pixels, with a corner of each box in its colour."""
    scale = example_pictures.SIDE / 32
    for column, side in enumerate(("chosen", "rejected")):
        found, image = picture[32:, 8 + column * (example_pictures.SIDE + 8) :], np.array(row[side])
        if not all(
            (found[12 * y + 6, 12 * x + 6] == image[y, x]).all() for y, x in ((0, 0), (15, 1), (30, 30), (1, 15))
        ):
            return False
        for instance in row["instances"]:
            x, _, _, y = (round(number * scale) for number in instance[f"{side}_box"])
            color = BOX_COLORS[PREFERENCES[instance["preference"]]]
            if (found[y - 4 : y + 1, max(x - 2, 0) : x + 3] == color).all(
                axis=-1
            ).sum() < 4:  # boxes are no whole pixels
                return False
    return True


def test_pictures_are_beside_the_card_and_show_images_and_boxes(pairs):
    """The card links three pictures in order. In each, the boxes of both images have the colours of their preferences."""
    out = pairs / "out"
    text = sources.card_of(out)[1]
    links = re.findall(r"!\[(.*)\]\((images/.*)\)", text)
    assert [name for _, name in links] == [f"images/example-{number}.png" for number in range(3)]
    assert sorted(path.name for path in (out / "images").iterdir()) == [Path(name).name for _, name in links]
    rows, shown = list(load_dataset(str(out), split="train")), []
    for prompt, name in links:
        picture = np.array(PIL.Image.open(out / name))
        (row,) = [row for row in rows if row["prompt"] == prompt and shows(picture, row)]
        shown.append(len({instance["preference"] for instance in row["instances"]}))
    assert max(shown) == 2  # of all rows, those with a conflict and an agreement come first


def test_without_the_images_the_pictures_are_boxes_on_canvases(pairs, tmp_path):
    """A push without images has pictures in which nothing but boxes, labels and the prompt differs from an empty canvas."""
    builder = builder_of(pairs, tmp_path)
    with_images, without = (card_pictures(builder, pairs / "out", shown) for shown in (True, False))
    assert [picture.name for picture in with_images] == [picture.name for picture in without]
    assert [picture.data for picture in with_images] == [
        (pairs / "out" / picture.name).read_bytes() for picture in with_images
    ]
    known = {example_pictures.CANVAS, *BOX_COLORS.values()}
    for picture in without:
        pixels = np.array(PIL.Image.open(io.BytesIO(picture.data)))[32:416, 8:]
        colors = Counter(map(tuple, pixels.reshape(-1, 3).tolist()))
        assert {color for color, number in colors.items() if number > 500} <= known | {(255, 255, 255)}
        assert any(color in colors for color in BOX_COLORS.values())


def test_a_push_without_images_has_no_image(pairs, tmp_path, monkeypatch):
    """The pictures in the repository are the canvases, not those in the folder; the next push deletes those that it has not."""
    hub = FakeHub(tmp_path, monkeypatch)
    (hub.folder / "images").mkdir()
    for name in ("example-7.png", "mine.png"):
        (hub.folder / "images" / name).write_bytes(b"earlier")
    sources.build_pairs(pairs / "source", pairs / "annotations", tmp_path / "out", "--push_to_hub", REPO)
    assert sorted(path.name for path in (hub.folder / "images").iterdir()) == [
        *(f"example-{number}.png" for number in range(3)),
        "mine.png",
    ]
    for picture in card_pictures(builder_of(pairs, tmp_path), tmp_path / "out", with_images=False):
        assert (hub.folder / picture.name).read_bytes() == picture.data
        assert (tmp_path / "out" / picture.name).read_bytes() != picture.data
    assert "canvases of their shapes" in sources.card_of(hub.folder)[1]


@pytest.mark.parametrize("is_mask", [False, True])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_pictures_are_upright(turn, is_mask):
    """The box or the mask of a stored file covers the same spot of the picture for every EXIF orientation, on a canvas too."""
    # A red square in the lower right quarter of the upright 64 x 32 picture
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[16:, 32:] = (200, 0, 0)
    turns = {1: 0, 3: 2, 6: 1, 8: 3}  # quarter turns to the left that undo the orientation
    stored = np.rot90(upright, turns[turn])
    rows, columns = (stored[..., 0] == 200).nonzero()
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    buffer, exif = io.BytesIO(), PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = turn
    PIL.Image.fromarray(stored).save(buffer, format="PNG", exif=exif)
    image = {"bytes": buffer.getvalue(), "path": None}
    box = [float(number) for number in box]
    instance = {"label": "", "chosen_box": box, "rejected_box": box, "preference": 1}
    if is_mask:
        instance = {"label": "", "preference": 1, **dict.fromkeys(MASKS, encode_rle(stored[..., 0] == 200))}
    row = {"prompt": "p", "chosen": image, "rejected": image, "instances": [instance]}
    for with_images in (True, False):
        picture = np.array(example_pictures.pair_picture(row, with_images))
        # 384 x 192 in the middle of 384 x 384: the quarter begins at (192, 96), below 32 + 96 pixels
        orange = (picture == BOX_COLORS["rejected"]).all(axis=-1)
        assert orange[32 + 96 + 96, 8 + 200 : 8 + 383].all() and orange[32 + 96 + 100 : 32 + 96 + 191, 8 + 192].all()
        assert not orange[: 32 + 96 + 96].any() and not orange[:, 8 : 8 + 192].any()


def test_pictures_read_only_the_rows_that_they_show(pairs, tmp_path, monkeypatch):
    """Of 300 rows whose images behind the 20th are broken, three are decoded: the six images of the examples."""
    table = load_dataset(str(pairs / "out"), split="train")
    rows = [row | {"id": str(number)} for number, row in enumerate(list(sources.undecoded(table)) * 60)][:300]
    broken = {"bytes": b"broken", "path": None}
    rows = rows[:20] + [row | {"chosen": broken, "rejected": broken} for row in rows[20:]]
    (tmp_path / "pairs").mkdir()
    schema = table.features.arrow_schema
    pq.write_table(
        pa.Table.from_pylist(rows, schema), tmp_path / "pairs" / "train-00000-of-00001.parquet", row_group_size=10
    )
    decoded, StoredImage = [], example_pictures.StoredImage
    monkeypatch.setattr(example_pictures, "StoredImage", lambda data: decoded.append(data) or StoredImage(data))
    assert len(card_pictures(builder_of(pairs, tmp_path), tmp_path)) == 3
    assert len(decoded) == 6 and b"broken" not in decoded


def test_images_are_shown_with_the_forms_of_their_attributes(paintings, tmp_path):
    """Pictures of paintings show the image with text beside it, and there are none without images."""
    builder = builder_of(paintings, tmp_path)
    pictures = card_pictures(builder, paintings / "out")
    rows = {row["prompt"]: row for row in load_dataset(str(paintings / "out"), split="train")}
    assert len(pictures) == 3
    for picture in pictures:
        pixels = np.array(PIL.Image.open(io.BytesIO(picture.data)))
        image = np.array(rows[picture.caption]["image"])
        scale = example_pictures.SIDE // image.shape[0]
        assert (pixels[8 + scale // 2, 8 + scale // 2] == image[0, 0]).all()
        for color in (BOX_COLORS["chosen"], BOX_COLORS["rejected"]):  # both headings
            assert (pixels[:, example_pictures.SIDE + 20 :] == color).all(axis=-1).any()
    assert card_pictures(builder, paintings / "out", with_images=False) == []


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_can_be_drawn(text, pairs, paintings, tmp_path):
    """Prompts, labels and forms of any length and alphabet give pictures of the usual size."""
    text = text.encode("utf-8", "replace").decode()
    row = sources.rows(load_dataset(str(pairs / "out"), split="train"))[0]
    row |= {"prompt": text, "instances": [found | {"label": text} for found in row["instances"]]}
    assert example_pictures.pair_picture(row, True).size == (792, 448)
    attributes = tuple(
        replace(leaf, positive=text, negative=text) for leaf in Criteria.load(sources.CRITERIA).attributes
    )
    row = sources.rows(load_dataset(str(paintings / "out"), split="train"))[0] | {"prompt": text}
    assert example_pictures.attribute_picture(row, attributes * 5).size == (828, 400)


# ----- figures -----


def answer(better: str) -> str:
    return json.dumps({"better": better})


def test_agreement_of_the_two_orders_by_hand():
    """
    Of five instances one agrees (A, then B: the chosen image twice), two go to the first image twice, one to the second, and one
    cannot be read. The first image has 1 + 2 * 2 + 0 = 5 of 2 * 4 verdicts.
    """
    given = [("A", "B"), ("A", "A"), ("A", "A"), ("B", "B")]
    instances = [{"label": "cat", "answer": answer(one), "swapped_answer": answer(two)} for one, two in given]
    instances.append({"label": "cat", "answer": answer("A"), "swapped_answer": ""})
    counts = count_orders(instances, shipped_prompt("judge"))
    assert counts == {"read": 4, "agree": 1, "first": 2, "second": 1, "unread": 1}


def test_agreement_in_the_card(tmp_path):
    """A judge that always prefers the first image never agrees: all its verdicts, read out of other text, are for the first image."""
    sources.save(tmp_path / "pairs" / "source", train=sources.pairs(6))
    run = sources.annotate_pairs(sources.pairs(6), tmp_path / "pairs" / "annotations", vlm=FirstVLM())
    sources.build_pairs(tmp_path / "pairs" / "source", run.folder, tmp_path / "out")
    text = sources.card_of(tmp_path / "out")[1]
    number = run.counts["instances"]
    assert table_after(text, "### Agreement") == [
        ["train", str(number), "0 (0.0 %)", f"{number} (100.0 %)", "0 (0.0 %)", "100.0 %"]
    ]


def test_labels_and_objects_of_a_pair_are_counted(pairs):
    """The table of labels has the objects of every label by preference, and sums to all; that of objects has all pairs."""
    text = sources.card_of(pairs / "out")[1]
    ok = [row for row in load_annotations(pairs / "annotations") if STATUSES[row["status"]] == "ok"]
    found = Counter(
        (instance["label"], PREFERENCES[instance["preference"]]) for row in ok for instance in row["instances"]
    )
    for label, *numbers in table_after(text, "The most frequent of"):
        by_preference = [found[label, name] for name in ("chosen", "rejected", "tie")]
        assert [int(number) for number in numbers] == [sum(by_preference), *by_preference]
    header, *_ = re.findall(r"^\| objects (.*)\|\n\|.*\n\| pairs (.*)\|$", text, re.MULTILINE)
    counted = dict(zip(*([int(number) for number in line.split("|") if number.strip()] for line in header)))
    assert counted == Counter(len(row["instances"]) for row in ok)


def test_attributes_are_counted(paintings):
    """The most frequent attributes and the numbers of an image equal counts of the annotations."""
    text = sources.card_of(paintings / "out")[1]
    criteria = Criteria.load(sources.CRITERIA)
    ok = [row for row in load_annotations(paintings / "annotations") if STATUSES[row["status"]] == "ok"]
    spreads = {line[0]: line[1:] for line in table_after(text, "Attributes of an image")}
    for kind in ("positive", "negative"):
        found = Counter(name for row in ok for name in row[f"{kind}_attributes"])
        forms = {getattr(leaf, kind): found[leaf.id] for leaf in criteria.attributes if found[leaf.id]}
        lines = table_after(text, f"| {kind} form")
        assert {form: int(number.split()[0]) for form, _, number in lines} == forms
        assert [int(line[2].split()[0]) for line in lines] == sorted(forms.values(), reverse=True)
        assert all(line[2].endswith(f"({100 * forms[line[0]] / len(ok):.1f} %)") for line in lines)
        numbers = sorted(len(row[f"{kind}_attributes"]) for row in ok)
        assert spreads[kind] == [
            str(numbers[0]),
            str(numbers[(len(numbers) - 1) // 2]),
            f"{sum(numbers) / len(numbers):.1f}",
            str(numbers[-1]),
        ]


def test_spread_by_hand():
    """Of 0, 0, 1, 1, 1, 5 the median is 1 and the mean 8 / 6; of 2, 4 the lower median is 2."""
    assert spread(Counter([0, 0, 1, 1, 1, 5])) == (0, 1, 8 / 6, 5)
    assert spread(Counter([2, 4])) == (2, 2, 3.0, 4)


def test_failures_are_those_of_the_roles(pairs, tmp_path):
    """The card says for how many rows a role had no valid answer, and not that an unreadable image was a role's fault."""
    described = described_by(builder_of(pairs, tmp_path))
    rows = list(load_annotations(pairs / "annotations"))
    planner = sum(row["reason"].startswith("planner:") for row in rows)
    assert described["failures"] == {"planner": planner, "detector": 0, "judge": 0} and planner
    text = sources.card_of(pairs / "out")[1]
    assert f"The planner gave no valid answer, even when it was asked once more, for {planner} of 12 rows" in text
    assert "The judge gave no" not in text and "The detector gave no" not in text


def test_the_size_of_the_files_is_that_on_the_disk(pairs):
    """The card tells the bytes of the Parquet files of each configuration."""
    sizes = [
        sum(path.stat().st_size for path in (pairs / "out" / name).iterdir()) for name in ("pairs", "annotations")
    ]
    written = "The files have {:.1f} kB (`pairs`) and {:.1f} kB (`annotations`).".format(
        *(size / 1000 for size in sizes)
    )
    assert written in sources.card_of(pairs / "out")[1]
    assert [byte_size(number) for number in (0, 999, 1000, 2_540_000, 10**9)] == [
        *("0 bytes", "999 bytes", "1.0 kB", "2.5 MB", "1.0 GB")
    ]


# ----- what is known, and what is private -----


def test_metadata_tell_what_is_known(pairs, paintings):
    """Machine-made, in English where the prompts are the package's, from a dataset on the Hub only if it is one, under no license."""
    metadata = sources.card_of(pairs / "out")[0]
    assert metadata["annotations_creators"] == ["machine-generated"] and metadata["language"] == ["en"]
    assert metadata["source_datasets"] == ["user/pickapic"] and metadata["license"] == "unknown"
    assert (
        metadata["tags"][:2] == ["trl-diffusion", "preference-alignment"]
        and "cpo" in sources.card_of(paintings / "out")[0]["tags"]
    )
    for folder in (pairs, paintings):
        assert check_card((folder / "out" / "README.md").read_text(), "dataset") == ([], [])
    assert "source_datasets" not in sources.card_of(paintings / "out")[0]


def test_a_custom_prompt_says_nothing_of_the_language(pairs, tmp_path):
    """If a role was asked in other words, nobody knows in which language it answered."""
    builder = builder_of(pairs, tmp_path)
    manifest = json.loads(next((pairs / "annotations").glob("*/manifest.json")).read_text())
    assert builder.recipe(manifest)["is_english"]
    manifest["judge"]["prompt"]["text"] = "Welches Bild ist besser?"
    assert not builder.recipe(manifest)["is_english"]


def test_a_dataset_is_pick_a_pic_by_its_columns(pairs, tmp_path):
    """A user's pairs with labels are not taken for Pick-a-Pic, about which the card would say what is not true of them."""
    builder = builder_of(pairs, tmp_path)
    manifest = json.loads(next((pairs / "annotations").glob("*/manifest.json")).read_text())
    assert builder.recipe(manifest)["is_pick_a_pic"] and "kirstain2023pickapic" in sources.card_of(pairs / "out")[1]
    for columns in ({"chosen": "chosen"}, {"image_0": "left", "label_0": "left_wins"}):
        assert not builder.recipe(manifest | {"columns": columns})["is_pick_a_pic"]


def test_a_license_covers_the_annotations_alone(pairs, tmp_path):
    """`--license` is in the metadata of a dataset without images; with images, whose terms are others, only in the text."""
    for flags, expected in ((("--no_images",), "cc-by-4.0"), ((), "unknown")):
        out = tmp_path / expected
        sources.build_pairs(pairs / "source", pairs / "annotations", out, "--license", "cc-by-4.0", *flags)
        metadata, text = sources.card_of(out)
        assert metadata["license"] == expected
        assert "published under `cc-by-4.0`. It does not cover the prompts" in text and "None is declared" not in text


@pytest.mark.parametrize("name", ["MIT License", "CC-BY-4.0", "mit\nlanguage: xx"])
def test_a_license_that_the_hub_does_not_know_how_to_spell_is_refused(name, pairs, tmp_path):
    """What the Hub would refuse after the upload is refused before anything is built."""
    with pytest.raises(ValueError, match="`--license` must be a name of the Hub, such as cc-by-4.0"):
        sources.build_pairs(pairs / "source", pairs / "annotations", tmp_path / "out", "--license", name)
    assert not (tmp_path / "out").exists()


def test_a_declared_license_of_the_source_is_named(pairs, tmp_path, monkeypatch):
    """What the source declares on the Hub is said of the source, and not claimed for the annotations."""
    monkeypatch.setattr(
        dataset_card, "declared_license", lambda name, revision: "mit" if name == "user/pickapic" else None
    )
    builder = builder_of(pairs, tmp_path)
    card = make_card(builder, described_by(builder), infos_of(pairs / "out"), "out")
    assert "It declares the license `mit`." in card.text and card.data.license == "unknown"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/pairs", "user/pairs"),
        ("/home/alice/secret/pairs", "pairs"),
        ("/home/alice/secret/pairs/", "pairs"),
        ("~/pairs", "pairs"),
        ("../alice/pairs", "pairs"),
        ("C:\\Users\\alice\\pairs", "pairs"),
        ("alice\\pairs", "pairs"),
        ("https://alice:hf_secret@host.example/a/pairs.parquet?token=hf_secret", "pairs.parquet"),
        ("s3://bucket/alice/pairs", "pairs"),
        ("/", "a local folder"),
    ],
)
def test_of_a_place_only_the_last_part_is_published(name, expected):
    """Neither folders nor addresses nor tokens of the user's machine get into a card."""
    assert public(name) == expected


def test_settings_have_no_secrets():
    """Addresses, keys and paths among a role's settings are left out, and lengths in tokens are not."""
    model = {
        "model": "judge",
        "server": "http://10.0.0.1/v1",
        "max_new_tokens": 512,
        "changed_parameters": {"api_key": "hf_secret", "authorization": "hf_secret", "lora": "/home/alice/lora/judge"},
    }
    settings = common.describe_role({"model": model})["settings"]
    assert settings == {"model": "judge", "max_new_tokens": 512, "changed_parameters.lora": "judge"}


@pytest.mark.parametrize(
    ("number", "expected"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (10_000_000, "10M<n<100M"), (959_040, "100K<n<1M"), (10**9, "1B<n<10B")],
)
def test_size_categories_are_the_hubs(number, expected):
    """Each size has a category of the Hub's list."""
    assert (
        size_category(type("Info", (), {"splits": {"train": type("Split", (), {"num_examples": number})}})) == expected
    )


# ----- texts of others -----


def structure(text: str) -> list[tuple]:
    """What a page is made of: the kinds of its blocks, and the links, pictures and pieces of HTML in its text."""
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        found.append((token.type, token.tag, token.level))
        found += [
            (
                child.type,
                child.attrs.get("href") or child.attrs.get("src"),
                child.content if child.type == "html_inline" else "",
            )
            for child in token.children or []
            if child.type in ("link_open", "image", "html_inline", "hardbreak", "strong_open", "s_open", "em_open")
        ]
    return found


def replaced(described: dict, text: str) -> dict:
    """A description in which every text of others is another one."""
    roles = {
        name: {"settings": dict.fromkeys(role["settings"], text), "prompt": text}
        for name, role in described["roles"].items()
    }
    changed = {
        "annotated": text,
        "annotated_revision": text,
        "annotated_split": text,
        "roles": roles,
        "models": {text: (text, ["judge"])},
        "versions": {text: text},
        "reasons": {"train": Counter({("error", text): 1})},
        "example": json.dumps({"prompt": text}, ensure_ascii=False),
        "flags": {"vlm": text},
    }
    if "labels" in described:
        changed |= {
            "labels": Counter({text: 1}),
            "preferences": Counter({(text, "tie"): 1}),
            "dropped": {"train": Counter({text: 1})},
        }
        changed |= {name: {text: described[name]["train"]} for name in ("statuses", "pairs", "orders")}
    else:
        criteria = described["criteria"]
        leaves = tuple(replace(leaf, positive=text, negative=text) for leaf in criteria.attributes)
        changed |= {"criteria": replace(criteria, name=text, attributes=leaves), "criteria_file": False}
        changed |= {"failed_dimensions": Counter({text: 1})}
    return described | changed


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("kind", ["pairs", "paintings"])
def test_texts_of_others_change_nothing_but_their_places(kind, hostile, known, request, tmp_path):
    """
    With any text as name, prompt, label, reason, model, dataset, form, setting or caption, the page has the headings, tables, links,
    pictures and blocks of a page with a harmless one, its metadata load with the name, and its Python code is valid.
    """
    folder = request.getfixturevalue(kind)
    described, infos = known[kind]
    cards = []
    for text in ("a harmless text", hostile):
        builder = builder_of(folder, tmp_path)
        for field in ("source", "source_config", "source_revision", "license"):
            setattr(builder.config, field, text)
        picture = example_pictures.Picture("images/example-0.png", b"", text)
        card = make_card(builder, replaced(described, text), infos, text, [picture])
        card.save(tmp_path / "README.md")
        cards.append(DatasetCard.load(tmp_path / "README.md"))
        for block in re.findall(r"^```python\n(.*?)^```", card.text, re.DOTALL | re.MULTILINE):
            ast.parse(block)
    assert structure(cards[1].text) == structure(cards[0].text)
    assert cards[1].data.to_dict().keys() == cards[0].data.to_dict().keys()
    assert cards[1].data.license == "unknown"
    assert cards[1].data.configs == cards[0].data.configs


# ----- a recipe that was not run -----


@pytest.mark.parametrize("builder_class", [PickapicInstance, PaintingAttributes])
def test_a_planned_card_has_no_figures_of_its_own(builder_class):
    """The card of a recipe has prompts, columns and commands; its tables of figures hold "not measured", and it claims no size."""
    card = planned_card(builder_class, "user/planned", source="yuvalkirstain/pickapic_v2")
    assert "recipe that was not run" in card.text and "size_categories" not in card.data.to_dict()
    section = card.text[card.text.index("## Size") : card.text.index("## Columns")]
    cells = [cell for table in sources.tables(section) for line in table for cell in line[-2:]]
    assert cells and set(cells) == {"not measured"}
    numbers = re.findall(r"\d[\d,]*\d", re.sub(r"^\|.*\|$", "", section, flags=re.MULTILINE))
    paper = ["959,040", "1,205,593", "558,352"] if builder_class is PickapicInstance else []
    assert [number for number in numbers if "," in number] == paper
    assert not paper or "The paper reports for its own annotations" in section
    role = "judge" if builder_class is PickapicInstance else "attribute_expert"
    assert shipped_prompt(role).strip() in card.text and "Qwen/Qwen2.5-VL-7B-Instruct" in card.text
    assert check_card(str(card), "dataset") == ([], [])
    assert DatasetCard(str(card)).data.dataset_info["config_name"] == "annotations"
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        ast.parse(block)


def test_the_commands_of_a_card_are_those_of_the_package(pairs, paintings):
    """The flags that a card prints to repeat it are flags of the commands."""
    for folder, script, builder in (
        (pairs, annotate_instances, "pickapic_instance"),
        (paintings, annotate_attributes, "painting_attributes"),
    ):
        block = re.search(r"To repeat it:\n\n```bash\n(.*?)```", sources.card_of(folder / "out")[1], re.DOTALL)[1]
        annotate, build = block.replace("\\\n", " ").strip().split("\n")
        args = annotate.split()[2:]
        script.make_parser().parse_args_and_config(args)
        common.make_parser(builder, "pairs").parse_args(build.split()[3:])
