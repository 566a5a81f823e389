# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Dataset repositories of the Hub: which of their files a push replaces, and the Hub's categories of their sizes."""

from collections.abc import Collection
from pathlib import PurePosixPath


DATA_ENDINGS = (".parquet", ".arrow")
# What `load_dataset` reads beside the card, or refuses
DESCRIPTIONS = ("dataset_infos.json", ".huggingface.yaml")
SIZES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
    100_000_000: "10M<n<100M",
    1_000_000_000: "100M<n<1B",
    10_000_000_000: "1B<n<10B",
}


def size_category_of(number: int) -> str:
    """The Hub's category of a number of rows."""
    return next((size for most, size in SIZES.items() if number < most), "10B<n<100B")


def stale_files(
    present: Collection[str], pushed: Collection[str], repo_id: str, folders: Collection[str]
) -> list[str]:
    """
    Finds the files of an earlier dataset in the same repository: its tables, and what tells `load_dataset` to read them in
    another way. A commit that deletes them together with the new files leaves one dataset.

    Args:
        present (`Collection[str]`):
            Files of the repository.
        pushed (`Collection[str]`):
            Files of the new dataset.
        repo_id (`str`):
            The repository; the script of a dataset has its name.
        folders (`Collection[str]`):
            Folders that belong to the dataset, with all that is in them.

    Returns:
        `list[str]`: the files to delete, sorted.
    """
    others = {*DESCRIPTIONS, f"{repo_id.split('/')[-1]}.py"}
    return sorted(
        name
        for name in {*present} - {*pushed}
        if name in others or name.endswith(DATA_ENDINGS) or PurePosixPath(name).parts[0] in folders
    )
