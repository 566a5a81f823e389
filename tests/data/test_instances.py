# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Instances with segmentation masks: read, refused, stored, and moved with their images."""

import copy
import io
import json
import os
import pickle
import struct
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageColumn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from tests import tiny
from trl_diffusion import instance_pair_features
from trl_diffusion.boxes import widen_boxes
from trl_diffusion.data import content, row_contents
from trl_diffusion.data.check import as_text, check_dataset
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.formats import prepare_dataset
from trl_diffusion.data.images import open_reduced
from trl_diffusion.data.instances import read_mask
from trl_diffusion.data.row_contents import RowContents
from trl_diffusion.data.sources import load_source
from trl_diffusion.data.transforms import prepare_image
from trl_diffusion.losses import instance_terms
from trl_diffusion.masks import instance_masks, instance_regions, unpacked
from trl_diffusion.segmentation import decode_rle, encode_rle


PAIR, IMAGES = ("prompt", "chosen", "rejected"), ("chosen", "rejected")


def disc(width: int = 40, height: int = 32, x: float = 16, y: float = 14, radius: float = 9) -> np.ndarray:
    """The pixels whose centre is in a disc."""
    rows, columns = np.ogrid[:height, :width]
    return (rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 < radius**2


def png(image: Image.Image | np.ndarray, **settings) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, "PNG", **settings)
    return buffer.getvalue()


def stored(data: bytes) -> dict:
    return {"bytes": data, "path": None}


def instance(**changes) -> dict:
    """One with masks and without boxes."""
    masks = {"chosen_mask": stored(png(disc())), "rejected_mask": stored(png(disc(x=30)))}
    return {"label": "ball", "chosen_box": None, "rejected_box": None, "preference": "rejected"} | masks | changes


def boxed(**changes) -> dict:
    """One with boxes alone."""
    return {
        "label": "cat",
        "chosen_box": [10.0, 8.0, 30.0, 24.0],
        "rejected_box": [4.0, 0.0, 36.0, 32.0],
        "preference": "chosen",
    } | changes


def row(number: int = 0, instances: list | None = None) -> dict:
    images = {name: stored(png(tiny.image(2 * number + place))) for place, name in enumerate(IMAGES)}
    return {"id": f"row-{number}", "prompt": "a ball", **images, "instances": instances or [instance()]}


def dataset_of(*rows: dict) -> Dataset:
    return Dataset.from_list(list(rows), features=instance_pair_features(masks=True))


def undecoded(*rows: dict) -> Dataset:
    """The same with masks as they are: whether there are bytes and a path is not looked at."""
    mask = ImageColumn(decode=False)
    lists = instance_pair_features(masks=True)["instances"]
    lists.feature |= {"chosen_mask": mask, "rejected_mask": mask, "preference": Value("string")}
    features = Features({**instance_pair_features(), "instances": lists})
    table = pa.Table.from_pylist(list(rows), schema=features.arrow_schema)
    return Dataset(table)


def prepared(data):
    return prepare_dataset(data, "train_dataset", PAIR, IMAGES)


# ---- One mask ----


def paletted(mask: np.ndarray) -> Image.Image:
    image = Image.fromarray(mask.astype(np.uint8) * 3, "P")
    image.putpalette([255, 255, 255] + [0] * 765)  # what is white has the index 0
    return image


PNGS = {
    "white": lambda mask: png(np.where(mask, 255, 0).astype(np.uint8)),
    "ones": lambda mask: png(mask.astype(np.uint8)),
    "one bit": lambda mask: png(mask),
    "16 bits": lambda mask: png(mask.astype(np.uint16) * 7),
    "palette": lambda mask: png(paletted(mask)),
    "palette with a transparent color": lambda mask: png(paletted(mask), transparency=3),
    "one channel of a color": lambda mask: png(np.stack([0 * mask, 0 * mask, 9 * mask], axis=-1).astype(np.uint8)),
    "PIL": lambda mask: Image.fromarray(mask),
    "undecoded": lambda mask: stored(png(mask)),
    "RLE": encode_rle,
    "RLE of bytes": lambda mask: encode_rle(mask) | {"counts": encode_rle(mask)["counts"].encode()},
    "RLE in a struct with images": lambda mask: encode_rle(mask) | {"bytes": None, "path": None},
}


@pytest.mark.parametrize("kind", PNGS)
def test_a_mask_is_read_from_all_that_may_hold_one(kind):
    """What is not 0 is inside: of a value, of an index, of any channel."""
    assert np.array_equal(read_mask(PNGS[kind](disc()), (40, 32)), disc())


def bomb() -> bytes:
    """A PNG of a few bytes that claims 3.6 billion pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


WRONG = {
    "of another size": (png(disc(32, 40)), "it is 32 pixels wide and 40 high, but its image 40 and 32"),
    "an RLE of another size": (encode_rle(disc(64, 64)), "it is 64 pixels wide and 64 high, but its image 40 and 32"),
    "an RLE of width and height": (
        encode_rle(disc()) | {"size": [40, 32]},
        "its `size` is [40, 32], [width, height] of its image: COCO's is [height, width]",
    ),
    "a polygon": (
        [[3.0, 4.0, 20.0, 4.0, 20.0, 9.0]],
        "it is a list, as polygons are: make an RLE of it with `pycocotools.mask.f",
    ),
    "a huge RLE": ({"size": [10**12, 10**12], "counts": "0"}, "it is 1000000000000 pixels wide"),
    "an RLE that does not add up": ({"size": [32, 40], "counts": [3, 4]}, "`counts` add up to 7 pixels"),
    "an RLE with a negative length": ({"size": [32, 40], "counts": [1281, -1]}, "`counts` have a negative length"),
    "empty": (png(np.zeros((32, 40), bool)), "it is empty: no pixel belongs to the object"),
    "an empty RLE": (encode_rle(np.zeros((32, 40), bool)), "it is empty"),
    "with transparency": (png(Image.new("RGBA", (40, 32), "white")), "its mode is RGBA, in which it is not clear"),
    "gray with transparency": (png(Image.new("LA", (40, 32), 255)), "its mode is LA"),
    "a JPEG file": (jpeg(disc()), "it is a JPEG file, which may have changed its pixels"),
    "no image": (b"no image", "this is not an image that can be read"),
    "cut off": (png(np.random.default_rng(0).random((32, 40)) < 0.5)[:-30], "the image is broken"),
    "no bytes": (b"", "the image is empty"),
    "a bomb": (bomb(), "the image claims too many pixels"),
    "an address": ("https://example.com/mask.png", "is an address"),
    "a missing file": ("missing/mask.png", "No such file"),
    "a number": (7, "expected an image, its bytes or a path, got int"),
}


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mask_names_its_row_and_says_why(name):
    """A batch of such a row, and the check of its dataset, say which mask of which row is wrong, and why."""
    mask, why = WRONG[name]
    wrong = row(3, [boxed(), instance(rejected_mask=mask)])
    with pytest.raises(ValueError) as caught:
        InstancePairCollator(32)([wrong])
    message = str(caught.value)
    assert (
        message.startswith("`instances[1].rejected_mask` of the row with id 'row-3' is not a mask: ")
        and why in message
    )
    assert "\n" not in message and len(message) < 500


def test_the_check_finds_every_wrong_mask():
    """Each wrong mask is a fault of its row, whatever else is wrong with other rows; right ones are none."""
    names = ("of another size", "empty", "cut off")
    wrong = [row(3 + at, [instance(chosen_mask=stored(WRONG[name][0]))]) for at, name in enumerate(names)]
    report = check_dataset(dataset_of(row(0), row(1, [boxed()]), *wrong), PAIR, IMAGES, 32)
    assert [fault["row"] for fault in report["faults"]] == [2, 3, 4]
    for fault, name in zip(report["faults"], names, strict=True):
        assert fault["column"] == "instances" and WRONG[name][1] in fault["message"]
    report = check_dataset(
        dataset_of(row(0), row(1, [boxed(), instance(chosen_mask=None, chosen_box=[1.0, 1.0, 9.0, 9.0])])),
        PAIR,
        IMAGES,
        32,
    )
    assert report["faults"] == [] and report["holds"]["instances"]["with masks"] == 2
    assert "instances: 3; 0 rows without; conflicts 66.7%, ties 0.0%; 2 with masks" in list(as_text(report))
    assert "with masks" not in check_dataset(tiny.pairs(2), PAIR, IMAGES, 32)["holds"]["instances"]


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}])
def test_an_instance_needs_a_box_or_a_mask(nothing):
    """Where both are null, the message says which box is missing; before the training, and for a single row."""
    assert InstancePairCollator(32)([row(5, [boxed(), instance()])])["chosen_masks"].shape == (1, 2, 32, 4)
    lacking = [row(0), row(5, [boxed(), instance(chosen_mask=nothing)])]
    message = (
        r"`instances\[1\]\.chosen_box` of the row with id 'row-5' is not a box: None is not a list of four numbers"
    )
    with pytest.raises(ValueError, match=message):
        InstancePairCollator(32)(lacking)
    with pytest.raises(ValueError, match=message + r".* It is row 1 of `train_dataset`"):
        prepared(undecoded(*lacking))


# ---- Types ----


def test_the_columns_without_masks_are_as_ever():
    """Masks are two more fields of an instance; without them the columns are those of boxes."""
    fields = instance_pair_features()["instances"].feature
    with_masks = instance_pair_features(masks=True)["instances"].feature
    assert list(fields) == ["label", "chosen_box", "rejected_box", "preference"]
    assert set(with_masks) - set(fields) == {"chosen_mask", "rejected_mask"}
    assert {name: with_masks[name] for name in fields} == fields


def rle_rows() -> list[dict]:
    masks = {"chosen_mask": encode_rle(disc()), "rejected_mask": encode_rle(disc(x=30))}
    plain = {"label": "ball", "preference": "rejected"} | masks
    return [row(number, [plain] * (number + 1)) for number in range(2)]


def as_files(data: Dataset, folder) -> Dataset:
    data.to_parquet(folder / "rows.parquet")
    return load_dataset("parquet", data_files=str(folder / "rows.parquet"), split="train", cache_dir=folder / "cache")


def as_saved(data: Dataset, folder) -> Dataset:
    data.save_to_disk(folder / "saved")
    return datasets.load_from_disk(folder / "saved")


def as_stream(data: Dataset, folder):
    return as_files(data, folder).to_iterable_dataset()


def as_json(data: Dataset, folder) -> Dataset:
    lines = [json.dumps({**row, **dict.fromkeys(IMAGES)}) for row in rle_rows()]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    read = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=folder / "cache")
    images = [{name: row[name] for name in IMAGES} for row in rle_rows()]
    return read.remove_columns(list(IMAGES)).map(
        lambda row, index: images[index],
        with_indices=True,
        features=Features({**read.features, **{name: instance_pair_features()[name] for name in IMAGES}}),
        new_fingerprint="rle",
    )


PLACES = {"parquet": as_files, "saved": as_saved, "a stream": as_stream, "memory": lambda data, folder: data}


@pytest.mark.parametrize("place", PLACES)
def test_masks_survive_where_datasets_are_stored(place, tmp_path):
    """A dataset with masks gives the same batch from memory, from files and as a stream."""
    rows = [row(0), row(1, [instance(), boxed(chosen_mask=None, rejected_mask=None)])]
    read = PLACES[place](dataset_of(*rows), tmp_path)
    expected = InstancePairCollator(32)(rows)
    batch = InstancePairCollator(32)(list(prepared(read)))
    assert batch.keys() == expected.keys() and {"chosen_masks", "rejected_masks"} < batch.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value


def test_encodings_survive_json(tmp_path):
    """Run-length encodings in a JSON file, without a column of boxes, give the batch of the rows."""
    batch = InstancePairCollator(32)(list(prepared(as_json(None, tmp_path))))
    expected = InstancePairCollator(32)(rle_rows())
    assert torch.equal(batch["chosen_masks"], expected["chosen_masks"])
    assert torch.equal(unpacked(batch["chosen_masks"], 32, 32)[1, 1], torch.from_numpy(disc()[:, 4:36]))


def runs(mask: np.ndarray) -> list[int]:
    """The lengths of the runs of pixels, column by column, counted one by one."""
    found, inside = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != inside:
            found.append(0)
            inside = pixel
        found[-1] += 1
    return found


COUNTS = {
    "string": (lambda mask: encode_rle(mask)["counts"], Value("string")),
    "bytes": (lambda mask: encode_rle(mask)["counts"].encode(), Value("binary")),  # as pycocotools gives them
    "list": (runs, List(Value("int64"))),  # as transformers gives them
    "small list": (runs, List(Value("uint16"))),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_columns_of_encodings(tmp_path, kind):
    """Compressed and uncompressed run lengths, as others write them, give one batch from memory, from Parquet and as a stream."""
    encode, counts = COUNTS[kind]
    masks = {"chosen_mask": disc(), "rejected_mask": disc(x=30)}
    found = {name: {"size": [32, 40], "counts": encode(mask)} for name, mask in masks.items()}
    rle = {"size": List(Value("int32")), "counts": counts}
    fields = instance_pair_features()["instances"].feature | dict.fromkeys(masks, rle)
    features = Features({**instance_pair_features(), "instances": List(fields)})
    expected = InstancePairCollator(32)([row(0), row(1, [boxed()])])
    rows = [row(0, [instance(**found)]), row(1, [boxed(chosen_mask=None, rejected_mask=None)])]
    data = Dataset.from_list(rows, features=features)
    for place in PLACES.values():
        batch = InstancePairCollator(32)(list(prepared(place(data, tmp_path))))
        assert all(torch.equal(batch[name], expected[name]) for name in ("chosen_masks", "rejected_masks"))


@pytest.mark.parametrize("streaming", [False, True])
def test_instances_in_json_may_lack_fields(cache, tmp_path, streaming):
    """
    Where one instance has encodings and the next boxes, each written without the fields of the other, the batch is that of the rows; what
    `datasets` makes of such a file alone is refused with what to write.
    """
    folder = tmp_path / "data"
    rows = named_rows(folder)
    for made, found in zip(rows, rle_rows()[:1] * 3, strict=True):
        made["instances"] = [*found["instances"], boxed()]
    TABLES["rows.jsonl"](rows, folder / "rows.jsonl")
    read = load_source(str(folder / "rows.jsonl"), streaming=streaming)["train"]
    batch = InstancePairCollator(32)(list(prepared(read)))
    expected = InstancePairCollator(32)([row(number, [*rle_rows()[0]["instances"], boxed()]) for number in range(3)])
    assert all(torch.equal(batch[name], expected[name]) for name in ("chosen_masks", "rejected_boxes", "conflicts"))
    if not streaming:
        alone = load_dataset(
            "json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=tmp_path / "other"
        )
        with pytest.raises(
            ValueError, match=r"must be a list of instances, got List\(Json.* write every field in every"
        ):
            prepared(alone)


def test_a_folder_of_masks(tmp_path):
    """`imagefolder` reads masks whose files the instances of `metadata.jsonl` name."""
    for name, mask in (("a.png", disc()), ("b.png", disc(x=30))):
        (tmp_path / name).write_bytes(png(mask))
    for name in IMAGES:
        tiny.image(0).save(tmp_path / f"{name}.png")
    found = {
        "label": "ball",
        "preference": "rejected",
        "chosen_mask_file_name": "a.png",
        "rejected_mask_file_name": "b.png",
    }
    files = {f"{name}_file_name": f"{name}.png" for name in IMAGES}
    line = {"id": "1", "prompt": "a ball", "instances": [found]} | files
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    read = load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=tmp_path / "cache")
    batch = InstancePairCollator(32)(list(prepared(read)))
    assert torch.equal(unpacked(batch["rejected_masks"], 32, 32)[0, 0], torch.from_numpy(disc(x=30)[:, 4:36]))


def named_rows(folder, field: str = "{}_mask_file_name") -> list[dict]:
    """Rows as they are in a table: files of images, and of masks, which lie in a folder of their own."""
    rows = [row(0, [instance(), boxed()]), row(1, [boxed()]), row(2)]
    (folder / "masks").mkdir(parents=True)
    for number, made in enumerate(rows):
        for name in IMAGES:
            path = folder / f"{number}-{name}.png"
            path.write_bytes(made[name]["bytes"])
            made[name] = path.name
            for place, found in enumerate(made["instances"]):
                if mask := found.pop(f"{name}_mask", None):
                    path = folder / "masks" / f"{number}-{place}-{name}.png"
                    path.write_bytes(mask["bytes"])
                    found[field.format(name)] = f"masks/{path.name}"
    return rows


def with_lists_as_text(rows: list[dict]) -> list[dict]:
    return [made | {"instances": json.dumps(made["instances"])} for made in rows]


TABLES = {
    "rows.jsonl": lambda rows, path: path.write_text("\n".join(map(json.dumps, rows))),
    "metadata.jsonl": lambda rows, path: path.write_text("\n".join(map(json.dumps, rows))),
    "rows.csv": lambda rows, path: Dataset.from_list(with_lists_as_text(rows)).to_csv(path),
    "rows.parquet": lambda rows, path: Dataset.from_list(rows).to_parquet(path),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_names_the_files_of_masks(cache, tmp_path, table, streaming):
    """Relative to the table, wherever the command runs, as for images: the batch is that of the masks themselves, from memory or as a stream."""
    folder = tmp_path / "data"
    TABLES[table](named_rows(folder), folder / table)
    source = folder if table.startswith("metadata") else folder / table
    read = prepared(load_source(str(source), streaming=streaming)["train"])
    rows = [row(0, [instance(), boxed()]), row(1, [boxed()]), row(2)]
    batch, expected = InstancePairCollator(32)(list(read)), InstancePairCollator(32)(rows)
    assert batch.keys() == expected.keys() and {"chosen_masks", "rejected_masks"} < batch.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value


def test_a_name_may_be_in_the_field_of_the_mask(cache, tmp_path):
    """As `chosen` may hold the path of an image; types and order of the other columns and fields stay."""
    rows = named_rows(tmp_path / "data", "{}_mask")
    rows[2]["instances"][0]["chosen_mask"] = str(tmp_path / "data" / "masks" / "2-0-chosen.png")
    fields = instance_pair_features(masks=True)["instances"].feature | dict.fromkeys(
        row_contents.MASKS, Value("string")
    )
    features = instance_pair_features() | {"instances": List(fields)}
    for made in rows:
        made |= {name: str(tmp_path / "data" / made[name]) for name in IMAGES}
    Dataset.from_list(rows, features=Features(features)).to_parquet(tmp_path / "data" / "rows.parquet")
    for streaming in (False, True):
        read = load_source(str(tmp_path / "data" / "rows.parquet"), streaming=streaming)["train"]
        assert list(read.features) == list(features)
        assert read.features["instances"] == instance_pair_features(masks=True)["instances"]
        expected = InstancePairCollator(32)([row(0, [instance(), boxed()]), row(1, [boxed()]), row(2)])
        batch = InstancePairCollator(32)(list(prepared(read)))
        assert all(torch.equal(batch[name], expected[name]) for name in ("chosen_masks", "rejected_masks", "judged"))


def test_another_file_of_a_mask_is_another_dataset(cache, tmp_path):
    """What was made of the rows before is not found for rows whose masks changed."""
    folder = tmp_path / "data"
    TABLES["rows.jsonl"](named_rows(folder), folder / "rows.jsonl")
    fingerprints = []
    for _ in range(2):
        fingerprints.append(load_source(str(folder / "rows.jsonl"))["train"]._fingerprint)
    (folder / "masks" / "0-0-chosen.png").write_bytes(png(disc(x=12)))
    fingerprints.append(load_source(str(folder / "rows.jsonl"))["train"]._fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


MISNAMED = {
    "missing": (
        "masks/none.png",
        r"1 of the 2 images in the column `instances.chosen_mask_file_name` of .*rows.jsonl are missing: .*masks/none.png.* Paths are relative to ",
    ),
    "missing elsewhere": ("/no/such/folder/mask.png", r"1 of the 2 images .* are missing: .*/no/such/folder/mask.png"),
    "a folder": (
        "masks/a folder",
        r"`instances\[0\].chosen_mask` of the row with id 'row-0' is not a mask: .*masks/a folder' is a folder",
    ),
    "unreadable": (
        "masks/text.png",
        r"`instances\[0\].chosen_mask` of the row with id 'row-0' is not a mask: this is not an image that can be read",
    ),
    "of another size": (
        "masks/small.png",
        r"`instances\[0\].chosen_mask` of the row .* is not a mask: it is 20 pixels wide and 16 high, but its image 40 and 32",
    ),
    "an address": (
        "https://example.com/mask.png",
        r"`instances\[0\].chosen_mask` of the row .* is not a mask: 'https://example.com/mask.png' is an address: download the file",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", MISNAMED)
def test_a_name_of_no_mask_is_refused(cache, tmp_path, name, streaming):
    """What is wrong, where, and the way out: at once where files are missing, else when the mask is read; of a stream when the row is."""
    folder = tmp_path / "data"
    rows = named_rows(folder)
    (folder / "masks" / "a folder").mkdir()
    (folder / "masks" / "text.png").write_text("text")
    (folder / "masks" / "small.png").write_bytes(png(disc(20, 16, 8, 8, 5)))
    path, message = MISNAMED[name]
    rows[0]["instances"][0]["chosen_mask_file_name"] = path
    TABLES["rows.jsonl"](rows, folder / "rows.jsonl")
    with pytest.raises(ValueError, match=message):
        InstancePairCollator(32)(list(prepared(load_source(str(folder / "rows.jsonl"), streaming=streaming)["train"])))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mask_in_two_fields_is_refused(cache, tmp_path, streaming):
    """A null beside the name of a file is none; a mask is one too many, and the message names both fields."""
    folder = tmp_path / "data"
    rows = named_rows(folder)

    def batch_with(mask: dict | None) -> dict:
        rows[0]["instances"][0]["chosen_mask"] = mask
        TABLES["rows.jsonl"](rows, folder / "rows.jsonl")
        read = load_source(str(folder / "rows.jsonl"), streaming=streaming)["train"]
        return InstancePairCollator(32)(list(prepared(read)))

    assert batch_with(None)["chosen_masks"].any()
    message = "`chosen_mask` and `chosen_mask_file_name` in the instances of .*rows.jsonl are two fields for one mask"
    with pytest.raises(ValueError, match=message):
        batch_with(encode_rle(disc()))


def test_preparing_writes_no_row_again():
    """Masks are left undecoded by a new type alone: the table stays, and the given dataset still decodes."""
    data = dataset_of(row(0), row(1))
    made = prepared(data)
    assert made[0]["instances"][0]["chosen_mask"]["bytes"] == png(disc())
    assert isinstance(data[0]["instances"][0]["chosen_mask"], Image.Image)
    assert made.data.column("instances").equals(data.data.column("instances"))
    assert made._fingerprint != data._fingerprint
    assert prepared(data)._fingerprint == made._fingerprint
    boxes = tiny.pairs(2)
    assert prepared(boxes).features["instances"] == boxes.features["instances"]


def test_masks_of_another_type_are_refused():
    """A column of numbers in the place of masks is refused before the training, with what to store."""
    fields = {**instance_pair_features()["instances"].feature, "chosen_mask": List(Value("int64"))}
    rows = [{**row(0), "instances": [boxed(chosen_mask=[1, 2])]}]
    data = Dataset.from_list(rows, features=Features({**instance_pair_features(), "instances": List(fields)}))
    with pytest.raises(ValueError, match="`instances.chosen_mask` of `train_dataset` must contain segmentation masks"):
        prepared(data)


def test_a_column_holds_images_or_encodings():
    """A type of both at once is refused: nobody could tell which of them a mask is."""
    both = encode_rle(disc()) | {"bytes": None, "path": None}
    images = {name: png(tiny.image(0)) for name in IMAGES}
    made = boxed(chosen_mask=both, rejected_mask=None)
    data = Dataset.from_list([{"id": "1", "prompt": "a ball", **images, "instances": [made]}])
    with pytest.raises(ValueError, match="must contain segmentation masks, .* Store either PNG images"):
        prepared(data)


# ---- Moved with the image ----


def painted(width: int, height: int, turn: int = 1, kind: str = "PNG") -> tuple[bytes, np.ndarray]:
    """A star and a disc, white on black, with an EXIF orientation, and the same as a mask."""
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.12, 0.28) * min(width, height)
    canvas = Image.new("1", (width, height))
    star = zip(width * 0.45 + radii * np.cos(angles), height * 0.4 + radii * np.sin(angles))
    ImageDraw.Draw(canvas).polygon(list(star), fill=1)
    ImageDraw.Draw(canvas).ellipse((width * 0.6, height * 0.6, width * 0.8, height * 0.85), fill=1)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = turn
    canvas.convert("RGB").save(buffer, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue(), np.array(canvas)


def assert_mask_is_the_paint(data: bytes, mask: np.ndarray, side: int, seed: int, **settings) -> tuple:
    image, size = open_reduced(data, (side, side))
    generator = torch.Generator().manual_seed(seed)
    result = prepare_image(
        image, torch.zeros(2, 4), (side, side), generator, stored_size=size, masks=[None, mask], **settings
    )
    paint = result.pixels.float().mean(dim=0) > 127.5
    assert result.masks.shape == (2, side, side) and not result.masks[0].any()
    assert paint.float().mean() > 0.03
    assert (
        result.masks[1] != paint
    ).float().mean() < 0.004  # pixels of edges, in which both round a share to yes or no
    return result.crop_top_left


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_mask_follows_a_turned_image(turn):
    """Under each of the eight EXIF orientations, the mask stays on what it covers."""
    assert_mask_is_the_paint(*painted(300, 200, turn), 128, 0)


@pytest.mark.parametrize("size", [(200, 128), (130, 300), (90, 64), (128, 128), (517, 389)])
@pytest.mark.parametrize("turn", [1, 6])
def test_a_mask_follows_random_crops_and_flips(size, turn):
    """Resized, cropped and flipped at random, the mask stays on what it covers."""
    crops = {
        assert_mask_is_the_paint(*painted(*size, turn), 128, seed, center_crop=False, random_flip=True)
        for seed in range(8)
    }
    assert len(crops) > (1 if size[0] != size[1] else 0)


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_mask_follows_an_image_that_is_decoded_at_a_fraction(turn):
    """A large JPEG file is decoded at a fraction of its size; its mask has the whole one."""
    data, mask = painted(1501, 1203, turn, "JPEG")
    assert open_reduced(data, (64, 64))[0].size != (1501, 1203)
    assert_mask_is_the_paint(data, mask, 64, 1, center_crop=False, random_flip=True)


def test_masks_take_no_random_number():
    """Crop and flip of an image are the same with and without masks."""
    data, mask = painted(300, 200)
    for seed in range(6):
        made = [
            prepare_image(
                open_reduced(data, (64, 64))[0],
                torch.zeros(1, 4),
                (64, 64),
                torch.Generator().manual_seed(seed),
                center_crop=False,
                random_flip=True,
                masks=masks,
            )
            for masks in ((), [mask])
        ]
        assert torch.equal(made[0].pixels, made[1].pixels) and made[0].crop_top_left == made[1].crop_top_left
        assert made[0].masks is None


# ---- Batches ----


def rectangle(box: list[float], width: int = 40, height: int = 32) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    left, top, right, bottom = map(int, box)
    mask[top:bottom, left:right] = True
    return mask


def with_rectangles(instances: list[dict], places: tuple[int, ...]) -> list[dict]:
    """Masks in the place of some boxes."""
    made = copy.deepcopy(instances)
    for place in places:
        for name in IMAGES:
            box = made[place].pop(f"{name}_box")
            made[place][f"{name}_mask"] = encode_rle(rectangle(box))
    return made


TWO = [boxed(), boxed(chosen_box=[6.0, 4.0, 20.0, 30.0], rejected_box=[8.0, 8.0, 24.0, 16.0], preference="rejected")]


def weights(batch: dict, overlap: str, column: str = "chosen") -> torch.Tensor:
    boxes, masks = batch[f"{column}_boxes"], batch.get(f"{column}_masks")
    return instance_masks(boxes, batch["judged"], batch["conflicts"], 8, 8, 0.0, overlap, masks)


@pytest.mark.parametrize("overlap", ["mean", "covering"])
@pytest.mark.parametrize("places", [(0,), (1,), (0, 1)])
def test_rectangles_as_masks_weigh_as_boxes(places, overlap):
    """Rows with boxes, with rectangles as masks and with both have the same weights, alone and in one batch."""
    collate = InstancePairCollator(32, random_flip=True)
    other = [boxed(preference="rejected")] * 3
    expected = collate([row(0, TWO), row(1, other)])
    found = collate([row(0, with_rectangles(TWO, places)), row(1, other)])
    assert "chosen_masks" not in expected and found["chosen_masks"].shape == (2, 2, 32, 4)
    for column in IMAGES:
        torch.testing.assert_close(
            weights(found, overlap, column), weights(expected, overlap, column), atol=1e-6, rtol=1e-6
        )


def test_a_mask_stands_above_a_box():
    """Where an instance has both, its box covers nothing, and what is drawn and trained on is the mask."""
    both = instance(chosen_box=[0.0, 0.0, 40.0, 32.0])
    batch = InstancePairCollator(32)([row(0, [both])])
    assert batch["chosen_boxes"].eq(0).all()
    assert torch.equal(unpacked(batch["chosen_masks"], 32, 32)[0, 0], torch.from_numpy(disc()[:, 4:36]))
    with pytest.raises(ValueError, match="chosen_box.* is not a box"):
        InstancePairCollator(32)([row(0, [instance(chosen_box=[5.0, 0.0, 2.0, 3.0])])])


def test_rows_without_masks_are_as_ever():
    """A batch of rows with boxes holds no masks, and beside rows with masks their own values stay the same."""
    alone = InstancePairCollator(32)([row(0, TWO)])
    beside = InstancePairCollator(32)([row(0, TWO), row(1)])
    assert not [name for name in alone if "mask" in name]
    for name in ("chosen_pixel_values", "chosen_boxes", "rejected_boxes", "judged", "conflicts"):
        assert torch.equal(beside[name][:1], alone[name])
    assert beside["chosen_masks"].shape == (2, 1, 32, 4) and not beside["chosen_masks"][0].any()


def cut_by_the_crop(kept: int, as_masks: bool) -> dict:
    """
    A batch of 40 x 32 pixels at 32, of which 4 columns are lost on either side. Of an instance in conflict, as a box or a mask, `kept`
    columns are left in both images.
    """
    box = [0.0, 8.0, 4.0 + kept, 24.0]
    made = [boxed(chosen_box=box, rejected_box=box, preference="rejected"), boxed()]
    return InstancePairCollator(32)([row(0, with_rectangles(made, (0,)) if as_masks else made)])


@pytest.mark.parametrize("as_masks", [False, True])
@pytest.mark.parametrize("overlap", ["mean", "covering"])
def test_weights_do_not_jump_where_the_crop_leaves_little(overlap, as_masks):
    """
    One column of 16 pixels, a quarter of each of 4 cells on a grid of 8 x 8, moves their weights by a quarter of what whole cells do, and
    those of the others by the common scale alone. So no rule says how much must be left.
    """
    nothing, sliver, cells = (weights(cut_by_the_crop(kept, as_masks), overlap)[0] for kept in (0, 1, 4))
    nothing, sliver, cells = (mask / mask[0, 7] for mask in (nothing, sliver, cells))  # without the scale
    changed = torch.zeros(8, 8, dtype=torch.bool)
    changed[2:6, 0] = True
    torch.testing.assert_close(nothing - sliver, (nothing - cells) / 4, atol=1e-6, rtol=1e-6)
    assert (nothing != cells).equal(changed)


@pytest.mark.parametrize("as_masks", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 4])
def test_grouped_what_is_left_of_an_instance_has_a_whole_term(kept, as_masks):
    """However little the crop leaves in both images, its weights have the mean 1, as those of every term; of nothing there is no term."""
    batch = cut_by_the_crop(kept, as_masks)
    regions = [
        instance_regions(batch[f"{name}_boxes"], batch["judged"], 8, 8, batch.get(f"{name}_masks")) for name in IMAGES
    ]
    terms = instance_terms(torch.cat(regions), batch["conflicts"])
    assert terms.exists.tolist() == [[kept > 0, True, False]]  # the other one is the whole rejected image
    assert terms.is_swapped.tolist() == [[True, False, False]]
    torch.testing.assert_close(regions[0][0, 0].sum(), torch.tensor(float(kept)))
    torch.testing.assert_close(terms.masks[:, 0].mean(dim=(1, 2)), torch.full((2,), float(kept > 0)))


# ---- Margins ----


def test_a_margin_by_hand():
    """A tenth of 20 and of 40 pixels on each side, as far as the image reaches; nothing is added to a box of zeros."""
    boxes = torch.tensor([[10, 20, 30, 60], [1, 50, 21, 90], [0, 0, 0, 0]])
    expected = torch.tensor([[8.0, 16.0, 32.0, 64.0], [0.0, 46.0, 23.0, 93.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(widen_boxes(boxes, 0.1, 50, 93), expected)


def test_a_margin_is_added_before_the_crop():
    """
    40 x 32 at 32 loses 4 columns on either side. [2, 8, 12, 24] with a margin of 0.2 is [0, 4.8, 14, 27.2], cropped [0, 4.8, 10, 27.2].
    A box that the crop cuts gets its margin of what it was before.
    """
    batch = InstancePairCollator(32, box_margin=0.2)([row(0, [boxed(chosen_box=[2.0, 8.0, 12.0, 24.0])])])
    torch.testing.assert_close(batch["chosen_boxes"][0, 0] * 32, torch.tensor([0.0, 4.8, 10.0, 27.2]))


def test_masks_have_no_margin():
    """A margin changes boxes alone, also where both kinds are in one row."""
    rows = [row(0, [instance(), boxed(chosen_box=[12.0, 8.0, 22.0, 24.0])])]
    plain, wide = InstancePairCollator(32)(rows), InstancePairCollator(32, box_margin=0.1)(rows)
    assert torch.equal(plain["chosen_masks"], wide["chosen_masks"])
    assert torch.equal(plain["chosen_boxes"][0, 0], wide["chosen_boxes"][0, 0])
    assert not torch.equal(plain["chosen_boxes"][0, 1], wide["chosen_boxes"][0, 1])


def test_a_collator_without_a_margin_is_the_one_that_had_none():
    """What is precomputed is found by the collator: without a margin it is hashed as before there was one, with one it is another."""
    plain, wide = InstancePairCollator(32), InstancePairCollator(32, box_margin=0.1)
    assert vars(plain)["box_margin"] == 0 and "box_margin" not in plain.__getstate__()
    assert pickle.loads(pickle.dumps(plain)) == plain and pickle.loads(pickle.dumps(wide)) == wide != plain
    hashes = {datasets.fingerprint.Hasher.hash(collator) for collator in (plain, wide, InstancePairCollator(32))}
    assert len(hashes) == 2


# ---- What rows are made of ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, in which files are trusted at once."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "TICK_NS", 0)
    monkeypatch.setattr(row_contents, "TICK_NS", 0)


def contents(data: Dataset) -> list[str]:
    return RowContents(data, IMAGES).of(np.arange(len(data))).to_pylist()


def many_rows() -> list[dict]:
    kinds = [[instance()], [boxed(), instance(preference="tie")], [boxed()], None, [instance(), boxed()]]
    rows = [row(number, instances) for number, instances in enumerate(kinds)]
    rows[3]["instances"] = []
    return rows


def with_mask_files(rows: list[dict], folder) -> list[dict]:
    """The same rows with paths of masks."""
    folder.mkdir(exist_ok=True)
    rows = copy.deepcopy(rows)
    for number, made in enumerate(rows):
        for place, found in enumerate(made["instances"]):
            for name in ("chosen_mask", "rejected_mask"):
                if found.get(name):
                    path = folder / f"{number}-{place}-{name}.png"
                    path.write_bytes(found[name]["bytes"])
                    os.utime(path, (1e9, 1e9))
                    found[name] = {"bytes": None, "path": str(path)}
    return rows


def mapped(data: Dataset, path) -> Dataset:
    """The same rows, memory-mapped: with paths where they have paths."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, data.features.arrow_schema) as writer:
        writer.write_table(data.data.table, max_chunksize=2)
    return Dataset.from_file(str(path))


def test_a_mask_is_what_its_file_holds(cache, tmp_path):
    """Rows are the same with masks in bytes and in files, in memory and on disk, in any order; all rows differ."""
    expected = contents(prepared(dataset_of(*many_rows())))
    in_files = dataset_of(*with_mask_files(many_rows(), tmp_path / "a"))
    assert len(set(expected)) == 5
    for data in (in_files, mapped(in_files, tmp_path / "b"), mapped(dataset_of(*many_rows()), tmp_path / "c")):
        for _ in range(2):  # the second time from what was kept
            assert contents(prepared(data)) == expected
        assert contents(prepared(data.select([4, 1, 1, 3]))) == [expected[at] for at in (4, 1, 1, 3)]
        assert contents(prepared(data.select(range(1, 4)))) == expected[1:4]


KINDS = [pa.string(), pa.large_string(), pa.string_view()]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_path_of_a_mask_may_be_a_text(cache, tmp_path, kind):
    """Rows whose masks are named by texts have the hashes of the rows that hold them."""
    rows = with_mask_files(many_rows(), tmp_path / "a")
    texts = [
        [
            {**found, **{name: (found.get(name) or {}).get("path") for name in row_contents.MASKS}}
            for found in row["instances"]
        ]
        for row in rows
    ]
    data = prepared(dataset_of(*rows))
    items = data.data.schema.field("instances").type.value_type
    fields = [field.with_type(kind) if field.name in row_contents.MASKS else field for field in items]
    instances = [
        [found | {"preference": ["chosen", "rejected", "tie"].index(found["preference"])} for found in row]
        for row in texts
    ]
    table = data.data.table.drop_columns("instances")
    table = table.append_column("instances", pa.array(instances, pa.list_(pa.struct(fields))))
    assert contents(Dataset(pa.table(table.replace_schema_metadata()))) == contents(data)


def test_another_encoding_of_a_transform_is_another_row(cache):
    """Where a transform of the user makes run-length encodings, they count."""
    masks = [disc(), disc(x=12)]
    data = Dataset.from_dict({"number": [0, 1, 0]}).with_transform(
        lambda batch: {
            "id": ["1"] * len(batch["number"]),
            **{name: [row()[name]] * len(batch["number"]) for name in IMAGES},
            "instances": [
                [boxed(chosen_mask=encode_rle(masks[at]) | {"bytes": None, "path": None})] for at in batch["number"]
            ],
        }
    )
    first, second, third = contents(data)
    assert first == third != second


@pytest.mark.parametrize("is_mapped", [False, True])
def test_another_mask_is_another_row(cache, tmp_path, is_mapped):
    """A changed file, of the same name and age, makes its row and no other one new."""
    data = dataset_of(*with_mask_files(many_rows(), tmp_path / "a"))
    data = prepared(mapped(data, tmp_path / "b") if is_mapped else data)
    before = contents(data)
    path = tmp_path / "a" / "1-1-rejected_mask.png"
    path.write_bytes(png(disc(x=12)))
    os.utime(path, (1e9, 1e9))
    after = contents(data)
    assert [a == b for a, b in zip(before, after)] == [True, False, True, True, True]


def test_masks_are_loaded_with_their_rows(cache, tmp_path):
    """A row is loaded with the bytes of its masks; a file that changed since it was looked at is refused."""
    data = prepared(dataset_of(*with_mask_files(many_rows(), tmp_path / "a")))
    found = RowContents(data, IMAGES)
    hashes = found.of(np.arange(5))
    loaded = found.load(range(5), hashes)
    assert loaded[4]["instances"][0]["chosen_mask"]["bytes"] == png(disc())
    assert loaded[2]["instances"][0]["chosen_mask"] is None
    (tmp_path / "a" / "0-0-chosen_mask.png").write_bytes(png(disc(x=12)))
    with pytest.raises(ValueError, match="The row with id 'row-0' changed while it was precomputed"):
        found.load(range(5), hashes)


def test_rows_of_a_transform_are_made_of_their_masks(cache, tmp_path):
    """Where a transform of the user gives paths of masks, another content of the file is another row."""
    rows = with_mask_files(many_rows(), tmp_path / "a")
    data = Dataset.from_dict({"number": list(range(5))}).with_transform(
        lambda batch: {name: [rows[at][name] for at in batch["number"]] for name in rows[0]}
    )
    before = contents(data)
    (tmp_path / "a" / "0-0-chosen_mask.png").write_bytes(png(disc(x=12)))
    assert [a == b for a, b in zip(before, contents(data))] == [False, True, True, True, True]


def test_decoding_of_rle_and_png_agree():
    """The two forms of one mask give one batch."""
    rle = instance(chosen_mask=encode_rle(disc()), rejected_mask=encode_rle(disc(x=30)))
    found, expected = InstancePairCollator(32)([row(0, [rle])]), InstancePairCollator(32)([row(0)])
    assert torch.equal(found["chosen_masks"], expected["chosen_masks"])
    assert np.array_equal(decode_rle(rle["chosen_mask"]), disc())


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=20),
        st.integers(),
        st.lists(st.integers(), max_size=3),
        st.dictionaries(
            st.sampled_from(["size", "counts", "bytes", "path", "x"]), st.one_of(st.binary(), st.integers())
        ),
        st.fixed_dictionaries(
            {"size": st.lists(st.integers(), max_size=3), "counts": st.lists(st.integers(), max_size=4)}
        ),
        st.fixed_dictionaries({"size": st.just([32, 40]), "counts": st.one_of(st.text(), st.binary(), st.integers())}),
    )
)
def test_whatever_a_stranger_gives_as_a_mask_is_one_line(mask):
    """Any value in the place of a mask is read, is none, or is a ValueError of one line that names its row."""
    try:
        InstancePairCollator(32)([row(0, [boxed(chosen_mask=mask)])])
    except ValueError as error:
        assert str(error).startswith("`instances[0].chosen_mask` of the row with id 'row-0' is not a mask: ")
        assert "\n" not in str(error) and len(str(error)) < 700
