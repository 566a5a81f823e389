# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Runs a complete evaluation: samples images with every model for the same prompts and noise, and scores them."""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..files import only_run, sha256_of
from ..metrics.fid import fid_result
from ..metrics.inception import InceptionFeatures
from ..metrics.kid import kid_result
from ..metrics.scorer import Scorer
from .gallery import GALLERY, write_gallery
from .generate import ImageRow, generate, process_state
from .kept_images import write_sums
from .models import ModelSpec, guidance_without
from .plots import save_plots
from .prompts import PromptSet
from .protocols import Protocol
from .report import LATEX, REPORT, SUMMARY, summarize, write_report
from .scores import IMAGES_SCHEMA, SCORES, one_colour, score_models


PACKAGES = ("trl-diffusion", "diffusers", "transformers", "torch")
CORPUS_METRICS = {"fid": fid_result, "kid": kid_result}


def evaluate_models(
    specs: list[ModelSpec],
    prompt_set: PromptSet,
    protocol: Protocol,
    scorers: dict[str, Callable[[], Scorer]],
    output_dir: str | Path,
    corpus_metrics: tuple[str, ...] = (),
    references: str | Path | None = None,
    batch_size: int = 8,
    scoring_batch_size: int = 16,
    dtype: str = "auto",
    use_cpu: bool = False,
    retry_errors: bool = False,
    disable_tqdm: bool = False,
) -> dict[str, Any] | None:
    """
    Samples and scores images, and writes the report. Images and scores of an earlier run in the same folder are
    reused. FID and KID are always computed again.

    Args:
        specs (`list[ModelSpec]`):
            The models, from [`evaluation.models.resolve_model`]. The first one is the baseline of the win rates.
        prompt_set ([`PromptSet`]):
            The prompts, from [`evaluation.prompts.load_prompts`].
        protocol ([`Protocol`]):
            Sampling settings, from [`evaluation.protocols.load_protocol`].
        scorers (`dict[str, Callable]`):
            A function that creates the scorer, for each metric. Only one scorer is in memory at a time.
        output_dir (`str` or `Path`):
            Folder for images, scores, tables, plots and the gallery.
        corpus_metrics (`tuple[str, ...]`, *optional*, defaults to `()`):
            `"fid"` and `"kid"`, which compare all images of a model with `references`.
        references (`str` or `Path`, *optional*):
            Folder of reference images. Required for `corpus_metrics`.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of images per batch and process, for sampling.
        scoring_batch_size (`int`, *optional*, defaults to `16`):
            Number of images per batch, for scoring.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type for sampling, see [`evaluation.models.resolve_dtype`].
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to use the CPU even if there is a GPU.
        retry_errors (`bool`, *optional*, defaults to `False`):
            Whether to score images again that were errors in an earlier run.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bars.

    Returns:
        `dict`: the result of [`evaluation.report.summarize`] in the main process; `None` in the others, which only
        sample.

    Raises:
        `ValueError`: If two models have the same name, all images of one are of one colour, `references` or a package is missing, or another
            run uses the folder. See also [`evaluation.generate.generate`] and [`evaluation.scores.score_models`].
    """
    names = [spec.name.lower() for spec in specs]  # some systems take letters of both cases for one
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two models are called {', '.join(twice)}: write NAME=WHERE to give them different names.")
    if corpus_metrics and references is None:
        raise ValueError(f"{' and '.join(corpus_metrics)} needs `references`: pass a folder of images.")
    for package in ("matplotlib", *(["torchmetrics"] if corpus_metrics else [])):
        if find_spec(package) is None:  # checked before hours of sampling
            raise ValueError(f'An evaluation needs {package}: run `pip install "trl-diffusion[evaluation]"`.')
    output_dir = Path(output_dir)
    is_main_process = process_state(use_cpu).is_main_process
    with only_run(output_dir, "evaluating") if is_main_process else nullcontext():
        if is_main_process:
            remove_unfinished(output_dir)
        images = {
            spec.name: generate(spec, prompt_set, protocol, output_dir, batch_size, dtype, use_cpu, disable_tqdm)
            for spec in specs
        }
        if not is_main_process:
            return None

        rows = table_of(images, output_dir)
        flat = one_colour(rows, output_dir)
        table = score_models(rows, scorers, output_dir, scoring_batch_size, retry_errors, disable_tqdm, flat)
        settings = {
            "prompts": {
                "source": prompt_set.name,
                "revision": prompt_set.revision,
                "digest": prompt_set.digest,
                "number": len(prompt_set.prompts),
                **({"split": prompt_set.split} if prompt_set.split else {}),
            },
            "protocol": protocol.describe(),
            "models": {spec.name: spec.record() | unset_guidance(spec, protocol) for spec in specs},
            "versions": {package: version(package) for package in PACKAGES},
        }
        images = {
            model: [row for row in of_model if relative(row, output_dir) not in flat]
            for model, of_model in images.items()
        }
        corpus = compare_with_references(images, corpus_metrics, references, scoring_batch_size, use_cpu, disable_tqdm)
        summary = summarize(table, settings, corpus)
        pictures = save_plots(table, summary, output_dir)
        write_report(summary, output_dir, pictures, write_gallery(table, output_dir))
        files = (SCORES, SUMMARY, REPORT, LATEX, GALLERY, *pictures.values())
        write_sums(output_dir, {name: sha256_of(output_dir / name) for name in files})
        return summary


def remove_unfinished(output_dir: Path) -> None:
    """Removes what a run that was killed left half done in the folder of an evaluation."""
    for path in [*output_dir.glob("*.tmp"), *output_dir.glob("scores/*.tmp")]:
        path.unlink()
    for folder in output_dir.glob(".push-*"):
        shutil.rmtree(folder)


def unset_guidance(spec: ModelSpec, protocol: Protocol) -> dict[str, float | None]:
    """The guidance scale that a model was sampled with, if the protocol leaves it to the pipeline."""
    if protocol.guidance_scale is not None or spec.kind == "images":
        return {}
    return {"guidance_scale": guidance_without(spec)}


def table_of(images: dict[str, list[ImageRow]], output_dir: Path) -> pa.Table:
    """The images of all models, as input of [`evaluation.scores.score_models`]."""
    rows = [
        {
            "model": model,
            "prompt_id": row.prompt.id,
            "prompt": row.prompt.text,
            "group": row.prompt.group,
            "index": row.index,
            "image": relative(row, output_dir),
        }
        for model, of_model in images.items()
        for row in of_model
    ]
    return pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA)


def relative(row: ImageRow, output_dir: Path) -> str:
    """The file of an image, relative to the folder of the evaluation."""
    return Path(os.path.relpath(row.path, output_dir)).as_posix()


def compare_with_references(
    images: dict[str, list[ImageRow]],
    corpus_metrics: tuple[str, ...],
    references: str | Path | None,
    batch_size: int,
    use_cpu: bool,
    disable_tqdm: bool,
) -> dict[str, dict[str, dict[str, Any]]]:
    """FID and KID, by metric and model. The features of the references are computed once."""
    if not corpus_metrics:
        return {}
    extractor = InceptionFeatures(device="cpu" if use_cpu else None)
    reference_features = extractor(references, batch_size, disable_tqdm)
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in corpus_metrics}
    for model, of_model in images.items():
        features = extractor([row.path for row in of_model], batch_size, disable_tqdm)
        for name in corpus_metrics:
            results[name][model] = CORPUS_METRICS[name](features, reference_features, extractor)
    return results
