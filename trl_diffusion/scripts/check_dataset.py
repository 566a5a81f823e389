# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion",
#     "transformers",
# ]
# ///

"""
Reads every row of a dataset as a trainer does, and says all that is wrong with it and what it holds.

```bash
trl-diffusion check-dataset --dataset_name user/pickapic-instance --output report.json
trl-diffusion check-dataset --dataset_name user/painting-attributes --trainer complex-po --criteria painting
trl-diffusion check-dataset --dataset_name user/paintings --trainer complex-po --target_prompts degraded
```
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trl_diffusion.cli.parser import CommandParser
from trl_diffusion.scripts.dataset_arguments import DatasetArguments


TRAINERS = ("instance-dpo", "attribute-sft", "complex-po", "ddspo", "diffusion-kto")


@dataclass
class CheckDatasetArguments(DatasetArguments):
    """
    Arguments of `trl-diffusion check-dataset`.

    Parameters:
        trainer (`str`, *optional*):
            The trainer that will read the dataset: `"instance-dpo"`, `"attribute-sft"`, `"complex-po"`, `"ddspo"` or `"diffusion-kto"`. By
            default the first for a dataset with the columns `chosen` and `rejected`, the last for one with `image` and `label`.
        target_prompts (`str`, *optional*):
            For `"complex-po"` without an expert, what the reference will be asked: `"attributes"` or `"degraded"`. With the last, the
            dataset needs no attributes.
        criteria (`str`, *optional*, defaults to `"painting"`):
            The tree of the attributes: a YAML file, or the name of a tree that comes with the package.
        resolution (`int`, *optional*, defaults to `512`):
            Width and height in pixels of the training images. Smaller images are counted.
        model_name_or_path (`str`, *optional*):
            The pipeline to be trained, of which only the tokenizers are loaded: prompts that they cut are counted.
        output (`str`, *optional*):
            File for the whole report, as JSON.
    """

    trainer: str | None = field(
        default=None,
        metadata={
            "help": "The trainer that will read the dataset. By default `instance-dpo` for a dataset with the columns `chosen` and "
            "`rejected`, `diffusion-kto` for one with `image` and `label`.",
            "choices": list(TRAINERS),
        },
    )
    target_prompts: str | None = field(
        default=None,
        metadata={
            "help": "For `complex-po` without an expert, what the reference will be asked. With `degraded`, the dataset needs no attributes.",
            "choices": ["attributes", "degraded"],
        },
    )
    criteria: str = field(
        default="painting",
        metadata={
            "help": "The tree of the attributes: a YAML file, or the name of a tree that comes with the package."
        },
    )
    resolution: int = field(
        default=512,
        metadata={"help": "Width and height in pixels of the training images. Smaller images are counted."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The pipeline to be trained, of which only the tokenizers are loaded: prompts that they cut are counted."
        },
    )
    output: str | None = field(default=None, metadata={"help": "File for the whole report, as JSON."})


def prompt_fits(name: str) -> Callable[[str], bool]:
    """Whether the text encoders of a pipeline, of which the tokenizers are loaded, read the whole of a prompt."""
    import transformers

    from trl_diffusion.backbones import BACKBONES
    from trl_diffusion.backbones.checks import plain_tokenizer
    from trl_diffusion.backbones.folder_checks import check_folder, read_index
    from trl_diffusion.revisions import UNTRUSTED

    index = read_index(name, {})
    families = [family for family in BACKBONES if family.pipeline_class.__name__ == index["_class_name"]]
    if not families:
        raise ValueError(f"`--model_name_or_path` is a `{index['_class_name']}`, a family that is not supported.")
    classes = {
        part: names[1]
        for part, names in index.items()
        if part.startswith("tokenizer") and isinstance(names, list) and names[1]
    }
    if Path(name).is_dir():
        check_folder(name, {part: index[part] for part in classes})
    loaded = {}
    for part, kind in classes.items():
        try:
            loaded[part] = getattr(transformers, kind).from_pretrained(name, subfolder=part, **UNTRUSTED)
        except Exception as error:  # whatever a damaged file makes the tokenizers raise
            raise ValueError(
                f"The `{part}` of {name} cannot be loaded: {' '.join(str(error).split())[:500]}"
            ) from error
    limits = {part: plain_tokenizer(tokenizer).model_max_length for part, tokenizer in loaded.items()}
    # The others read what CLIP does not
    if others := [part for part, kind in classes.items() if not kind.startswith("CLIP")]:
        limits = {others[0]: families[0].max_sequence_length}
    return lambda prompt: all(families[0].num_tokens(loaded[part], prompt) <= limit for part, limit in limits.items())


def main(args: CheckDatasetArguments) -> int:
    import json
    from pathlib import Path

    from trl_diffusion import (
        AttributeSFTTrainer,
        ComplexPOTrainer,
        Criteria,
        DDSPOTrainer,
        DiffusionKTOTrainer,
        InstanceDPOTrainer,
    )
    from trl_diffusion.data.check import as_text, check_dataset
    from trl_diffusion.data.presets import training_columns
    from trl_diffusion.files import write_file
    from trl_diffusion.scripts.utils import get_split, load_splits

    if args.resolution < 1:
        raise ValueError(f"`--resolution` must be at least 1, got {args.resolution}.")
    splits = load_splits(args.dataset_name, args.dataset_config, args.dataset_revision, args.dataset_streaming)
    dataset = training_columns(get_split(splits, args.dataset_train_split, "--dataset_train_split"), args.mapping)
    names = dataset.column_names or list(next(iter(dataset), {}))
    known_by = {"instance-dpo": {"chosen", "rejected"}, "diffusion-kto": {"image", "label"}}
    trainer = args.trainer or next((name for name, columns in known_by.items() if columns <= set(names)), None)
    if trainer is None:
        raise ValueError(
            f"`--trainer` is missing: the columns {', '.join(names)} do not tell which trainer is to read them. Name "
            f"{', '.join(TRAINERS)}."
        )
    if args.target_prompts is not None and trainer != "complex-po":
        raise ValueError(f"`--target_prompts` is of `--trainer complex-po`, not of {trainer}. Leave it out.")
    is_degraded = args.target_prompts == "degraded"
    reads_attributes = trainer in ("attribute-sft", "complex-po") and not is_degraded
    classes = InstanceDPOTrainer, AttributeSFTTrainer, ComplexPOTrainer, DDSPOTrainer, DiffusionKTOTrainer
    trainer_class = dict(zip(TRAINERS, classes, strict=True))[trainer]
    report = check_dataset(
        dataset,
        ("prompt", "image") if is_degraded else trainer_class.columns,
        trainer_class.image_columns,
        args.resolution,
        criteria=Criteria.load(args.criteria) if reads_attributes else None,
        needs_attributes=trainer == "complex-po" and reads_attributes,
        fits=prompt_fits(args.model_name_or_path) if args.model_name_or_path else None,
    )
    for line in as_text(report):
        print(line)
    if args.output:
        write_file(Path(args.output), json.dumps(report, indent=1, ensure_ascii=False, default=str).encode())
    return 1 if report["faults"] else 0


def make_parser(prog: str | None = None) -> CommandParser:
    return CommandParser((CheckDatasetArguments,), prog=prog)


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("check-dataset", lambda: sys.modules[__name__]))
