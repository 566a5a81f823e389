# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import tempfile
from pathlib import Path

import pytest

from trl_diffusion.machine import all_without_places, public_name, without_places, without_secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No such file: '/home/My Name/x y.png'", "No such file: 'x y.png'"),
        ("cannot open /home/me/a/b.png, sorry", "cannot open b.png, sorry"),
        ("/home/me/models/judge/", "judge"),
        ("see ~/data/x.png and ~me/data/y.png", "see x.png and y.png"),
        ("../../pairs/images/x.png: bad", "x.png: bad"),
        (r"C:\Users\me\x.png failed", "x.png failed"),
        (r"'C:\Users\my me\x.png' failed", "'x.png' failed"),
        ("(/data/shared/x.png)", "(x.png)"),
        ("redirects to http://gpu-7:8000/v1/chat today", "redirects to (an address) today"),
        ("10.0.0.1:8000 refuses, localhost:80/v1 too", "(an address) refuses, (an address) too"),
        ("s3://bucket/key and file:///home/me/x", "(an address) and (an address)"),
        ("https://user:password@huggingface.co/x", "(an address)"),
        ("https://huggingface.co/x?token=hf_secret", "(an address)"),
        ("https://huggingface.co.evil.com/x", "(an address)"),
    ],
)
def test_places_are_left_out(text, expected):
    """Of a path the last part stays, of an address nothing; the rest of the text is as it was."""
    assert without_places(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "and/or a 1/2 red, 50 / 60",
        "images/first/00000_0.png",
        "user/name",
        "torch 2.6.0+cu124",
        "https://huggingface.co/user/name/blob/main/x.safetensors",
        "https://github.com/mseitzer/pytorch-fid/releases/x.pth",
        "sha256:0123456789abcdef",
        "planner: the answer is no JSON: [1, 2]",
        "",
    ],
)
def test_what_is_no_place_stays(text):
    """Names, relative files, public addresses, versions and fractions are not touched."""
    assert without_places(text) == text


def test_known_folders_may_have_spaces():
    """The folders of this process, and those that are given, are left out also where their names have spaces and no quotes."""
    for folder in (Path.cwd(), Path.home(), tempfile.gettempdir()):
        assert without_places(f"{folder}/evaluation/x.png is bad") == "x.png is bad"
    assert without_places("/srv/my data/x.png is bad", ("/srv/my data",)) == "x.png is bad"


def test_of_a_path_the_last_part_is_the_name(tmp_path, monkeypatch):
    """Whatever is in it, and of a relative one if it is there; a Hub id, a sentence and an address stay."""
    assert (
        public_name("/data/my models/judge") == public_name(r"C:\my models\judge") == public_name("./judge") == "judge"
    )
    for name in ("user/judge", "prompt of the judge", "https://huggingface.co/user/judge", "judge"):
        assert public_name(name) == name
    (tmp_path / "user" / "judge").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("user/judge") == "judge"


def test_all_texts_of_json_values():
    """Keys and values at every depth; numbers and None stay, tuples become lists."""
    value = {"/data/models/judge": ["/data/x/y", 1, None, {"a": ("~/b/c", 2.5)}], "b": True}
    assert all_without_places(value) == {"judge": ["y", 1, None, {"a": ["c", 2.5]}], "b": True}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no http://user:pass@host:8/v1?key=abc&x=%20d here", "no http://***@host:8/v1?key=***&x=*** here"),
        ("Path made 'https:/user:p%20w@host/x' of it", "Path made 'https:/***@host/x' of it"),
        ("token hf_abcdefghijkl, sk-abcdefghij and AKIAABCDEFGHIJKLMNOP.", "token ***, *** and ***."),
        ("mail to a@b.de, hf_x, what? a=b", "mail to a@b.de, hf_x, what? a=b"),
        ("the variable holds a/secret+value here", "the variable holds *** here"),
        ("quoted a%2Fsecret%2Bvalue here", "quoted *** here"),
        ("https://huggingface.co/user/model/blob/main/x", "https://huggingface.co/user/model/blob/main/x"),
    ],
)
def test_secrets_are_hidden(monkeypatch, text, expected):
    """Tokens, what stands before a host and in a query, and what secret variables hold; nothing else."""
    monkeypatch.setenv("SOME_SECRET", "a/secret+value")
    monkeypatch.setenv("SOME_TOKEN", "none")
    assert without_secrets(text) == expected
