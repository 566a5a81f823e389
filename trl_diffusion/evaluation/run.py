# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""An evaluation from beginning to end: every model draws the same prompts from the same noise, and is scored."""

import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import PartialState

from ..metrics.fid import fid_result
from ..metrics.inception import InceptionFeatures
from ..metrics.kid import kid_result
from ..metrics.scorer import Scorer
from .gallery import write_gallery
from .generate import ImageRow, generate
from .models import ModelSpec
from .plots import save_plots
from .prompts import PromptSet
from .protocols import Protocol
from .report import summarize, write_report
from .scores import IMAGES_SCHEMA, score_models


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
    Draws, scores and reports. Images and scores that an earlier run left in the folder are not made again; FID and KID, which are
    of all images, are.

    Args:
        specs (`list[ModelSpec]`):
            The models, from [`evaluation.models.resolve_model`]. The first one is the baseline of the win rates.
        prompt_set ([`PromptSet`]):
            The prompts, from [`evaluation.prompts.load_prompts`].
        protocol ([`Protocol`]):
            How to draw, from [`evaluation.protocols.load_protocol`].
        scorers (`dict[str, Callable]`):
            What makes each metric's scorer, by the metric's name; one is in memory at a time.
        output_dir (`str` or `Path`):
            Where images, scores, tables, plots and the gallery go.
        corpus_metrics (`tuple[str, ...]`, *optional*, defaults to `()`):
            `"fid"` and `"kid"`, which compare all images of a model with `references`.
        references (`str` or `Path`, *optional*):
            A folder of images.
        batch_size (`int`, *optional*, defaults to `8`):
            Images that a process draws at a time.
        scoring_batch_size (`int`, *optional*, defaults to `16`):
            Images scored at a time.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights that draw, see [`evaluation.models.resolve_dtype`].
        use_cpu (`bool`, *optional*, defaults to `False`):
            Draw and score on the CPU where there is a GPU as well.
        retry_errors (`bool`, *optional*, defaults to `False`):
            Score again what an earlier run left as errors.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Show no progress.

    Returns:
        `dict`: what [`evaluation.report.summarize`] gives, in the main process; `None` in the others, which only draw.

    Raises:
        `ValueError`: If two models have one name, or `references` or a package are missing. See also
            [`evaluation.generate.generate`] and [`evaluation.scores.score_models`].
    """
    names = [spec.name for spec in specs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two models are called {', '.join(twice)}: write NAME=WHERE to tell them apart.")
    if corpus_metrics and references is None:
        raise ValueError(f"{' and '.join(corpus_metrics)} compare with `references`: name a folder of images.")
    for package in ("matplotlib", *(["torchmetrics"] if corpus_metrics else [])):
        if find_spec(package) is None:  # said now, and not after hours of drawing
            raise ValueError(f'An evaluation needs {package}: `pip install "trl-diffusion[evaluation]"`.')
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    images = {
        spec.name: generate(spec, prompt_set, protocol, output_dir, batch_size, dtype, use_cpu, disable_tqdm)
        for spec in specs
    }
    if not PartialState(cpu=use_cpu).is_main_process:
        return None

    table = score_models(
        table_of(images, output_dir), scorers, output_dir, scoring_batch_size, retry_errors, disable_tqdm
    )
    settings = {
        "prompts": {
            "source": prompt_set.name,
            "revision": prompt_set.revision,
            "digest": prompt_set.digest,
            "number": len(prompt_set.prompts),
        },
        "protocol": asdict(protocol),
        "models": {spec.name: spec.describe() for spec in specs},
        "versions": {package: version(package) for package in PACKAGES},
    }
    corpus = compare_with_references(images, corpus_metrics, references, scoring_batch_size, use_cpu, disable_tqdm)
    summary = summarize(table, settings, corpus)
    write_report(summary, output_dir, save_plots(table, summary, output_dir), write_gallery(table, output_dir))
    return summary


def table_of(images: dict[str, list[ImageRow]], output_dir: Path) -> pa.Table:
    """The images of all models, as [`evaluation.scores.score_models`] takes them."""
    rows = [
        {
            "model": model,
            "prompt_id": row.prompt.id,
            "prompt": row.prompt.text,
            "group": row.prompt.group,
            "index": row.index,
            "image": Path(os.path.relpath(row.path, output_dir)).as_posix(),
        }
        for model, of_model in images.items()
        for row in of_model
    ]
    return pa.Table.from_pylist(rows, schema=IMAGES_SCHEMA)


def compare_with_references(
    images: dict[str, list[ImageRow]],
    corpus_metrics: tuple[str, ...],
    references: str | Path | None,
    batch_size: int,
    use_cpu: bool,
    disable_tqdm: bool,
) -> dict[str, dict[str, dict[str, Any]]]:
    """FID and KID by metric and model. The features of the references are computed once."""
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
