# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import logging
import os

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, Features, IterableDataset, Value

from tests.data import layouts
from tests.data.layouts import FLAT, IDS, INSTANCES, PROMPTS, png
from trl_diffusion.annotation.records import image_columns, pair_columns, prepare_rows, read_attribute_image, read_pair
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.formats import prepare_dataset
from trl_diffusion.data.images import image_content
from trl_diffusion.data.sources import load_source
from trl_diffusion.scripts.dataset_arguments import DatasetArguments
from trl_diffusion.scripts.utils import get_datasets


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def load(name, streaming=False, columns=None, split="train", images=("chosen", "rejected")):
    """The rows as a trainer gets them."""
    args = DatasetArguments(
        dataset_name=str(name), dataset_streaming=streaming, columns=columns, dataset_train_split=split
    )
    dataset, _ = get_datasets(args, evaluates=False)
    return prepare_dataset(dataset, "train_dataset", ("prompt", *images), images)


def contents(dataset, images=("chosen", "rejected")):
    return [(str(row["id"]), row["prompt"], *(image_content(row[name]) for name in images)) for row in dataset]


def pairs(ids=IDS, prompts=PROMPTS):
    return [
        (row_id, prompt, png(n), png(100 + n)) for n, (row_id, prompt) in enumerate(zip(ids, prompts, strict=False))
    ]


ROWS = ["jsonl", "json_list", "comma", "tab", "parquet_paths", "parquet_images", "arrow", "jsonl_gz", "jsonl_zst"]
ROWS += [
    "csv_gz",
    "folder_of_jsonl",
    "folder_of_splits",
    "folder_of_parquet",
    "image_folder_jsonl",
    "image_folder_csv",
]
ROWS += ["image_folder_plain_columns", "image_folder_parquet"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", ROWS)
def test_files_of_rows(tmp_path, layout, streaming):
    """Every format gives the same rows: ids and prompts as written, the bytes of the images, the instances."""
    dataset = load(getattr(layouts, layout)(tmp_path / "data"), streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert contents(dataset) == pairs()
    assert [row["instances"] for row in dataset] == INSTANCES


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
@pytest.mark.parametrize("layout", ["comma", "tab", "json_list", "parquet_images", "arrow", "tar_plain"])
def test_packed_files(tmp_path, layout, packing):
    """Each format is read packed as well."""
    path = getattr(layouts, layout)(tmp_path / "data")
    packed = path.with_name(path.name + {"gzip": ".gz", "zstd": ".zst"}[packing])
    with pa.output_stream(str(packed), compression=packing) as file:
        file.write(path.read_bytes())
    path.unlink()
    prefix = "pairs/" if layout == "tar_plain" else ""
    assert contents(load(packed)) == pairs(ids=[prefix + row_id for row_id in IDS])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("layout", "prompts"),
    [
        ("two_folders", FLAT),
        ("two_folders_capitals", FLAT),
        ("two_folders_captions_in_parent", FLAT),
        ("two_folders_captions_file", PROMPTS),
        ("two_folders_splits", FLAT),
    ],
)
def test_pairs_in_two_folders(tmp_path, layout, prompts, streaming):
    """Images of one name are a pair, the name is the id, and hidden files are no images."""
    assert contents(load(getattr(layouts, layout)(tmp_path / "data"), streaming)) == pairs(prompts=prompts)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("layout", "columns", "prefixes"),
    [
        ("tar_plain", None, ["pairs/"] * 4),
        ("tar_json", layouts.TAR_JSON_COLUMNS, ["pairs/"] * 4),
        ("tar_folders_in_keys", None, ["pairs/train/"] * 4),
        ("tar_braces", None, ["shard-000/"] * 2 + ["shard-001/"] * 2),
        ("tar_glob", None, ["shard-000/"] * 2 + ["shard-001/"] * 2),
        ("tar_splits", None, ["pairs/"] * 4),
        ("tar_gz", None, ["pairs/"] * 4),
    ],
)
def test_webdatasets(tmp_path, layout, columns, prefixes, streaming):
    """The id is the archive and the key, and `--columns` names fields of JSON with a dot."""
    dataset = load(getattr(layouts, layout)(tmp_path / "data"), streaming, columns)
    assert contents(dataset) == pairs(ids=[prefix + row_id for prefix, row_id in zip(prefixes, IDS, strict=True)])
    assert not {"__key__", "__url__"} & set(next(iter(dataset)))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_webdataset_of_pick_a_pic(tmp_path, streaming):
    """Labels are texts, keys begin anew in every archive, and the tie is left out."""
    dataset = load(layouts.tar_pick_a_pic(tmp_path / "data"), streaming)
    assert contents(dataset) == pairs(ids=["00000/0", "00000/1", "00001/0"])


@pytest.mark.parametrize("streaming", [False, True])
def test_the_way_out_of_ambiguous_files(tmp_path, streaming):
    """The flag that the message proposes is accepted as it stands."""
    samples = {
        str(n): {"w.png": png(n), "l.png": png(100 + n), "caption.txt": PROMPTS[n], "text.txt": "x"} for n in range(4)
    }
    path = layouts.tar(tmp_path / "a.tar", samples)
    with pytest.raises(ValueError, match="`prompt` may be any of the columns `caption.txt`, `text.txt`") as error:
        load(path, streaming)
    columns = str(error.value).split("--columns '")[1].split("'`")[0]
    assert contents(load(path, streaming, columns)) == pairs(ids=["a/0", "a/1", "a/2", "a/3"])


@pytest.mark.parametrize("streaming", [False, True])
def test_deep_fields(tmp_path, streaming):
    """Several dots go down several levels, also for the id."""
    samples = {
        str(n): {"w.png": png(n), "l.png": png(100 + n), "json": json.dumps({"a": {"b": PROMPTS[n]}, "uid": 7 + n})}
        for n in range(4)
    }
    columns = '{"prompt": "json.a.b", "id": "json.uid", "chosen": "w.png", "rejected": "l.png"}'
    dataset = load(layouts.tar(tmp_path / "a.tar", samples), streaming, columns)
    assert contents(dataset) == pairs(ids=["7", "8", "9", "10"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("layout", "ids", "prompts"),
    [
        ("captioned_images", IDS, FLAT),
        ("captioned_images_with_repeats", [f"10_concept/{row_id}" for row_id in IDS], FLAT),
        ("tar_images", [f"images/{row_id}" for row_id in IDS], PROMPTS),
    ],
)
def test_images_with_captions(tmp_path, layout, ids, prompts, streaming):
    """Single images, for the annotation of attributes: both readers find them."""
    name = getattr(layouts, layout)(tmp_path / "data")
    expected = [(row_id, prompt, png(n)) for n, (row_id, prompt) in enumerate(zip(ids, prompts, strict=True))]
    assert contents(load(name, streaming, images=("image",)), ("image",)) == expected
    rows, columns = prepare_rows(load_source(str(name), streaming=streaming)["train"], image_columns)
    records = [read_attribute_image(row, columns) for row in rows]
    assert [(record.id, record.prompt, record.image.data) for record in records] == expected


def test_repeats_are_said_not_to_be_read(tmp_path, caplog):
    load_source(str(layouts.captioned_images_with_repeats(tmp_path / "data")))
    assert "The number of repeats in the names of folders (10_concept) is not read" in caplog.text


@pytest.mark.parametrize(
    ("layout", "messages"),
    [
        ("pick_a_pic", ["Read as Pick-a-Pic: 3 pairs. Left out: 1 ties and 1 rows without a label."]),
        (
            "tar_pick_a_pic",
            ["Read as Pick-a-Pic as WebDataset: 3 pairs. Left out: 1 ties and 0 rows without a label."],
        ),
        ("hpdv3", ["Read as HPDv3."]),
        (
            "hpdv2",
            [
                "Read as HPDv2: `file_path` and `human_preference` as two images and a label.",
                "Read as pairs with a label: 4 pairs. Left out: 0 ties and 0 rows without a label.",
            ],
        ),
    ],
)
def test_public_layouts(tmp_path, layout, messages, caplog):
    """The layouts are recognised, said in one line, and give the right image of each pair."""
    with caplog.at_level(logging.WARNING):
        dataset = load(getattr(layouts, layout)(tmp_path / "data"))
    assert caplog.messages == messages
    found = contents(dataset)
    assert [row[1:] for row in found] == [row[1:] for row in pairs()][: len(found)]
    assert InstancePairCollator(8)(list(dataset))["chosen_pixel_values"].shape == (len(found), 3, 8, 8)


@pytest.mark.parametrize(
    ("layout", "ids"),
    [("hpdv3", "images/{0}_w images/{0}_l"), ("hpdv2", "{0}_w {0}_l"), ("hpdv3_parquet", "images/{0}_w images/{0}_l")],
)
def test_streams_of_paths_have_ids(tmp_path, layout, ids):
    """Without a column `id`, the paths of the images are the id, in the order of the columns."""
    path = getattr(layouts, layout.removesuffix("_parquet"))(tmp_path / "data")
    if layout.endswith("parquet"):
        Dataset.from_json(str(path)).to_parquet(path.with_suffix(".parquet"))
        path = path.with_suffix(".parquet")
    found = contents(load(path, streaming=True))
    assert [row[1:] for row in found] == [row[1:] for row in pairs()]
    assert [set(row[0].split()) for row in found] == [set(ids.format(row_id).split()) for row_id in IDS]


def test_open_image_preferences(tmp_path):
    """These have the trainers' columns: rows are numbered, and other columns do no harm."""
    assert contents(load(layouts.open_image_preferences(tmp_path / "data"))) == pairs(ids=["0", "1", "2", "3"])


@pytest.mark.parametrize("layout", ["pick_a_pic", "tar_pick_a_pic", "hpdv3", "hpdv2", "two_folders", "tar_plain"])
def test_annotation_reads_the_same_pairs(tmp_path, layout):
    """The annotation of a source has the pairs that training has, with ties and unlabelled rows rejected."""
    name = getattr(layouts, layout)(tmp_path / "data")
    rows, columns = prepare_rows(load_source(str(name))["train"], pair_columns)
    records = [read_pair(row, columns) for row in rows]
    read = [(r.id, r.prompt, r.chosen.data, r.rejected.data) for r in records if r.status == "ok"]
    assert read == contents(load(name))
    rejected = [record.reason for record in records if record.status != "ok"]
    assert rejected == {
        "pick_a_pic": ["tie: neither image is better", "the pair has no label: has_label is false"],
        "tar_pick_a_pic": ["tie: neither image is better"],
    }.get(layout, [])


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote(tmp_path, streaming):
    """Also as a stream."""
    Dataset.from_list(
        [{"id": i, "prompt": p, "chosen": w, "rejected": l} for i, p, w, l in pairs()]  # noqa: E741
    ).save_to_disk(tmp_path / "data")
    dataset = load(tmp_path / "data", streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset) and contents(dataset) == pairs()


def test_names_with_glob_characters(tmp_path):
    """A folder may be called `a [1] {b}`."""
    path = layouts.jsonl(tmp_path / "a [1] {b}")
    assert contents(load(path)) == contents(load(path.parent)) == pairs()


def test_csv_of_other_programs(tmp_path):
    """A byte order mark, semicolons, Windows line ends and backslashes, and lists as Python writes them."""
    layouts.write_images(tmp_path / "images")
    text = (
        layouts.table(layouts.rows(), ";").replace("images/", "images\\").replace("\r\n", "\n").replace("\n", "\r\n")
    )
    path = layouts.write(tmp_path / "a.csv", b"\xef\xbb\xbf" + text.encode())
    found = contents(load(path))
    assert [row[:1] + row[2:] for row in found] == [row[:1] + row[2:] for row in pairs()]
    row = f'001,a,images/001_w.png,images/001_l.png,"{INSTANCES[0]}"'
    path = layouts.write(tmp_path / "b.csv", f"id,prompt,chosen,rejected,instances\n{row}\n")
    assert next(iter(load(path)))["instances"] == INSTANCES[0]


def test_the_names_of_images_tell_no_split(tmp_path):
    """Images called `test_...` do not make a dataset a test split."""
    folder = layouts.image_folder_jsonl(tmp_path / "data")
    for path in list((folder / "images").iterdir()):
        path.rename(path.with_name(f"test_{path.name}"))
    text = (folder / "metadata.jsonl").read_text().replace("images/", "images/test_")
    (folder / "metadata.jsonl").write_text(text)
    assert contents(load(folder)) == pairs()


def test_splits_of_shards(tmp_path):
    """`validation_unique-00000-of-00001.parquet` is the split `validation_unique`, as `datasets` names it."""
    folder = layouts.folder_of_parquet(tmp_path / "data")
    name = "validation_unique-00000-of-00001-33ead111845fc9c4.parquet"  # as in Pick-a-Pic
    (folder / "train-00000-of-00001.parquet").rename(folder / name)
    assert contents(load(folder, split="validation_unique")) == pairs()


def test_relative_paths_of_several_folders(tmp_path):
    """Paths are relative to the folder of their own file."""
    for name in "ab":
        layouts.jsonl(tmp_path / "data" / name)
    assert contents(load(tmp_path / "data")) == pairs() * 2


def test_unmatched_images_are_counted(tmp_path, caplog):
    folder = layouts.two_folders(tmp_path / "data")
    (folder / "l" / "002.png").unlink()
    layouts.write(folder / "l" / "009.png", png(9))
    assert contents(load(folder)) == [row for row in pairs(prompts=FLAT) if row[0] != "002"]
    assert "2 images of data have no image of the same name in the other folder and are left out: w/002, l/009." in (
        caplog.messages
    )


def test_a_file_of_captions_may_hold_instances(tmp_path):
    """What the file says besides the caption is kept."""
    layouts.write_images(tmp_path, "w/{}.png", "l/{}.png")
    found = [
        {"file_name": f"w/{i}.png", "text": p, "instances": n} for i, p, n in zip(IDS, PROMPTS, INSTANCES, strict=True)
    ]
    layouts.write(tmp_path / "metadata.jsonl", layouts.lines(found))
    dataset = load(tmp_path)
    assert contents(dataset) == pairs() and [row["instances"] for row in dataset] == INSTANCES


def test_metadata_that_names_both_images(tmp_path):
    """If metadata.jsonl names both images, it is the table, and not a file of captions."""
    layouts.write_images(tmp_path, "chosen/{}.png", "rejected/{}.png")
    found = [
        {"chosen_file_name": f"chosen/{i}.png", "rejected_file_name": f"rejected/{i}.png", "id": f"x{i}", "prompt": p}
        for i, p in zip(IDS, PROMPTS, strict=True)
    ]
    layouts.write(tmp_path / "metadata.jsonl", layouts.lines(found))
    assert contents(load(tmp_path)) == pairs(ids=[f"x{i}" for i in IDS])


# ----- what cannot be read -----


def without(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def rename_rejected(folder):
    for path in list((folder / "l").glob("*.png")):
        path.rename(path.with_name(f"x{path.name}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_rejected, "No image in .*/w has the name of one in .*/l: 001, 002, 003 and 1 more and x001"),
        (lambda folder: layouts.write(folder / "w/001.jpg", png(0)), "001.jpg and .*001.png have one name"),
        (without("w/002.txt"), "1 of the 4 images in .* have no caption: 002. Write the caption"),
        (lambda folder: layouts.write(folder / "l/002.txt", "x"), "The captions of 002 in .* differ: .* and 'x'"),
        (lambda folder: os.mkdir(folder / "winner"), "has w and winner: one folder of chosen images is read"),
    ],
)
def test_two_folders_that_are_refused(tmp_path, change, message):
    folder = layouts.two_folders(tmp_path / "data")
    change(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


LINE = json.dumps(layouts.rows()[0]) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", "x", "a.xlsx cannot be read as a dataset: its name must end in one of .parquet, .jsonl"),
        ("a.jsonl", "", "a.jsonl cannot be read: it is empty"),
        ("a.jsonl", LINE + "{broken\n", "a.jsonl cannot be read: JSON parse error"),
        ("a.csv", "id,prompt,chosen,rejected\n", "a.csv cannot be read: it has no rows"),
        ("a.parquet", "x", "a.parquet cannot be read: Parquet file size"),
        ("a.tar", "x", "a.tar cannot be read: truncated header"),
        ("a.jsonl.gz", "x", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", "x", "a.jsonl.zst cannot be read: ZSTD"),
        ("a.jsonl", LINE, "1 of the 1 images in the column `chosen` of .*a.jsonl are missing: images/001_w.png"),
        (
            "a.csv",
            "id,instances\n001,yes\n",
            "`instances` in row 0 of .*a.csv, counted from 0, is a text that is no JSON",
        ),
        ("a.csv", "id,instances\n001,\"['a' 1]\"\n", "`instances` in row 0 .* no JSON list"),
        ("test.json", '[{"prompt": "a", "image_path": ["a.png"], "rank": [1]}]', "ranked lists of HPDv2"),
        ("a.json", '[{"prompt": "", "file_path": ["a", "b", "c"], "human_preference": [1, 0, 0]}]', "3 images and 3"),
    ],
)
def test_files_that_are_refused(tmp_path, name, content, message):
    """The message names the file."""
    with pytest.raises(ValueError, match=message):
        load(layouts.write(tmp_path / name, content))


def test_a_missing_image_of_a_stream(tmp_path):
    """It is named when its row is read, at the latest."""
    path = layouts.jsonl(tmp_path / "data")
    (tmp_path / "data/images/002_l.png").unlink()
    with pytest.raises(ValueError, match="`rejected` of .*pairs.jsonl are missing: images/002_l.png"):
        list(load(path, streaming=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope.jsonl", "There is no file or folder nope.jsonl"),
        ("./nope", "There is no file or folder ./nope"),
        ("nope/nope/nope", "There is no file or folder nope/nope/nope"),
        ("nope-*.tar", "There is no file .*nope-"),
        ("nope-{0..1}.tar", "There is no file nope-0.tar, which nope-{0..1}.tar names"),
        ("", "`--dataset_name` is missing"),
    ],
)
def test_names_of_nothing(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(name)


def test_folders_that_are_refused(tmp_path):
    """The message says what is there."""
    with pytest.raises(ValueError, match="holds nothing that can be read as a dataset: it has no files"):
        load(tmp_path)
    layouts.write(tmp_path / "a.xyz", "x")
    with pytest.raises(ValueError, match="holds nothing that can be read as a dataset: 1 files with .xyz"):
        load(tmp_path)
    folder = layouts.folder_of_jsonl(tmp_path / "data")
    layouts.write(folder / "stats.json", "{}")
    with pytest.raises(ValueError, match="files of several formats: pairs.jsonl, stats.json. Name the file"):
        load(folder)
    layouts.write_images(tmp_path / "images")
    with pytest.raises(ValueError, match="8 of the 8 images in .*images have no caption: 001_l, 001_w"):
        load(tmp_path / "images")


def test_files_whose_name_tells_no_split_are_said(tmp_path, caplog):
    folder = layouts.folder_of_jsonl(tmp_path / "data")
    layouts.write(folder / "test.jsonl", (folder / "pairs.jsonl").read_text())
    assert contents(load(folder, split="test")) == pairs()
    assert "The names of 1 files in data tell no split, and they are not read: pairs.jsonl." in caplog.messages


# ----- --columns -----


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("{", "`--columns` is not valid JSON"),
        ("[1]", "`--columns` must be a JSON object"),
        ({"promt": "text"}, "`--columns` names promt; it may name id, prompt"),
        ({"id": "uid"}, "`--columns` names `uid`, which the dataset lacks; it has `key`, `text`"),
        ({"prompt": "text", "id": "text"}, "`--columns` names the column `text` twice"),
        ({"image_0": "winner", "image_1": "loser"}, "so it must name label_0"),
        ({"prompt": "instances.label"}, "which the dataset lacks|has no field"),
    ],
)
def test_columns_that_are_refused(tmp_path, columns, message):
    layouts.write_images(tmp_path / "images")
    found = layouts.rows(id="key", prompt="text", chosen="winner", rejected="loser")
    path = layouts.write(tmp_path / "pairs.jsonl", layouts.lines(found))
    with pytest.raises(ValueError, match=message):
        load(path, columns=columns)


def test_columns_name_other_columns(tmp_path):
    """As JSON and as the dictionary of a YAML file; columns that have our names already are kept."""
    layouts.write_images(tmp_path / "images")
    found = layouts.rows(id="key", prompt="text", chosen="winner", rejected="loser")
    path = layouts.write(tmp_path / "pairs.jsonl", layouts.lines(found))
    columns = {"id": "key", "prompt": "text", "chosen": "winner", "rejected": "loser"}
    for given in (columns, json.dumps(columns)):
        dataset = load(path, columns=given)
        assert contents(dataset) == pairs() and [row["instances"] for row in dataset] == INSTANCES


def test_columns_name_a_label(tmp_path):
    """`image_0`, `image_1` and `label_0` give chosen and rejected images."""
    found = [
        {"q": PROMPTS[0], "a": png(0), "b": png(100), "better": 1},
        {"q": PROMPTS[1], "a": png(101), "b": png(1), "better": 0},
    ]
    Dataset.from_list(found).to_parquet(tmp_path / "a.parquet")
    columns = {"prompt": "q", "image_0": "a", "image_1": "b", "label_0": "better"}
    assert contents(load(tmp_path / "a.parquet", columns=columns)) == pairs(ids=["0", "1"])


def test_csv_keeps_every_text(tmp_path):
    """An id of digits and a prompt such as NA or nothing stay texts."""
    path = layouts.write(tmp_path / "a.csv", "id,prompt\n01,NA\n02,\n03,1e5\n")
    dataset = load_source(str(path))["train"]
    assert dataset.features == Features({"id": Value("string"), "prompt": Value("string")})
    assert dataset["prompt"][:] == ["NA", "", "1e5"] and dataset["id"][:] == ["01", "02", "03"]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_may_hold_names_of_files(tmp_path, streaming):
    """A file name in a column that is not read, such as an uid, need not exist."""
    layouts.write_images(tmp_path / "images")
    found = [row | {"chosen_uid": "0.png", "instances": json.dumps(row["instances"])} for row in layouts.rows()]
    dataset = load(layouts.write(tmp_path / "a.jsonl", layouts.lines(found)), streaming)
    assert contents(dataset) == pairs() and [row["instances"] for row in dataset] == INSTANCES
    assert {row["chosen_uid"] for row in dataset} == {"0.png"}


def test_a_changed_image_changes_the_fingerprint(tmp_path):
    """Latents that were computed from other images are not used again."""
    paths = [layouts.jsonl(tmp_path / "rows"), layouts.two_folders(tmp_path / "folders")]
    before = [load(path)._fingerprint for path in paths]
    assert [load(path)._fingerprint for path in paths] == before
    layouts.write(tmp_path / "rows/images/002_w.png", png(50))
    layouts.write(tmp_path / "folders/w/002.png", png(50))
    assert not set(before) & {load(path)._fingerprint for path in paths}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "jsonl.zst"])
def test_rows_that_changed_are_read_again(tmp_path, ending):
    """Other rows in a file of the same name, size and time are not those in the cache of `datasets`."""
    path = tmp_path / f"rows.{ending}"

    def write(prompt: str) -> None:
        rows = Dataset.from_list([{"prompt": prompt}])
        if ending == "csv":
            rows.to_csv(path)
        elif ending == "parquet":
            rows.to_parquet(path)
        else:
            with pa.output_stream(str(path), compression="zstd" if ending.endswith("zst") else None) as file:
                file.write(json.dumps({"prompt": prompt}).encode() + b"\n")

    write("a cat")
    times = path.stat()
    assert load_source(str(path))["train"]["prompt"] == ["a cat"]
    write("a dog")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert load_source(str(path))["train"]["prompt"] == ["a dog"]
