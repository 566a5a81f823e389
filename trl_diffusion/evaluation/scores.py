# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Scores of all models' images: one scorer in memory at a time, and nothing is scored twice.

What is scored is kept metric by metric, so that a run that was stopped, or that has one model or metric more than the one
before, only scores what is new. A score is what a metric says about an image's bytes and, where it looks at it, its prompt.
"""

import gc
import hashlib
import io
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from ..batching import batched, in_threads
from ..files import write_file
from ..metrics.scorer import Scorer


logger = logging.getLogger(__name__)

SCORES = "scores.parquet"
IMAGES_AT_ONCE = 256  # after so many, what is scored is written
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
KEPT_SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "digest": pa.string(),
        "prompt": pa.string(),
        "score": pa.float64(),
        "error": pa.string(),
    }
)


class Kept(NamedTuple):
    """
    What is known of an image.

    Args:
        image (`str`):
            Its file, relative to the output folder.
        digest (`str`):
            Of the file's bytes.
        prompt (`str`, *optional*):
            Its prompt; `None` where the metric looks at none.
        score (`float`, *optional*):
            Its score; `None` where there is none.
        error (`str`, *optional*):
            Why there is none.
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
) -> pa.Table:
    """
    Scores the images of all models, or what is left of them, and writes `scores.parquet`.

    Args:
        images (`pyarrow.Table`):
            The images, with the columns of `IMAGES_SCHEMA`: `model`, `prompt_id`, `prompt`, `group` (null where there are no
            groups), `index` among the images of the prompt, and `image`, the file relative to `output_dir`.
        scorers (`dict[str, Callable]`):
            What loads each metric's scorer, by the metric's name, such as `{"pickscore": PickScoreScorer}`. They are called one
            after another, each when the scorer before has left the memory.
        output_dir (`str` or `Path`):
            The folder of the evaluation. What each metric says is kept in `scores/<metric>.parquet` beneath it.
        batch_size (`int`, *optional*, defaults to `16`):
            Images scored at a time.
        retry_errors (`bool`, *optional*, defaults to `False`):
            Score again what an earlier run left as errors.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Show no progress bars.

    Returns:
        `pyarrow.Table`: the columns of `images`, and a column of `float64` for each metric, null where there is no score. For
        what its metadata says of the metrics see [`evaluation.scores.metrics_of`].

    Raises:
        `ValueError`: If there are no images, or they are not told apart; if a file is missing or no image; if the disk is full.
    """
    output_dir = Path(output_dir)
    images = check_images(images)
    digests = in_threads(lambda image: digest(output_dir / image), images["image"].to_pylist())
    table, metrics = images, {}
    for name, load in scorers.items():
        values, metrics[name] = score_metric(
            name, load, images, digests, output_dir, batch_size, retry_errors, disable_tqdm
        )
        table = table.append_column(name, pa.array(values, pa.float64()))
        gc.collect()  # models refer to themselves in circles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    table = table.replace_schema_metadata({"metrics": json.dumps(metrics)})
    write_table(output_dir / SCORES, table)
    return table


def metrics_of(table: pa.Table) -> dict[str, dict[str, Any]]:
    """
    What a table of scores says of its metrics.

    Args:
        table (`pyarrow.Table`):
            From [`evaluation.scores.score_models`], or `scores.parquet`.

    Returns:
        `dict[str, dict]`: by the metric's name, `higher_is_better`, `weights`, and `errors`: the reason, by the image's file.
    """
    return json.loads(table.schema.metadata[b"metrics"])


def check_images(images: pa.Table) -> pa.Table:
    """Brings the images' table into its schema; no two rows may be of one place or one file."""
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


def digest(path: Path) -> str:
    """Hash of a file's bytes. They are read: the same size and time may hold another picture, after a copy or a fast run."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise ValueError(
            f"The image {path} cannot be read: {error.strerror}. Generate the images once more; those that are there are kept."
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
) -> tuple[list[float | None], dict[str, Any]]:
    """
    As `score_models`, for one metric, whose scorer is loaded here and let go of on return: the scores of all images, and what
    there is to say of the metric.
    """
    scorer = load()
    path = output_dir / "scores" / f"{name}.parquet"
    known = read_kept(path, name, scorer.weights)
    files = images["image"].to_pylist()
    prompts = images["prompt"].to_pylist() if scorer.needs_prompts else [None] * len(files)

    def is_known(image: str, digest: str, prompt: str | None) -> bool:
        kept = known.get(image)
        return kept is not None and kept[1:3] == (digest, prompt) and not (retry_errors and kept.error is not None)

    pending = [wanted for wanted in zip(files, digests, prompts) if not is_known(*wanted)]
    size = batch_size * math.ceil(IMAGES_AT_ONCE / batch_size)  # whole batches: a run that goes on forms the same ones
    with tqdm(total=len(files), initial=len(files) - len(pending), desc=name, disable=disable_tqdm) as progress:
        for chunk in batched(pending, size):
            scores = scorer.score(
                [output_dir / image for image, _, _ in chunk],
                [prompt for _, _, prompt in chunk] if scorer.needs_prompts else None,
                batch_size=batch_size,
            )
            for place, (wanted, value) in enumerate(zip(chunk, scores.values, strict=True)):
                known[wanted[0]] = Kept(*wanted, value, scores.errors.get(place))
            kept = pa.Table.from_pylist([row._asdict() for row in known.values()], schema=KEPT_SCHEMA)
            write_table(path, kept.replace_schema_metadata({"weights": json.dumps(scorer.weights)}))
            progress.update(len(chunk))
    of_images = [known[image] for image in files]
    return [kept.score for kept in of_images], {
        "higher_is_better": scorer.higher_is_better,
        "weights": scorer.weights,
        "errors": {kept.image: kept.error for kept in of_images if kept.error is not None},
    }


def read_kept(path: Path, name: str, weights: dict[str, str]) -> dict[str, Kept]:
    """What an earlier run has kept, by the image's file; nothing where it scored with other weights."""
    if not path.exists():
        return {}
    table = pq.read_table(path)
    earlier = json.loads(table.schema.metadata[b"weights"])
    if earlier != weights:
        logger.warning(
            "`%s` was computed with %s, and its weights are %s now: all images are scored again.",
            name,
            earlier,
            weights,
        )
        return {}
    return {row["image"]: Kept(**row) for row in table.to_pylist()}


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a Parquet file whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_file(path, buffer.getvalue())
