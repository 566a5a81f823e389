# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Finds the row of a key among millions, with a few bytes of memory for each."""

from bisect import bisect_right

import pyarrow as pa
import pyarrow.compute as pc


KEYS_AT_ONCE = 64


class KeyIndex:
    """
    The places of keys, sorted in Arrow: a `dict` of a million texts takes ten times the memory, and seconds to make.

    Args:
        keys (`pa.ChunkedArray` or `pa.Array`):
            Texts, of which no two are equal; one may be null.
    """

    def __init__(self, keys: pa.ChunkedArray | pa.Array):
        keys = keys.cast(pa.large_string())
        keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
        order = pc.sort_indices(keys)  # nulls last; by UTF-8, which is the order of Python's texts
        known = len(keys) - keys.null_count
        self.null = order[known].as_py() if keys.null_count else None
        self.places = order.slice(0, known)
        self.keys = keys.take(self.places)
        self.firsts = self.keys.take(pa.array(range(0, known, KEYS_AT_ONCE), pa.int64())).to_pylist()

    def __contains__(self, key: str | None) -> bool:
        return self._find(key) is not None

    def __getitem__(self, key: str | None) -> int:
        place = self._find(key)
        if place is None:
            raise KeyError(key)
        return place

    def _find(self, key: str | None) -> int | None:
        if key is None:
            return self.null
        start = max(0, bisect_right(self.firsts, key) - 1) * KEYS_AT_ONCE
        keys = self.keys.slice(start, KEYS_AT_ONCE).to_pylist()
        return self.places[start + keys.index(key)].as_py() if key in keys else None
