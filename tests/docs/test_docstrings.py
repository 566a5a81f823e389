# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Docstrings are read as they are meant, and the laws of `docs/laws.py` find what breaks them and nothing else."""

import dataclasses
from pathlib import Path

import pytest
import torch

from docs import laws
from docs.docstrings import Entry, entries, find, kinds_of, sections


PAGES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parents[2] / "docs" / "source").glob("*.md"))
}


# ---- Reading ----


def test_sections():
    """A docstring is its first text, its sections in order, and what follows them without indentation."""
    docstring = "Adds.\n\nArgs:\n    a (`int`):\n        One.\n\nReturns:\n    `int`: the sum.\n\n> [!NOTE]\n> Slow."
    assert sections(docstring) == [
        ("", "Adds."),
        ("Args", "a (`int`):\n    One."),
        ("Returns", "`int`: the sum."),
        ("", "> [!NOTE]\n> Slow."),
    ]


@pytest.mark.parametrize(
    ("head", "kinds"),
    [
        ("a (`int`)", {"a": "`int`"}),
        ("a (`torch.Tensor` of shape `(B, N)`, bool)", {"a": "`torch.Tensor` of shape `(B, N)`, bool"}),
        ("a (`int`), b (`str`, *optional*)", {"a": "`int`", "b": "`str`, *optional*"}),
        ("**more", {"**more": ""}),
    ],
)
def test_names_and_kinds(head, kinds):
    """A comma in parentheses separates no names."""
    assert kinds_of(head) == kinds


def test_entries():
    """A group's title is an entry without names; a text keeps its paragraphs, without their indentation."""
    text = "> Parameters that control it\n\na (`int`):\n    One.\n\n    Two.\nb (`str`):\n    Three."
    assert entries(text) == [
        Entry({}, "Parameters that control it", ""),
        Entry({"a": "`int`"}, "a (`int`)", "One.\n\nTwo."),
        Entry({"b": "`str`"}, "b (`str`)", "Three."),
    ]


def test_find():
    """Names are found from the package, in its modules and in classes; another name is an error that says it."""
    assert find("losses.diffusion_dpo_loss").__name__ == "diffusion_dpo_loss"
    assert find("process.Process.target").__qualname__ == "Process.target"
    with pytest.raises(ValueError, match="`losses.missing` is not in trl_diffusion"):
        find("losses.missing")


# ---- Laws that find faults ----


def sound(latents: torch.Tensor, height: int, seed: int = 0) -> torch.Tensor:
    """
    Crops latents.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`):
            Latents.
        height (`int`):
            Height in pixels.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        `torch.Tensor` of shape `(B, C, h, w)`: the crop.

    Raises:
        `ValueError`: If the height is negative.
    """
    if height < 0:
        raise ValueError("`height` must not be negative.")
    return latents


BREAKS = {
    "`height` has no entry": ("        height (`int`):\n            Height in pixels.\n    ", "    "),
    "`width` is no argument": ("seed (`int`", "width (`int`"),
    "`height` has no type": ("height (`int`):", "height:"),
    "`latents` is a tensor without a shape": ("latents (`torch.Tensor` of shape `(B, C, h, w)`)", "latents (`torch.Tensor`)"),
    "`seed` has a default: check *optional*": ("*optional*, defaults to `0`", "a number"),
    "`height` has no default: check *optional*": ("height (`int`)", "height (`int`, *optional*)"),
    "the default of `seed` is 0, not 1": ("defaults to `0`", "defaults to `1`"),
    "it has no Returns": ("    Returns:\n        `torch.Tensor` of shape `(B, C, h, w)`: the crop.\n\n", ""),
    "its result has no type": ("`torch.Tensor` of shape `(B, C, h, w)`: the crop.", "the crop."),
    "its result is a tensor without a shape": ("`torch.Tensor` of shape `(B, C, h, w)`: the crop", "`torch.Tensor`: the crop"),
    "it raises a ValueError, which its docstring does not list": ("    Raises:\n        `ValueError`: If the height is negative.\n", ""),
    "`height` has no unit: one of pixel|cell|grid": ("Height in pixels.", "Height."),
    "it has no source: a paper, an address, or (ours)": ("Crops latents.\n", "Crops latents.\n\n        x_t = a x_0 + s eps\n"),
}  # fmt: skip


def test_a_sound_docstring_has_no_faults(monkeypatch):
    """What keeps every law is not complained of."""
    monkeypatch.setattr(laws, "find", lambda name: sound)
    assert laws.object_faults("sound") == []


@pytest.mark.parametrize("fault", BREAKS)
def test_a_broken_law_is_found(fault, monkeypatch):
    """Each law, broken alone, is named."""
    before, after = BREAKS[fault]
    assert sound.__doc__.count(before) == 1
    monkeypatch.setattr(sound, "__doc__", sound.__doc__.replace(before, after))
    monkeypatch.setattr(laws, "find", lambda name: sound)
    assert fault in laws.object_faults("sound")


def test_a_field_of_a_configuration_is_missed(monkeypatch):
    """A field that a configuration adds needs an entry; one that it inherits does not."""

    @dataclasses.dataclass
    class BaseConfig:
        known: int = 1

    @dataclasses.dataclass
    class OwnConfig(BaseConfig):
        """
        Parameters.

        Parameters:
            beta (`float`, *optional*, defaults to `2.0`):
                Strength.
        """

        beta: float = 2.0
        forgotten: int = 3

    monkeypatch.setattr(laws, "find", lambda name: OwnConfig)
    assert laws.object_faults("OwnConfig") == ["`forgotten` has no entry"]


def test_a_public_name_without_a_page_is_found():
    """A page that is taken away leaves its names without one."""
    rest = {name: text for name, text in PAGES.items() if name != "complex_po_trainer"}
    missing = {fault.split("`")[1] for fault in laws.page_faults(rest)}
    assert {"ComplexPOTrainer", "ComplexPOConfig", "negative_preference_guidance"} <= missing
    shortened = PAGES | {"complex_po_trainer": PAGES["complex_po_trainer"].replace("    - push_to_hub\n", "")}
    assert [fault.split("`")[1] for fault in laws.page_faults(shortened)] == ["ComplexPOTrainer.push_to_hub"]


# ---- The documentation keeps them ----


def test_every_public_name_is_on_a_page():
    """All public names, and what users call of each trainer, are documented."""
    assert laws.page_faults(PAGES) == []


@pytest.mark.parametrize("name", laws.documented_objects(PAGES))
def test_docstring(name):
    """Each documented object keeps the laws: arguments, types, shapes, units, defaults, results, errors, sources."""
    assert laws.object_faults(name) == []
