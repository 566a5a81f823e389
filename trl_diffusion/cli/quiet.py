# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Holds back what libraries say about themselves, and what no user of a command can act on."""

import logging
import warnings


# The logger of each note, and what the note contains
NOTES = {
    "transformers.utils.import_utils": ("requires torchvision",),  # it is not needed
    "transformers.training_args": ("process group is initialized, but parallel_mode",),  # several processes on a CPU
    "accelerate.commands.launch": ("had defaults used instead",),
    "torch.distributed.elastic.multiprocessing.redirects": ("Redirects are currently not supported",),
    "torchao": ("Skipping import of cpp extensions",),
}
# Python's warnings, by how they start
WARNINGS = (
    r"'pin_memory' argument is set as true but no accelerator is found",
    r"Please use the new API settings to control TF32 behavior",
    r"There is a performance drop because we have not yet implemented the batching rule",
    r"To copy construct from a tensor",
)


def quiet() -> None:
    """Holds the notes back, in this process."""
    for name, texts in NOTES.items():
        logging.getLogger(name).addFilter(lambda record, texts=texts: not any(t in record.getMessage() for t in texts))
    for text in WARNINGS:
        warnings.filterwarnings("ignore", message=text)
