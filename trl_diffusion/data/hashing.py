# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Hashes of Arrow columns by their values. No value becomes a Python object."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pandas.util import hash_array


ROWS_AT_ONCE = 10_000
NULL = np.uint64(0x9E3779B97F4A7C15)  # the hash of null


def update_hash(digest: Any, column: pa.ChunkedArray) -> None:
    """
    Adds a column to a hash. It is the same for equal values, whatever chunks, offsets and widths of types hold them: those of
    `int32` and `int64`, of lists of all kinds, of all types of text.

    Args:
        digest:
            A hash of `hashlib`.
        column (`pa.ChunkedArray`):
            Null, numbers, texts, bytes, or lists and structs of these. Other types are hashed as Python objects.
    """
    for start in range(0, len(column), ROWS_AT_ONCE):
        _update(digest, column.slice(start, ROWS_AT_ONCE).combine_chunks())


def hash_of(column: pa.ChunkedArray) -> str:
    """The hash of a column, see [`data.hashing.update_hash`]."""
    digest = hashlib.blake2b(digest_size=16)
    update_hash(digest, column)
    return digest.hexdigest()


def _update(digest: Any, values: pa.Array) -> None:
    kind = values.type
    digest.update(repr((_family(kind), len(values), values.null_count)).encode())
    if values.null_count and not pa.types.is_null(kind):
        digest.update(np.packbits(values.is_null().to_numpy(zero_copy_only=False)))
    if pa.types.is_struct(kind):
        for name, part in zip(kind.names, values.flatten(), strict=True):
            digest.update(repr(name).encode())
            _update(digest, part)
    elif _is_list(kind):
        digest.update(_numbers(pc.list_value_length(values), np.int64))
        _update(digest, values.flatten())
    elif _is_text(kind) or _is_bytes(kind):
        known = values.cast(pa.large_string() if _is_text(kind) else pa.large_binary()).drop_null()
        digest.update(_numbers(pc.binary_length(known), np.int64))
        _, offsets, content = known.buffers()
        if len(known):
            places = np.frombuffer(offsets, np.int64)
            digest.update(content[places[known.offset] : places[known.offset + len(known)]])
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        digest.update(_numbers(values, np.uint64 if kind == pa.uint64() else np.int64))
    elif pa.types.is_floating(kind):
        digest.update(_numbers(values, np.float64))
    elif not pa.types.is_null(kind):
        digest.update(repr(values.to_pylist()).encode())


def described(kind: pa.DataType) -> str:
    """What the values of a type are, whatever widths they have."""
    if pa.types.is_struct(kind):
        return repr({field.name: described(field.type) for field in kind})
    return f"list of {described(kind.value_type)}" if _is_list(kind) else _family(kind)


def value_hashes(values: pa.Array) -> np.ndarray:
    """
    A hash of each value.

    Args:
        values (`pa.Array` of length `N`):
            Values, as [`data.hashing.update_hash`] takes them.

    Returns:
        `np.ndarray` of shape `(N,)`: uint64, the same for equal values of types with one description, see [`data.hashing.described`].
    """
    kind = values.type
    if pa.types.is_null(kind):
        return np.full(len(values), NULL)
    if pa.types.is_struct(kind):
        parts = [value_hashes(part) for part in values.flatten()]
        hashes = sum((hash_array(part + np.uint64(place)) for place, part in enumerate(parts)), np.uint64(len(parts)))
    elif _is_list(kind):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy().astype(np.int64)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        places = (np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)).astype(np.uint64)
        sums = np.zeros(ends[-1] + 1, np.uint64)
        np.cumsum(hash_array(value_hashes(values.flatten()) + places), out=sums[1:])
        hashes = hash_array(sums[ends[1:]] - sums[ends[:-1]] + lengths.astype(np.uint64))
    elif _is_text(kind) or _is_bytes(kind):
        hashes = hash_array(np.array(values.to_pylist(), object), categorize=False)
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        numbers = pc.fill_null(values, pa.scalar(0).cast(kind)).to_numpy(zero_copy_only=False)
        hashes = hash_array(numbers.astype(np.uint64 if kind == pa.uint64() else np.int64))
    elif pa.types.is_floating(kind):
        numbers = pc.fill_null(values, pa.scalar(0.0).cast(kind)).to_numpy(zero_copy_only=False)
        hashes = hash_array(numbers.astype(np.float64))
    else:
        hashes = hash_array(np.array([repr(value) for value in values.to_pylist()], object))
    if values.null_count:
        hashes = np.where(values.is_null().to_numpy(zero_copy_only=False), NULL, hashes)
    return hashes


def _numbers(values: pa.Array, kind: type) -> np.ndarray:
    return np.ascontiguousarray(values.drop_null().to_numpy(zero_copy_only=False).astype(kind))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _family(kind: pa.DataType) -> str:
    """What the values are, whatever type holds them."""
    families = {
        "list": _is_list,
        "struct": pa.types.is_struct,
        "text": _is_text,
        "bytes": _is_bytes,
        "integer": pa.types.is_integer,
        "number": pa.types.is_floating,
    }
    return next((name for name, holds in families.items() if holds(kind)), str(kind))
