# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Run-length encodings of masks."""

import base64
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_diffusion.segmentation import decode_rle, encode_rle, mask_bounds


def disc(height: int, width: int, y: int, x: int, squared_radius: int) -> np.ndarray:
    rows, columns = np.ogrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 < squared_radius


# Encoded by `pycocotools.mask.encode`, version 2.0.11
OF_COCO = {
    "small disc": (disc(5, 7, 2, 3, 5), "7132N20N2N4"),
    "disc": (
        disc(48, 64, 20, 30, 300),
        "Qd07V16K4L4M2N2N2N2O0O2O0O2O000O2O000000000001N10001N101N101N2N2N2N3L4L5Jbg0",
    ),
    "stripes": ((np.arange(60) % 7 < 3).reshape(6, 10), "0120O10O11OO0020N0100000O020N0011OO10O11OO000"),
    "all": (np.ones((40, 50), bool), "0`n1"),
    "none": (np.zeros((40, 50), bool), "`n1"),
}


@pytest.mark.parametrize("name", OF_COCO)
def test_strings_are_those_of_coco(name):
    """A mask is encoded as pycocotools encodes it, and read from it, as text and as bytes."""
    mask, counts = OF_COCO[name]
    assert encode_rle(mask) == {"size": list(mask.shape), "counts": counts}
    for given_counts in (counts, counts.encode()):
        assert np.array_equal(decode_rle({"size": list(mask.shape), "counts": given_counts}), mask)


def test_counts_by_hand():
    """In columns: one pixel outside, two inside, three outside, of 2 x 3 pixels."""
    expected = [[False, True, False], [True, False, False]]
    assert decode_rle({"size": [2, 3], "counts": [1, 2, 3]}).tolist() == expected
    assert encode_rle(np.array(expected))["counts"] == "123"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31))
def test_decoding_is_the_inverse_of_encoding(height, width, share, seed):
    """Any mask comes back from its string, and from the runs that are counted one by one."""
    mask = np.random.default_rng(seed).random((height, width)) < share
    assert np.array_equal(decode_rle(encode_rle(mask)), mask)
    counts, inside = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != inside:
            counts.append(0)
            inside = pixel
        counts[-1] += 1
    assert np.array_equal(decode_rle({"size": [height, width], "counts": counts}), mask)


FAULTS = {
    "no size": ({"counts": [4]}, "`size` must be two positive integers, .* got None"),
    "three sides": ({"size": [2, 2, 1], "counts": [4]}, "`size` must be two positive integers"),
    "no height": ({"size": [0, 2], "counts": [0]}, "`size` must be two positive integers"),
    "a fraction": ({"size": [2.0, 2], "counts": [4]}, "`size` must be two positive integers"),
    "a truth": ({"size": [True, 4], "counts": [4]}, "`size` must be two positive integers"),
    "a huge size": ({"size": [10**9, 10**9], "counts": [10**18]}, "is larger than any image's"),
    "no counts": ({"size": [2, 2]}, "`counts` must be a string or a list of integers, got None"),
    "texts": ({"size": [2, 2], "counts": ["4"]}, "`counts` must be a string or a list of integers"),
    "numbers beyond int64": (
        {"size": [2, 2], "counts": [4, 10**30, -(10**30)]},
        "`counts` must be a string or a list",
    ),
    "too few": ({"size": [2, 2], "counts": [1, 2]}, r"add up to 3 pixels, but a mask of 2 x 2 has 4"),
    "too many": ({"size": [2, 2], "counts": [1, 4]}, r"add up to 5 pixels"),
    "nothing": ({"size": [2, 2], "counts": []}, r"add up to 0 pixels"),
    "an empty string": ({"size": [2, 2], "counts": ""}, r"add up to 0 pixels"),
    "a negative length": ({"size": [2, 2], "counts": [5, -1]}, r"have a negative length, -1"),
    "a negative length in a string": ({"size": [2, 2], "counts": "5O"}, r"have a negative length, -1"),
    "other characters": ({"size": [2, 2], "counts": "4 "}, "are no string of COCO's run-length encoding"),
    "not of ASCII": ({"size": [2, 2], "counts": "4é"}, "add up to|no string"),
    "bytes as Python shows them": (
        {"size": [6, 10], "counts": str(OF_COCO["stripes"][1].encode())},
        r"are no string of COCO's .*: they are bytes .*, write `counts.decode\(\)`",
    ),
    "starts and lengths": (
        {"size": [2, 2], "counts": "1 2"},
        r"are no string of COCO's run-length encoding; `trl_diffusion.segmentation.encode_rle\(mask\)` makes those of",
    ),
    "packed and as base64": (
        {"size": [48, 64], "counts": base64.b64encode(zlib.compress(OF_COCO["disc"][1].encode())).decode()},
        r"`counts` .*; `trl_diffusion.segmentation.encode_rle\(mask\)` makes those of a mask",
    ),
    "an array": ({"size": [2, 2], "counts": np.array([1, 3])}, r"must be a string or a list of integers, got array"),
    "cut off": ({"size": [2, 2], "counts": "`"}, "are no string of COCO's run-length encoding"),
    "a number without end": (
        {"size": [2, 2], "counts": "o" * 10**6 + "0"},
        "have a number that is larger than any image",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_encodings_are_refused(name):
    """What is no mask of its size is a ValueError that says why, however large it claims to be."""
    rle, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        decode_rle(rle)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=30), st.text(max_size=30), st.lists(st.integers(), max_size=9)))
def test_any_counts_are_read_or_refused(counts):
    """Whatever a stranger writes is a mask or a ValueError."""
    try:
        assert decode_rle({"size": [7, 5], "counts": counts}).shape == (7, 5)
    except ValueError as error:
        assert "`counts`" in str(error)


def test_bounds_by_hand():
    """The box around the pixels of a mask ends one pixel after the last of them; an empty mask has none."""
    mask = np.zeros((6, 9), bool)
    mask[2, 3:5] = mask[4, 7] = True
    assert mask_bounds(mask) == [3, 2, 8, 5]
    assert mask_bounds(np.zeros((6, 9), bool)) == [0, 0, 0, 0]
