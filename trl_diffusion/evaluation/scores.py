# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Scores the images of all models, with one scorer in memory at a time.

Scores are cached for each metric, so a run that was interrupted, or that has more models or metrics than before,
scores only what is new. A score depends on the bytes of the image and, if the metric uses it, on the prompt.
"""

import gc
import hashlib
import json
import logging
import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm.auto import tqdm

from ..batching import batched, in_threads
from ..checksums import DamagedFile, read_table, write_table
from ..metrics.scorer import Scorer
from ..safe_names import check_part_of_path
from ..sampling import only_colour


logger = logging.getLogger(__name__)

SCORES = "scores.parquet"
IMAGES_AT_ONCE = 256  # a part of the cache is written after this many images
IMAGES_SCHEMA = pa.schema(
    {
        "model": pa.string(),
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        "group": pa.string(),
        "index": pa.int64(),
        "image": pa.string(),
    }
)
CACHE_SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "digest": pa.string(),
        "prompt": pa.string(),
        "score": pa.float64(),
        "error": pa.string(),
    }
)


class CachedScore(NamedTuple):
    """
    A cached score of an image.

    Args:
        image (`str`):
            File of the image, relative to the output folder.
        digest (`str`):
            Hash of the bytes of the file.
        prompt (`str`, *optional*):
            Prompt of the image, `None` if the metric does not use it.
        score (`float`, *optional*):
            The score, `None` if the image could not be scored.
        error (`str`, *optional*):
            Why it could not be scored.
    """

    image: str
    digest: str
    prompt: str | None
    score: float | None
    error: str | None


def score_models(
    images: pa.Table,
    scorers: dict[str, Callable[[], Scorer]],
    output_dir: str | Path,
    batch_size: int = 16,
    retry_errors: bool = False,
    disable_tqdm: bool = False,
    left_out: dict[str, str] | None = None,
) -> pa.Table:
    """
    Scores the images of all models that have no cached score, and writes `scores.parquet`.

    Args:
        images (`pyarrow.Table`):
            The images, with the columns of `IMAGES_SCHEMA`: `model`, `prompt_id`, `prompt`, `group` (null if there are
            no groups), `index` among the images of the prompt, and `image`, the file relative to `output_dir`.
        scorers (`dict[str, Callable]`):
            A function that loads the scorer, for each metric, such as `{"pickscore": PickScoreScorer}`. A scorer is
            loaded after the previous one was released from memory.
        output_dir (`str` or `Path`):
            Folder of the evaluation. Scores are cached in its `scores/<metric>.parquet`, until a metric is done in parts beside it.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images per batch.
        retry_errors (`bool`, *optional*, defaults to `False`):
            Whether to score images again that were errors in an earlier run.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bars.
        left_out (`dict[str, str]`, *optional*):
            Images that are not scored, and the reasons, see [`evaluation.scores.one_colour`].

    Returns:
        `pyarrow.Table`: the columns of `images`, and a column of `float64` for each metric, null for missing scores.
        Its metadata describe the metrics, see [`evaluation.scores.metrics_of`].

    Raises:
        `ValueError`: If there are no images, or two rows are the same image; if a file is missing or not an image; if
            the disk is full.
    """
    output_dir = Path(output_dir)
    images = check_images(images)
    digests = in_threads(lambda image: digest(output_dir / image), images["image"].to_pylist())
    table, metrics = images, {}
    for name, load in scorers.items():
        values, metrics[name] = score_metric(
            name, load, images, digests, output_dir, batch_size, retry_errors, disable_tqdm, left_out or {}
        )
        table = table.append_column(name, pa.array(values, pa.float64()))
        gc.collect()  # models contain reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    table = table.replace_schema_metadata({"metrics": json.dumps(metrics), "digests": json.dumps(digests)})
    write_table(output_dir / SCORES, table)
    return table


def metrics_of(table: pa.Table) -> dict[str, dict[str, Any]]:
    """
    Reads the descriptions of the metrics from a table of scores.

    Args:
        table (`pyarrow.Table`):
            Scores from [`evaluation.scores.score_models`], or `scores.parquet`.

    Returns:
        `dict[str, dict]`: for each metric, `higher_is_better`, `weights`, and `errors` (reasons by image file).
    """
    return json.loads(table.schema.metadata[b"metrics"])


def changed_images(table: pa.Table, output_dir: Path) -> list[str]:
    """The images of a table of scores, see [`metrics_of`], that are there and are not those that were scored."""
    files, digests = table["image"].to_pylist(), json.loads(table.schema.metadata[b"digests"])
    there = [(file, scored) for file, scored in zip(files, digests, strict=True) if (output_dir / file).is_file()]
    now = in_threads(lambda item: digest(output_dir / item[0]), there)
    return [file for (file, scored), found in zip(there, now, strict=True) if found != scored]


def check_images(images: pa.Table) -> pa.Table:
    """Casts the table of images to its schema, and checks that images and their places are unique."""
    if missing := [name for name in IMAGES_SCHEMA.names if name not in images.column_names]:
        raise ValueError(f"The table of images lacks {', '.join(missing)}; it has {', '.join(images.column_names)}.")
    images = images.select(IMAGES_SCHEMA.names).cast(IMAGES_SCHEMA)
    if not images.num_rows:
        raise ValueError("There are no images to score.")
    for columns in (["image"], ["model", "prompt_id", "index"]):
        seen = set()
        for values in zip(*(images[column].to_pylist() for column in columns)):
            if values in seen:
                raise ValueError(
                    f"Two rows of the table of images have the same {', '.join(columns)}: "
                    f"{', '.join(str(value) for value in values)}."
                )
            seen.add(values)
    return images


def one_colour(images: pa.Table, output_dir: str | Path) -> dict[str, str]:
    """
    Finds images of one colour, which are no pictures: a model overflowed, or a safety checker made them black.

    Args:
        images (`pyarrow.Table`):
            The images, as for [`evaluation.scores.score_models`].
        output_dir (`str` or `Path`):
            Folder of the evaluation.

    Returns:
        `dict[str, str]`: the reason why they are not scored, by file.

    Raises:
        `ValueError`: If all images of a model are.
    """
    files = images["image"].to_pylist()
    colours = in_threads(lambda file: _colour(Path(output_dir) / file), files)
    found = {file: f"all of it is the colour {colour}" for file, colour in zip(files, colours) if colour is not None}
    for model in dict.fromkeys(images["model"].to_pylist()):
        of_model = images.filter(pc.equal(images["model"], model))["image"].to_pylist()
        flat = [file for file in of_model if file in found]
        said = f"{len(flat)} of {len(of_model)} images of {model} are of one colour: {', '.join(flat[:5])}{' and others' if len(flat) > 5 else ''}."
        if flat and len(flat) == len(of_model):
            raise ValueError(
                f"{said} There is nothing to score. Where they were sampled here, sample in bfloat16 or float32, or with another VAE; "
                "delete them first."
            )
        if flat:
            logger.warning(f"{said} They are not scored.")
    return found


def _colour(path: Path) -> tuple[int, int, int] | None:
    """The colour of an image that has only one; a file that is no image is left to the scorers, which say so."""
    try:
        with PIL.Image.open(path) as image:
            return only_colour(image)
    except OSError:
        return None


def digest(path: Path) -> str:
    """Hash of the bytes of a file. Its size and time would not be enough: another image may have the same."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise ValueError(
            f"The image {path} cannot be read: {error.strerror}. Generate the images again: existing ones are kept."
        ) from error


def score_metric(
    name: str,
    load: Callable[[], Scorer],
    images: pa.Table,
    digests: list[str],
    output_dir: Path,
    batch_size: int,
    retry_errors: bool,
    disable_tqdm: bool,
    left_out: dict[str, str],
) -> tuple[list[float | None], dict[str, Any]]:
    """
    Like `score_models`, for one metric: returns the scores of all images, and the description of the metric. The
    scorer is loaded here and released on return.
    """
    path = output_dir / "scores" / f"{check_part_of_path(name, 'metric')}.parquet"
    scorer = load()
    known = read_cache(path, scorer)
    files = images["image"].to_pylist()
    prompts = images["prompt"].to_pylist() if scorer.needs_prompts else [None] * len(files)

    def is_known(image: str, digest: str, prompt: str | None) -> bool:
        cached = known.get(image)
        return (
            cached is not None and cached[1:3] == (digest, prompt) and not (retry_errors and cached.error is not None)
        )

    pending = [
        wanted for wanted in zip(files, digests, prompts) if wanted[0] not in left_out and not is_known(*wanted)
    ]
    size = batch_size * math.ceil(
        IMAGES_AT_ONCE / batch_size
    )  # whole batches, so that a continued run has the same ones
    parts, numbers = part_files(path), count(len(part_files(path)))
    with tqdm(total=len(files), initial=len(files) - len(pending), desc=name, disable=disable_tqdm) as progress:
        for chunk in batched(pending, size):
            scores = scorer.score(
                [output_dir / image for image, _, _ in chunk],
                [prompt for _, _, prompt in chunk] if scorer.needs_prompts else None,
                batch_size=batch_size,
            )
            scored = {
                wanted[0]: CachedScore(*wanted, value, scores.errors.get(place))
                for place, (wanted, value) in enumerate(zip(chunk, scores.values, strict=True))
            }
            known |= scored
            progress.update(len(chunk))
            if chunk[-1] != pending[-1]:
                parts.append(path.with_name(f"{path.name}.part-{next(numbers):06d}"))
                write_scores(parts[-1], scored, scorer)
    if pending or parts:
        write_scores(path, known, scorer)
        for part in parts:
            part.unlink()
    known |= {image: CachedScore(image, "", None, None, reason) for image, reason in left_out.items()}
    of_images = [known[image] for image in files]
    return [cached.score for cached in of_images], {
        "higher_is_better": scorer.higher_is_better,
        "weights": scorer.weights,
        "errors": {cached.image: cached.error for cached in of_images if cached.error is not None},
    }


def part_files(path: Path) -> list[Path]:
    """The files that a run that was stopped left, in their order."""
    return sorted(path.parent.glob(f"{path.name}.part-*[0-9]"))


def read_cache(path: Path, scorer: Scorer) -> dict[str, CachedScore]:
    """
    Reads the cached scores of an earlier run and of one that was stopped, by image file. Scores of other weights or settings are
    ignored, and files that are not as they were written.
    """
    known = {}
    for file in [path] * path.exists() + part_files(path):
        try:
            table = read_table(file)
        except DamagedFile as error:
            logger.warning(f"{error}: its images are scored again.")
            continue
        weights, settings = (json.loads(table.schema.metadata[key]) for key in (b"weights", b"settings"))
        if weights == scorer.weights and settings == json.loads(json.dumps(scorer.settings)):
            known |= {row["image"]: CachedScore(**row) for row in table.to_pylist()}
        elif file == path:
            logger.warning(
                f"`{path.stem}` was computed with the weights {weights}, but they are now {scorer.weights}: all images are scored again."
                if weights != scorer.weights
                else f"`{path.stem}` was computed with the settings {settings}, but they are now {scorer.settings}: all images are "
                "scored again."
            )
    return known


def write_scores(path: Path, scores: dict[str, CachedScore], scorer: Scorer) -> None:
    """Writes scores with the weights and the settings that gave them."""
    table = pa.Table.from_pylist([row._asdict() for row in scores.values()], schema=CACHE_SCHEMA)
    made_with = {"weights": json.dumps(scorer.weights), "settings": json.dumps(scorer.settings)}
    write_table(path, table.replace_schema_metadata(made_with))
