# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Names of the Hub, and pushing to it: the token, and what a failure leaves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import get_token


NO_TOKEN = "There is no token: run `hf auth login`, or set the environment variable HF_TOKEN."


def hub_id(name: str | None) -> str | None:
    """The name, unless it is a folder or a file of this machine, which means nothing to anybody else."""
    return name if name and not os.path.exists(name) and not os.path.isabs(name) else None


def has_token(token: str | None = None) -> bool:
    """Whether a token is given, or known from `hf auth login` or the variable HF_TOKEN."""
    return bool(token or get_token())


@contextmanager
def pushing(saved: str, token: str | None = None) -> Iterator[None]:
    """
    Turns what can fail on the way to the Hub into an error that says what is safe.

    Args:
        saved (`str`):
            A sentence that says where the result is.
        token (`str`, *optional*):
            A token that was given.

    Raises:
        `ValueError`: If the Hub cannot be reached or refuses, for example because there is no token.
    """
    try:
        yield
    except (OSError, httpx2.HTTPError) as error:  # among the former all of `huggingface_hub`
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        way_out = "Push again when this is mended." if has_token(token) else NO_TOKEN
        raise ValueError(f"The push to the Hub failed: {reason.rstrip('.')}. {saved} {way_out}") from error
