# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Four pairs and four captioned images in the layouts that people have them in. Each function writes one layout into a folder and returns
what `--dataset_name` names."""

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from tests import tiny


IDS = ["001", "002", "003", "004"]
PROMPTS = ["a cat", 'a "dog", asleep', "None", "un café\nat night"]
FLAT = ["a cat", 'a "dog", asleep', "None", "un café"]  # for files that hold one caption
INSTANCE = {"label": "cat", "chosen_box": [0, 0, 4, 4], "rejected_box": [1, 1, 5, 5], "preference": "rejected"}
INSTANCES = [[INSTANCE], [], [INSTANCE], []]


def png(seed: int) -> bytes:
    """A small image: the chosen image of row `n` has the seed `n`, the rejected one `100 + n`."""
    buffer = io.BytesIO()
    tiny.image(seed, 8, 8).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_images(folder: Path, chosen: str = "{}_w.png", rejected: str = "{}_l.png") -> None:
    for number, row_id in enumerate(IDS):
        write(folder / chosen.format(row_id), png(number))
        write(folder / rejected.format(row_id), png(100 + number))


def rows(**columns: str) -> list[dict]:
    """Rows with the paths of the images, by default relative to the folder of the file; `columns` renames."""
    found = []
    for number, row_id in enumerate(IDS):
        row = {
            "id": row_id,
            "prompt": PROMPTS[number],
            "chosen": f"images/{row_id}_w.png",
            "rejected": f"images/{row_id}_l.png",
            "instances": INSTANCES[number],
        }
        found.append({columns.get(name, name): value for name, value in row.items()})
    return found


def lines(found: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in found)


def table(found: list[dict], separator: str = ",") -> str:
    """CSV: lists as JSON."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(found[0]), delimiter=separator)
    writer.writeheader()
    for row in found:
        writer.writerow({name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()})
    return buffer.getvalue()


# ----- one file -----


def jsonl(folder: Path) -> Path:
    write_images(folder / "images")
    return write(folder / "pairs.jsonl", lines(rows()))


def json_list(folder: Path) -> Path:
    write_images(folder / "images")
    return write(folder / "pairs.json", json.dumps(rows()))


def comma(folder: Path) -> Path:
    write_images(folder / "images")
    return write(folder / "pairs.csv", table(rows()))


def tab(folder: Path) -> Path:
    write_images(folder / "images")
    return write(folder / "pairs.tsv", table(rows(), "\t"))


def parquet_paths(folder: Path) -> Path:
    write_images(folder / "images")
    Dataset.from_list(rows()).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def parquet_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    found = [row | {"chosen": png(n), "rejected": png(100 + n)} for n, row in enumerate(rows())]
    Dataset.from_list(found).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def arrow(folder: Path) -> Path:
    write_images(folder / "images")
    found = Dataset.from_list(rows()).data.table
    with pa.OSFile(str(folder / "pairs.arrow"), "wb") as file, pa.ipc.new_file(file, found.schema) as writer:
        writer.write_table(found)
    return folder / "pairs.arrow"


def jsonl_gz(folder: Path) -> Path:
    write_images(folder / "images")
    return write(folder / "pairs.jsonl.gz", gzip.compress(lines(rows()).encode()))


def jsonl_zst(folder: Path) -> Path:
    write_images(folder / "images")
    with pa.output_stream(str(folder / "pairs.jsonl.zst"), compression="zstd") as file:
        file.write(lines(rows()).encode())
    return folder / "pairs.jsonl.zst"


def csv_gz(folder: Path) -> Path:
    write_images(folder / "images")
    return write(folder / "pairs.csv.gz", gzip.compress(table(rows()).encode()))


# ----- folders -----


def folder_of_jsonl(folder: Path) -> Path:
    jsonl(folder)
    return folder


def folder_of_splits(folder: Path) -> Path:
    """Each split in a folder, with its images."""
    for split in ("train", "test"):
        jsonl(folder / split)
    return folder


def folder_of_parquet(folder: Path) -> Path:
    parquet_images(folder)
    (folder / "pairs.parquet").rename(folder / "train-00000-of-00001.parquet")
    return folder


def image_folder(folder: Path, suffix: str, text: str) -> Path:
    write_images(folder / "images")
    write(folder / f"metadata.{suffix}", text)
    write(folder / ".DS_Store", "Mac")
    write(folder / "Thumbs.db", "Windows")
    write(folder / "__MACOSX" / "images" / "._001_w.png", "not an image")
    return folder


def image_folder_jsonl(folder: Path) -> Path:
    return image_folder(folder, "jsonl", lines(rows(chosen="chosen_file_name", rejected="rejected_file_name")))


def image_folder_csv(folder: Path) -> Path:
    return image_folder(folder, "csv", table(rows(chosen="chosen_file_name", rejected="rejected_file_name")))


def image_folder_plain_columns(folder: Path) -> Path:
    """The paths are in columns with the trainers' names."""
    return image_folder(folder, "jsonl", lines(rows()))


def image_folder_parquet(folder: Path) -> Path:
    image_folder_jsonl(folder)
    (folder / "metadata.jsonl").unlink()
    found = rows(chosen="chosen_file_name", rejected="rejected_file_name")
    Dataset.from_list(found).to_parquet(folder / "metadata.parquet")
    return folder


# ----- two folders -----


def two_folders(folder: Path, chosen: str = "w", rejected: str = "l") -> Path:
    write_images(folder, chosen + "/{}.png", rejected + "/{}.png")
    for row_id, prompt in zip(IDS, FLAT, strict=True):
        write(folder / chosen / f"{row_id}.txt", prompt + "\n")
    write(folder / chosen / ".DS_Store", "Mac")
    write(folder / rejected / "Thumbs.db", "Windows")
    write(folder / "__MACOSX" / chosen / "._001.png", "not an image")
    return folder


def two_folders_capitals(folder: Path) -> Path:
    return two_folders(folder, "Winner", "Loser")


def two_folders_captions_in_parent(folder: Path) -> Path:
    write_images(folder, "chosen/{}.png", "rejected/{}.png")
    for row_id, prompt in zip(IDS, FLAT, strict=True):
        write(folder / f"{row_id}.txt", prompt)
    return folder


def two_folders_captions_file(folder: Path) -> Path:
    write_images(folder, "chosen/{}.png", "rejected/{}.jpg")  # PNG data with another suffix
    write(folder / "captions.jsonl", lines([{"file_name": f"{i}.png", "caption": p} for i, p in zip(IDS, PROMPTS)]))
    return folder


def two_folders_splits(folder: Path) -> Path:
    for split in ("train", "test"):
        two_folders(folder / split)
    return folder


# ----- WebDataset -----


def tar(path: Path, samples: dict[str, dict[str, str | bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, fields in samples.items():
            for name, content in fields.items():
                content = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def tar_plain(folder: Path) -> Path:
    """`key.chosen.png`, `key.rejected.png`, `key.prompt.txt`."""
    samples = {
        i: {"chosen.png": png(n), "rejected.png": png(100 + n), "prompt.txt": PROMPTS[n]} for n, i in enumerate(IDS)
    }
    return tar(folder / "pairs.tar", samples)


def tar_json(folder: Path) -> Path:
    """The caption in `key.json`."""
    samples = {
        i: {
            "w.png": png(n),
            "l.png": png(100 + n),
            "json": json.dumps({"caption": PROMPTS[n], "meta": {"uid": f"u{n}"}}),
        }
        for n, i in enumerate(IDS)
    }
    return tar(folder / "pairs.tar", samples)


TAR_JSON_COLUMNS = {"prompt": "json.caption", "chosen": "w.png", "rejected": "l.png"}


def tar_pick_a_pic(folder: Path) -> Path:
    """Shards of `sayakpaul/pickapic_v2_webdataset`, whose keys begin at 0 in every shard. Row 3 is a tie."""
    for shard in range(2):
        samples = {}
        for place, number in enumerate((2 * shard, 2 * shard + 1)):
            first_is_chosen = number % 2 == 0
            samples[str(place)] = {
                "jpg_0.jpg": png(number if first_is_chosen else 100 + number),
                "jpg_1.jpg": png(100 + number if first_is_chosen else number),
                "label_0.txt": "0.5" if number == 3 else str(float(first_is_chosen)),
                "label_1.txt": "0.5" if number == 3 else str(float(not first_is_chosen)),
                "original_prompt.txt": PROMPTS[number],
            }
        tar(folder / f"{shard:05d}.tar", samples)
    return folder


def tar_folders_in_keys(folder: Path) -> Path:
    """`train/001.chosen.png`: keys with a folder."""
    samples = {
        f"train/{i}": {"chosen.png": png(n), "rejected.png": png(100 + n), "prompt.txt": PROMPTS[n]}
        for n, i in enumerate(IDS)
    }
    return tar(folder / "pairs.tar", samples)


def tar_braces(folder: Path) -> str:
    """`shard-{000..001}.tar`."""
    for shard in range(2):
        samples = {
            IDS[n]: {"chosen.png": png(n), "rejected.png": png(100 + n), "prompt.txt": PROMPTS[n]}
            for n in (2 * shard, 2 * shard + 1)
        }
        tar(folder / f"shard-{shard:03d}.tar", samples)
    return f"{folder}/shard-{{000..001}}.tar"


def tar_glob(folder: Path) -> str:
    tar_braces(folder)
    return f"{folder}/shard-*.tar"


def tar_splits(folder: Path) -> Path:
    for split in ("train", "test"):
        tar_plain(folder / split)
    return folder


def tar_gz(folder: Path) -> Path:
    plain = tar_plain(folder)
    write(folder / "pairs.tar.gz", gzip.compress(plain.read_bytes()))
    plain.unlink()
    return folder / "pairs.tar.gz"


def tar_images(folder: Path) -> Path:
    """Images with captions, the usual layout of `img2dataset`: `key.png`, `key.txt`, `key.json`."""
    samples = {
        i: {"png": png(n), "txt": PROMPTS[n], "json": json.dumps({"key": i, "width": 8})} for n, i in enumerate(IDS)
    }
    return tar(folder / "images.tar", samples)


# ----- images with captions -----


def captioned_images(folder: Path) -> Path:
    """`name.png` and `name.txt`."""
    for number, (row_id, prompt) in enumerate(zip(IDS, FLAT, strict=True)):
        write(folder / f"{row_id}.png", png(number))
        write(folder / f"{row_id}.txt", prompt)
    return folder


def captioned_images_with_repeats(folder: Path) -> Path:
    """`10_concept/name.png`, as kohya's scripts read them."""
    captioned_images(folder / "10_concept")
    return folder


# ----- public datasets -----


def pick_a_pic(folder: Path) -> Path:
    """The columns of Pick-a-Pic v1 and v2: row 2 prefers the second image, row 3 is a tie, row 4 (of 5) has no label."""
    labels = [1.0, 1.0, 0.0, 0.5, 1.0]
    found = []
    for number, label in enumerate(labels):
        images = [png(number), png(100 + number)][:: -1 if label == 0 else 1]
        found.append(
            {
                "are_different": label != 0.5,
                "best_image_uid": "tie" if label == 0.5 else f"u{number}",
                "caption": [*PROMPTS, "unlabelled"][number],
                "has_label": number != 4,
                "image_0_uid": f"u{number}" if label else f"v{number}",
                "image_0_url": "https://example.com/0.png",
                "image_1_uid": f"v{number}" if label else f"u{number}",
                "image_1_url": "https://example.com/1.png",
                "jpg_0": images[0],
                "jpg_1": images[1],
                "label_0": label,
                "label_1": 1 - label,
                "ranking_id": 1000 + number,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(found).to_parquet(folder / "train.parquet")
    return folder


def hpdv3(folder: Path) -> Path:
    """`train.json` of HPDv3: `path1` is preferred."""
    write_images(folder / "images")
    found = [
        row | {"confidence": None, "choice_dist": None, "model1": "a", "model2": "b"}
        for row in rows(chosen="path1", rejected="path2")
    ]
    for row in found:
        del row["id"], row["instances"]
    return write(folder / "train.json", json.dumps(found))


def hpdv2(folder: Path) -> Path:
    """`train.json` of HPDv2 beside `train/`: two paths and which of them is preferred."""
    write_images(folder / "train")
    found = []
    for number, row_id in enumerate(IDS):
        step = -1 if number % 2 else 1
        found.append(
            {
                "human_preference": [1, 0][::step],
                "prompt": PROMPTS[number],
                "file_path": [f"{row_id}_w.png", f"{row_id}_l.png"][::step],
                "user_hash": "x",
            }
        )
    return write(folder / "train.json", json.dumps(found))


def open_image_preferences(folder: Path) -> Path:
    """Parquet with `prompt`, `chosen` and `rejected`, and columns that are not read."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [
        {
            "prompt": row["prompt"],
            "chosen": {"bytes": png(n)},
            "rejected": {"bytes": png(100 + n)},
            "category": "Anime",
        }
        for n, row in enumerate(rows())
    ]
    Dataset.from_list(found).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder
