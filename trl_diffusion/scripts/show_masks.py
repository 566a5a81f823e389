# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion",
# ]
# ///

"""
Draws the instance masks of a dataset over its images, exactly as in training: the images are cropped and resized, and the
masks are on the latent grid.

```bash
trl-diffusion show-masks --dataset_name user/pickapic-instance --num_rows 8 --output_dir masks
```
"""

from dataclasses import dataclass, field

from trl_diffusion.cli.parser import CommandParser
from trl_diffusion.scripts.dataset_arguments import DatasetArguments


@dataclass
class ShowMasksArguments(DatasetArguments):
    """
    Arguments of `trl-diffusion show-masks`.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"masks"`):
            Where the pictures are written, one for each row.
        num_rows (`int`, *optional*, defaults to `8`):
            Number of rows to draw, from the first one on.
        resolution (`int`, *optional*, defaults to `512`):
            Width and height in pixels of the training images.
        vae_scale_factor (`int`, *optional*, defaults to `8`):
            Width and height in pixels of a latent cell.
        center_crop (`bool`, *optional*, defaults to `True`):
            As in training.
        random_flip (`bool`, *optional*, defaults to `False`):
            As in training.
        seed (`int`, *optional*, defaults to `42`):
            As in training.
        w_neg (`float`, *optional*, defaults to `0.0`):
            As in training.
        mask_overlap (`str`, *optional*, defaults to `"mean"`):
            As in training.
        box_margin (`float`, *optional*, defaults to `0.0`):
            As in training.
    """

    output_dir: str = field(default="masks", metadata={"help": "Where the pictures are written, one for each row."})
    num_rows: int = field(default=8, metadata={"help": "Number of rows to draw, from the first one on."})
    resolution: int = field(default=512, metadata={"help": "Width and height in pixels of the training images."})
    vae_scale_factor: int = field(default=8, metadata={"help": "Width and height in pixels of a latent cell."})
    center_crop: bool = field(default=True, metadata={"help": "As in training."})
    random_flip: bool = field(default=False, metadata={"help": "As in training."})
    seed: int = field(default=42, metadata={"help": "As in training."})
    w_neg: float = field(default=0.0, metadata={"help": "As in training."})
    mask_overlap: str = field(default="mean", metadata={"help": "As in training.", "choices": ["mean", "covering"]})
    box_margin: float = field(default=0.0, metadata={"help": "As in training."})


def main(args: ShowMasksArguments) -> None:
    from pathlib import Path

    from trl_diffusion.data.collators import InstancePairCollator
    from trl_diffusion.data.formats import prepare_dataset
    from trl_diffusion.files import save_picture
    from trl_diffusion.scripts.utils import get_datasets
    from trl_diffusion.visualization import image_grid, instance_pictures

    if args.num_rows < 1:
        raise ValueError(f"`--num_rows` must be at least 1, got {args.num_rows}.")
    if not 0 <= args.box_margin < float("inf"):
        raise ValueError(f"`--box_margin` must be at least 0, got {args.box_margin}.")
    dataset, _ = get_datasets(args, evaluates=False)
    dataset = prepare_dataset(
        dataset, "dataset", ("prompt", "chosen", "rejected", "instances"), ("chosen", "rejected")
    )
    collate = InstancePairCollator(
        args.resolution, args.center_crop, args.random_flip, args.seed, box_margin=args.box_margin
    )
    folder = Path(args.output_dir)

    for index, row in enumerate(dataset.take(args.num_rows)):
        batch = collate([row])
        pictures = instance_pictures(batch, row, args.vae_scale_factor, args.w_neg, args.mask_overlap)
        grid = image_grid([pictures], ["chosen", "rejected"], [f"{batch['id'][0]}: {row['prompt']}"], size=512)
        save_picture(folder / f"{index:04d}.png", grid)
    print(
        f"Drew {index + 1} rows to {folder}. Dark cells weigh less, and the label is reversed in red cells. A box or outline is "
        "green if it agrees with the label, orange if it contradicts it, and grey for a tie."
    )


def make_parser(prog: str | None = None) -> CommandParser:
    return CommandParser((ShowMasksArguments,), prog=prog)


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("show-masks", lambda: sys.modules[__name__]))
