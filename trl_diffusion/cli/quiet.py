# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What is cut off prompts is said once by a command, not in each call."""

import ast
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
            number = f"{len(self.endings)} different endings were" if len(self.endings) > 1 else "One ending was"
            print(
                f"trl-diffusion {command}: some prompts are longer than the text encoders read. {number} "
                f"cut off, such as {min(self.endings)[:60]!r}.",
                file=sys.stderr,
            )


def hold_back() -> CutPrompts:
    """Holds the warnings of each call back, in this process. Returns what collects the endings that are cut off prompts."""
    cut = CutPrompts()
    for name in PIPELINES:
        logging.getLogger(f"diffusers.pipelines.{name}").addFilter(cut)
    return cut


@contextmanager
def quiet() -> Iterator[CutPrompts]:
    """Holds them back while the context lasts: other code in this process, such as a notebook's, gets them as before."""
    cut = hold_back()
    try:
        yield cut
    finally:
        for name in PIPELINES:
            logging.getLogger(f"diffusers.pipelines.{name}").removeFilter(cut)
