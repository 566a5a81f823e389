# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Images of strangers: in training, in the check of a dataset and in the annotation."""

import os
import resource
import subprocess

import pytest
from hypothesis import given

from tests.fuzz.strategies import CONTROL, IMAGES, NO_IMAGES, broken_images, encoded, few, image_bytes, lawful, many
from trl_diffusion.annotation.records import PAIR_COLUMNS, open_images, read_pair
from trl_diffusion.data.check import describe_image
from trl_diffusion.data.collators import InstancePairCollator
from trl_diffusion.data.formats import read_image
from trl_diffusion.data.images import image_content


BUCKETS = [(8, 8), (8, 16), (16, 8)]


def row(image) -> dict:
    box = [0, 0, 1, 1]
    instance = {"label": "dog", "chosen_box": box, "rejected_box": box, "preference": "tie"}
    return {"id": "r\x1b1", "prompt": "a dog", "chosen": image, "rejected": IMAGES["png"], "instances": [instance]}


def through_every_door(image, named: tuple[str, ...] = ("`chosen`", "'r\\x1b1'")):
    batch = lawful(lambda: InstancePairCollator(8)([row(image)]), *named)
    if isinstance(batch, dict):
        assert batch["chosen_pixel_values"].shape == (1, 3, 8, 8)
        assert ((batch["chosen_boxes"] >= 0) & (batch["chosen_boxes"] <= 1)).all()
    lawful(lambda: InstancePairCollator(8, buckets=BUCKETS, random_flip=True, center_crop=False)([row(image)]), *named)
    lawful(lambda: read_image(row(image), "chosen", describe_image), *named)
    record = lawful(lambda: read_pair(row(image), PAIR_COLUMNS))
    lawful(lambda: open_images(record))
    assert record.status == "ok" or record.reason.startswith("chosen: ") and not CONTROL.search(record.reason)
    return batch


@few(60)
@given(image_bytes)
def test_any_bytes(data):
    """Whatever the bytes are, a row is read, or its column and id are named."""
    through_every_door(data)


@pytest.mark.slow
@many(2000)
@given(broken_images())
def test_many_broken_images(data):
    """An image with a few bytes changed, left out or put in."""
    through_every_door(data)


@pytest.mark.parametrize("name", IMAGES)
def test_what_is_an_image_is_read(name):
    """Every kind of image becomes pixels."""
    assert isinstance(through_every_door(IMAGES[name]), dict)


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_refused(name):
    """What is none is refused with a reason, and takes no more memory than it is large."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert isinstance(through_every_door(NO_IMAGES[name]), str)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_no_program_is_started_for_a_drawing(monkeypatch):
    """Pillow would run Ghostscript on an EPS file."""

    def started(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    assert "drawing (EPS)" in through_every_door(NO_IMAGES["eps"])


@pytest.mark.parametrize(
    "path, reason",
    [
        ("/dev/zero", "is no file but a device or a pipe"),
        ("/proc/self/mem", "cannot be read"),
        ("/etc", "is a folder"),
        ("http://127.0.0.1:9/a.png", "is an address"),
        ("https://127.0.0.1:9/a.png", "is an address"),
        ("ftp://127.0.0.1/a.png", "is an address"),
        ("file:///etc/passwd", "is an address"),
        ("s3://bucket/a.png", "is an address"),
        ("memory://a.png", "is an address"),
        ("zip://a.png::http://127.0.0.1:9/a.zip", "is an address"),
        ("simplecache::/etc/passwd", "is no place in an archive"),
        ("zip://a.png::/etc/passwd", "cannot be read"),
        ("/missing\x1b[2J.png", "cannot be read"),
        ("a\0b", "cannot be read"),
        ("a" * 5000, "cannot be read"),
        ("\ud800.png", "cannot be read"),
        ("/etc/passwd", "not an image"),
        ("", "expected an image"),
        (5, "expected an image"),
        (["a.png"], "expected an image"),
        ({"bytes": 5, "path": 6}, "expected an image"),
        ({"bytes": None, "path": None}, "expected an image"),
        ({}, "expected an image"),
        (None, "expected an image"),
    ],
)
def test_what_is_no_file_is_not_opened(path, reason):
    """An address, a device, a folder, another scheme: refused by name, and nothing is waited for."""
    message = through_every_door(path)
    assert reason in message


def test_a_pipe_is_not_waited_for(tmp_path):
    """A named pipe under the name of an image is refused, also behind a link."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "c.png").symlink_to("c.png")
    for name, reason in (("a.png", "device or a pipe"), ("b.png", "device or a pipe"), ("c.png", "cannot be read")):
        assert reason in through_every_door(str(tmp_path / name))


def test_a_file_without_end_is_not_read(tmp_path, monkeypatch):
    """A file that is larger than any image is read up to there."""
    monkeypatch.setattr("trl_diffusion.data.images.LARGEST_FILE", 2**20)
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)
    assert "is larger than" in through_every_door(str(tmp_path / "a.png"))
    (tmp_path / "b.png").write_bytes(encoded())
    assert image_content(str(tmp_path / "b.png")) == encoded()
