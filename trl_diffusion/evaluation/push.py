# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Pushes an evaluation to the Hub as a dataset: a row for each image with its scores, the tables and plots, and a card."""

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, Image, SplitDict, SplitInfo, Value
from huggingface_hub import HfApi

from ..checksums import read_table
from ..data.pictures import upright_image
from ..files import only_run
from ..hub import check_repository_name, create_repository, list_files, push_files, pushing
from ..hub_datasets import stale_files
from ..machine import all_without_places, public_name, without_places
from .dataset_card import DISPUTED, DISTRIBUTIONS_TITLE, SPLIT, WIN_RATES_TITLE, disputed_images, evaluation_card
from .kept_images import is_changed
from .plots import DISTRIBUTIONS, WIN_RATES
from .report import LATEX, REPORT, SUMMARY, write_report
from .scores import IMAGES_SCHEMA, SCORES, changed_images, metrics_of


DATA = "data"
SHARD_BYTES = 500_000_000  # of the images in a file
ROW_GROUP = 100
METADATA = ("exif", "xmp", "comment", "photoshop", "XML:com.adobe.xmp")  # entries that Pillow reads from image files


def push_evaluation(
    output_dir: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Pushes an evaluation to the Hub as a dataset, in one commit that also deletes the tables of an earlier one. Nothing is sampled
    or scored.

    The dataset has a row for each image: `model`, `prompt_id`, `prompt`, `group`, `index`, `image`, and a column for each metric.
    `summary.json`, `report.md`, `tables.tex`, the plots and a card with the tables and the images that are most disputed come with
    it. The gallery does not: the Hub shows no HTML pages of a dataset. Of paths, only the last part is published.

    Args:
        output_dir (`str` or `Path`):
            Folder of the evaluation.
        repo_id (`str`):
            Repository, `"user/name"`, or `"name"` for one of the token's user.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to what its owner has set.
        revision (`str`, *optional*):
            Branch to push to. It is created if there is none.
        token (`str`, *optional*):
            A token with the right to write. Defaults to that of `hf auth login` or HF_TOKEN.

    Returns:
        `str`: the address of the dataset.

    Raises:
        `ValueError`: If the folder holds no complete evaluation, an image is missing, or the push fails.
    """
    check_repository_name(repo_id, "`repo_id`")
    output_dir = Path(output_dir)
    table, summary = read_evaluation(output_dir)
    names = image_names(table)
    summary = public_summary(summary, names, output_dir)
    with only_run(output_dir, "writing"), TemporaryDirectory(dir=output_dir, prefix=".push-") as scratch:
        folder = Path(scratch)
        info = write_images(table, names, output_dir, folder / DATA)
        pictures = plots_of(table, summary, output_dir)
        write_report(summary, folder, pictures)
        files = {name: output_dir / name for name in pictures.values()}
        files |= {name: folder / name for name in (SUMMARY, REPORT, LATEX)}
        files |= {f"{DATA}/{path.name}": path for path in sorted((folder / DATA).iterdir())}
        disputed, picture = disputed_images(table, output_dir)
        files |= {DISPUTED: picture} if picture else {}
        with pushing(f"The evaluation is saved in {output_dir}.", token):
            repo_id = create_repository(repo_id, "dataset", private, revision, token)
            card = evaluation_card(summary, info, repo_id, revision, pictures, disputed)
            files["README.md"] = str(card).encode()
            present = list_files(repo_id, revision, token, "dataset")
            push_files(
                files,
                repo_id,
                commit_message="Upload evaluation",
                repo_type="dataset",
                revision=revision,
                token=token,
                delete=stale_files(present, files, repo_id, {DATA, DISTRIBUTIONS, WIN_RATES, DISPUTED}),
            )
    return f"{HfApi().endpoint}/datasets/{repo_id}" + (f"/tree/{revision}" if revision else "")


# ----- what the evaluation wrote -----


def read_evaluation(output_dir: Path) -> tuple[pa.Table, dict[str, Any]]:
    """
    Reads the scores of an evaluation, and their summary.

    Args:
        output_dir (`Path`):
            Folder of the evaluation.

    Returns:
        `tuple[pyarrow.Table, dict]`: see [`evaluation.scores.score_models`] and [`evaluation.report.summarize`].

    Raises:
        `ValueError`: If there is none, or it was stopped between the two.
    """
    again = "Repeat the command that wrote it: images and scores that are there are kept."
    for name in (SCORES, SUMMARY):
        if not (output_dir / name).is_file():
            raise ValueError(
                f"{output_dir} holds no complete evaluation, because it has no {name}. Pass the `--output_dir` of `trl-diffusion "
                f"evaluate`. {again}"
            )
    try:
        table = read_table(output_dir / SCORES)
        summary = json.loads((output_dir / SUMMARY).read_text(encoding="utf-8"))
        counted = Counter(table["model"].to_pylist())
        changed = changed_images(table, output_dir)
        agrees = summary["models"] == counted and metrics_of(table).keys() <= summary["metrics"].keys()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"The evaluation in {output_dir} cannot be read: {error} {again}") from error
    if not agrees:
        raise ValueError(f"{SUMMARY} and {SCORES} in {output_dir} are not of the same evaluation. {again}")
    if changed or is_changed(output_dir / SUMMARY):
        what = f"{', '.join(changed[:5])}{' and others' if len(changed) > 5 else ''}" if changed else SUMMARY
        raise ValueError(f"The evaluation in {output_dir} is not as it was written: {what} has changed since. {again}")
    return table, summary


def image_names(table: pa.Table) -> dict[str, str]:
    """What each image is called where it is published, by its file relative to the folder of the evaluation."""
    return {
        row["image"]: f"{row['model']}/{row['prompt_id']}_{row['index']}{Path(row['image']).suffix}"
        for row in table.select(IMAGES_SCHEMA.names).to_pylist()
    }


def public_summary(summary: dict[str, Any], names: dict[str, str], output_dir: Path) -> dict[str, Any]:
    """A summary without paths and addresses of the machine. Prompts and groups are not touched."""

    def public_score(score: dict[str, Any]) -> dict[str, Any]:
        errors = [
            {
                "image": names.get(error["image"], Path(error["image"]).name),
                "reason": without_places(error["reason"], (output_dir,)),
            }
            for error in score.get("errors", [])
        ]
        return score | ({"errors": errors} if "errors" in score else {})

    def public_scores(of_models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            model: {name: public_score(score) for name, score in scores.items()} for model, scores in of_models.items()
        }

    def public_weights(weights: dict[str, str]) -> dict[str, str]:
        named = {public_name(name): revision for name, revision in weights.items()}
        return all_without_places(named, (output_dir,))

    return summary | {
        "metrics": {
            name: metric | {"weights": public_weights(metric["weights"])}
            for name, metric in summary["metrics"].items()
        },
        "scores": public_scores(summary["scores"]),
        "groups": {group: public_scores(scores) for group, scores in summary["groups"].items()},
        "settings": all_without_places(summary["settings"], (output_dir,)),
    }


def plots_of(table: pa.Table, summary: dict[str, Any], output_dir: Path) -> dict[str, str]:
    """The plots of this evaluation, by title."""
    plots = {DISTRIBUTIONS_TITLE: DISTRIBUTIONS} if metrics_of(table) else {}
    if plots and summary["win_rates"]:
        plots[WIN_RATES_TITLE.format(summary["baseline"])] = WIN_RATES
    return {title: file for title, file in plots.items() if (output_dir / file).is_file()}


# ----- the images -----


def write_images(table: pa.Table, names: dict[str, str], output_dir: Path, folder: Path) -> DatasetInfo:
    """
    Writes images and scores as Parquet files: the same evaluation gives the same files.

    Args:
        table (`pyarrow.Table`):
            Scores from [`evaluation.scores.score_models`].
        names (`dict[str, str]`):
            What each image is called.
        output_dir (`Path`):
            Folder of the evaluation.
        folder (`Path`):
            New folder for the files.

    Returns:
        [`~datasets.DatasetInfo`]: columns and the split.

    Raises:
        `ValueError`: If an image is missing.
    """
    columns = {name: Value("int64" if name == "index" else "string") for name in IMAGES_SCHEMA.names}
    scores = {name: Value("float64") for name in metrics_of(table)}
    features = Features(columns | {"image": Image()} | scores)
    files = table["image"].to_pylist()
    try:
        sizes = [(output_dir / file).stat().st_size for file in files]
    except OSError as error:
        raise ValueError(
            f"The image {error.filename} of the evaluation is missing. Repeat the command that wrote it: images and scores that "
            "are there are kept."
        ) from error
    shards = list(cut(sizes, SHARD_BYTES))
    folder.mkdir()
    num_bytes = 0
    for number, (start, stop) in enumerate(shards):
        path = folder / f"{SPLIT}-{number:05d}-of-{len(shards):05d}.parquet"
        with pq.ParquetWriter(path, features.arrow_schema) as writer:
            for first in range(start, stop, ROW_GROUP):
                rows = table.slice(first, min(ROW_GROUP, stop - first)).to_pylist()
                for row in rows:
                    name = Path(names[row["image"]]).name
                    row["image"] = image_without_metadata(output_dir / row["image"], name)
                part = pa.Table.from_pylist(rows, schema=features.arrow_schema)
                writer.write_table(part)
                num_bytes += part.nbytes
    info = DatasetInfo(features=features, splits=SplitDict())
    info.splits.add(SplitInfo(SPLIT, num_bytes=num_bytes, num_examples=table.num_rows))
    info.download_size = sum(path.stat().st_size for path in folder.iterdir())
    info.dataset_size = num_bytes
    return info


def cut(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Cuts a list into ranges whose sizes add up to at most `most`, or that are one item."""
    ends = [0]
    total = 0
    for place, size in enumerate(sizes):
        if total and total + size > most:
            ends.append(place)
            total = 0
        total += size
    return itertools.pairwise([*ends, len(sizes)])


def image_without_metadata(path: Path, name: str) -> dict[str, bytes | str]:
    """
    An image as a dataset stores it: the bytes of its file. Where these hold more than pixels, as a camera and some programs write
    it (the place, the owner, folders), it is the same upright pixels as a PNG.
    """
    with PIL.Image.open(path) as image:
        image.load()
        if not any(key in METADATA or isinstance(value, str) for key, value in image.info.items()):
            return {"bytes": path.read_bytes(), "path": name}
        buffer = io.BytesIO()
        pixels = upright_image(image).copy()
        pixels.info = {}
        pixels.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": f"{name.removesuffix(path.suffix)}.png"}
