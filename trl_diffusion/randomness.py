# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Keyed randomness: every random number of a training is a pure function of a key.

A key is, for example, (seed, global step, row id). No number depends on the global generators, so eight micro-batches of one
row equal one batch of eight, two processes equal one, and a resumed run equals one that was never stopped.
"""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """
    Makes a random generator from a key.

    Args:
        *key (`int` or `str`):
            The parts of the key, such as the seed, the global step, the row's id and what is sampled.

    Returns:
        `torch.Generator`: a generator on the CPU (so that every device sees the same numbers), seeded with a hash of the
        key.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def keyed_noise(
    keys: list[tuple], shape: tuple[int, ...], device: torch.device | str = "cpu", pin_memory: bool = False
) -> torch.Tensor:
    """
    Samples standard normal noise, independently for each key.

    Args:
        keys (`list[tuple]` of length `B`):
            One key for each row, see [`randomness.keyed_generator`].
        shape (`tuple[int, ...]`):
            Shape of one row's noise, such as `(C, h, w)`.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Device of the result.
        pin_memory (`bool`, *optional*, defaults to `False`):
            Sample in pinned memory, which is always done for CUDA: only from there does a copy not block.

    Returns:
        `torch.Tensor` of shape `(B, *shape)`: float32.
    """
    pin_memory = pin_memory or torch.device(device).type == "cuda"
    noise = torch.empty(len(keys), *shape, dtype=torch.float32, pin_memory=pin_memory)
    for row, key in zip(noise, keys, strict=True):
        row.normal_(generator=keyed_generator(*key, "noise"))
    return noise.to(device, non_blocking=True)
