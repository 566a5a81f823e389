# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Holds back what libraries say about themselves, and what no user of a command can act on."""

import ast
import logging
import re
import sys
import warnings


# The logger of each note, and what the note contains
NOTES = {
    "transformers.utils.import_utils": ("requires torchvision",),  # it is not needed
    "accelerate.commands.launch": ("had defaults used instead",),
    "torch.distributed.elastic.multiprocessing.redirects": ("Redirects are currently not supported",),
    "transformers.tokenization_utils_base": ("sequence length is longer than the specified maximum",),
    "torchao": ("Skipping import of cpp extensions",),
}
# Python's warnings, by how they start
WARNINGS = (
    r"'pin_memory' argument is set as true but no accelerator is found",
    r"Please use the new API settings to control TF32 behavior",
    r"There is a performance drop because we have not yet implemented the batching rule",
    r"To copy construct from a tensor",
)
# Where the pipelines of diffusers warn in each call of what they cut off a prompt, and how
PIPELINES = (
    "stable_diffusion.pipeline_stable_diffusion",
    "stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "stable_diffusion_3.pipeline_stable_diffusion_3",
    "flux.pipeline_flux",
)
PADDING = re.compile(r"(<\|endoftext\|>|<pad>|</s>|!|\s)+$")
CUT = "The following part of your input was truncated because"


class CutPrompts(logging.Filter):
    """Collects what was cut off prompts, instead of the warning of each call."""

    def __init__(self):
        super().__init__()
        self.endings: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith(CUT):
            return True
        texts = ast.literal_eval(message[message.index(": [") + 2 :])  # shorter prompts are there with their padding
        self.endings.update(filter(None, (PADDING.sub("", text).strip() for text in texts)))
        return False

    def say(self, command: str) -> None:
        """Says it once, with a count and an example."""
        if self.endings:
            print(
                f"trl-diffusion {command}: some prompts are longer than the text encoders read. {len(self.endings)} different "
                f"endings were cut off, such as {min(self.endings)[:60]!r}.",
                file=sys.stderr,
            )


def quiet() -> CutPrompts:
    """Holds the notes back, in this process. Returns what collects the endings that are cut off prompts."""
    cut = CutPrompts()
    for name in PIPELINES:
        logger = logging.getLogger(f"diffusers.pipelines.{name}")
        for earlier in [each for each in logger.filters if isinstance(each, CutPrompts)]:
            logger.removeFilter(earlier)  # of another command in this process
        logger.addFilter(cut)
    for name, texts in NOTES.items():
        logging.getLogger(name).addFilter(lambda record, texts=texts: not any(t in record.getMessage() for t in texts))
    for text in WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    return cut
