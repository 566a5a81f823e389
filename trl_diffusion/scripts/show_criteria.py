# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion",
# ]
# ///

"""
Prints a tree of criteria, and draws it as a picture.

```bash
trl-diffusion show-criteria --criteria painting --dimension composition --output criteria.png
```
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl_diffusion.cli.parser import CommandParser
from trl_diffusion.criteria import Criteria
from trl_diffusion.criteria_picture import criteria_picture
from trl_diffusion.files import save_picture


@dataclass
class ShowCriteriaArguments:
    """
    Arguments of `trl-diffusion show-criteria`.

    Parameters:
        criteria (`str`, *optional*, defaults to `"painting"`):
            Tree of criteria: a YAML file, or the name of a tree that comes with the package.
        dimension (`str`, *optional*):
            Dimension to show. By default all of them are shown.
        output (`str`, *optional*):
            File for the picture, such as `"criteria.png"`. By default no picture is drawn.
    """

    criteria: str = field(
        default="painting",
        metadata={"help": "Tree of criteria: a YAML file, or the name of a tree that comes with the package."},
    )
    dimension: str | None = field(
        default=None, metadata={"help": "Dimension to show. By default all of them are shown."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "File for the picture, such as 'criteria.png'. By default no picture is drawn."},
    )


def main(args: ShowCriteriaArguments) -> None:
    criteria = Criteria.load(args.criteria)
    if args.dimension is not None:
        criteria = Criteria(criteria.name, criteria.levels, criteria.select(args.dimension))
    print(tree_text(criteria))
    if args.output is not None:
        save_picture(Path(args.output), criteria_picture(criteria))
        print(f"Drew the tree to {args.output}.")


def tree_text(criteria: Criteria) -> str:
    """The tree in indented lines, each attribute with its two forms, and below it the number of attributes per dimension."""
    lines = []
    for depth, node, attribute in criteria.walk():
        forms = "" if attribute is None else f": {attribute.positive} | {attribute.negative}"
        lines.append("  " * depth + node + forms)
    lines += ["", f"Attributes of {criteria.name}:"]
    counts = criteria.counts() | {"total": len(criteria.attributes)}
    width = max(map(len, counts))
    lines += [f"  {dimension:{width}} {count:4}" for dimension, count in counts.items()]
    return "\n".join(lines)


def make_parser(prog: str | None = None) -> CommandParser:
    return CommandParser((ShowCriteriaArguments,), prog=prog)


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("show-criteria", lambda: sys.modules[__name__]))
