# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Holds back what libraries say about themselves, and what no user of this one can act on, in commands and notebooks."""

import logging
import warnings


# The logger of each note, and what the note contains
NOTES = {
    "transformers.utils.import_utils": ("requires torchvision",),  # it is not needed
    "accelerate.commands.launch": ("had defaults used instead",),
    "torch.distributed.elastic.multiprocessing.redirects": ("Redirects are currently not supported",),
    "transformers.tokenization_utils_base": ("sequence length is longer than the specified maximum",),
    "diffusers.loaders.lora_base": ("No LoRA keys associated to",),  # of text encoders, which most LoRAs do not adapt
    "torchao": ("Skipping import of cpp extensions",),
}
# Python's warnings, by how they start
WARNINGS = (
    r"'pin_memory' argument is set as true but no accelerator is found",
    r"Please use the new API settings to control TF32 behavior",
    r"There is a performance drop because we have not yet implemented the batching rule",
    r"To copy construct from a tensor",
)


class Notes(logging.Filter):
    """Drops the messages that contain one of some texts."""

    def __init__(self, texts: tuple[str, ...]):
        super().__init__()
        self.texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in self.texts)


def hold_back_notes() -> None:
    """Adds the filters, which stay."""
    for name, texts in NOTES.items():
        logging.getLogger(name).addFilter(Notes(texts))
    for text in WARNINGS:
        warnings.filterwarnings("ignore", message=text)
