# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion[ray]",
# ]
# ///

"""
Annotates images with attributes of a tree of criteria, for CPO: an expert goes through the tree one dimension at a time.

```bash
trl-diffusion annotate-attributes \
    --dataset_name user/paintings \
    --criteria painting \
    --vlm Qwen/Qwen2.5-VL-7B-Instruct \
    --output_dir annotations
```

If it is stopped, the same command continues. `--preview 20` shows some annotated images before the run.
"""

from dataclasses import dataclass, field

from trl_diffusion.cli.parser import CommandParser
from trl_diffusion.scripts.annotation import AnnotationArguments


@dataclass
class AnnotateAttributesArguments(AnnotationArguments):
    """
    Arguments of `trl-diffusion annotate-attributes` besides those that both annotation commands have.

    Parameters:
        criteria (`str`, *optional*, defaults to `"painting"`):
            The tree: a YAML file, or the name of a tree that comes with the package.
        expert_prompt (`str`, *optional*):
            A file with your own prompt.
    """

    criteria: str = field(
        default="painting",
        metadata={"help": "The tree: a YAML file, or the name of a tree that comes with the package."},
    )
    expert_prompt: str | None = field(default=None, metadata={"help": "A file with your own prompt."})


def main(args: AnnotateAttributesArguments) -> None:
    from trl_diffusion import Criteria
    from trl_diffusion.annotation.attribute_expert import AttributeExpert
    from trl_diffusion.annotation.attributes import attribute_task
    from trl_diffusion.annotation.records import image_columns
    from trl_diffusion.scripts.annotation import annotate, get_executor, load_rows
    from trl_diffusion.scripts.judges import get_vlm

    criteria = Criteria.load(args.criteria)
    dataset, columns, num_rows = load_rows(args, image_columns)
    expert = AttributeExpert(get_vlm(args), criteria, args.expert_prompt)
    task = attribute_task(expert, args.source, columns, args.rows_per_shard)
    annotate(args, task, dataset, num_rows, get_executor(args))


def make_parser(prog: str | None = None) -> CommandParser:
    return CommandParser((AnnotateAttributesArguments,), prog=prog)


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("annotate-attributes", lambda: sys.modules[__name__]))
