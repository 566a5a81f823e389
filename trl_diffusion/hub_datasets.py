# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Dataset repositories of the Hub: which of their files a push replaces."""

from collections.abc import Collection
from pathlib import PurePosixPath


DATA_ENDINGS = (".parquet", ".arrow")
# What `load_dataset` reads beside the card, or refuses
DESCRIPTIONS = ("dataset_infos.json", ".huggingface.yaml")


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
