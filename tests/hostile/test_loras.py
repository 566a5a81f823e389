# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Whatever is in a LoRA file: each door that reads one works or says in one line what is wrong; nothing hangs, no pickle is loaded."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.hostile.limits import outcome
from tests.hostile.lora_cases import CASES, SLOW, saved
from trl_diffusion.backbones import load_backbone
from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.lora_export import export_lora
from trl_diffusion.lora_files import LORA_WEIGHTS_NAME, find_lora, load_lora, read_lora
from trl_diffusion.lora_headers import read_header
from trl_diffusion.trainer.attributes import read_expert
from trl_diffusion.trainer.initial_lora import read_initial_lora


@pytest.fixture(scope="module")
def doors(tmp_path_factory) -> dict:
    """Every function that a user's LoRA comes in by."""
    pipeline, base = tiny.sd_pipeline(), tmp_path_factory.mktemp("base")
    pipeline.save_pretrained(base)
    backbone = load_backbone(pipeline)
    return {
        "expert": read_expert,
        "initial": lambda folder: read_initial_lora(SimpleNamespace(initial_lora=str(folder)), backbone, None),
        "file": lambda folder: read_lora(folder / LORA_WEIGHTS_NAME, pipeline, "unet"),
        "evaluated": lambda folder: load_lora(pipeline, find_lora(folder), "evaluated"),
        "resolved": lambda folder: resolve_model("model", str(folder), base=str(base)),
        "exported": lambda folder: export_lora(folder, folder / "exported.safetensors"),
    }


def wrong(folder: Path, doors: dict) -> dict:
    """The doors that neither work nor refuse in one line, and what they do instead."""
    ended = {name: outcome(lambda door=door: door(folder)) for name, door in doors.items()}
    return {name: how for name, how in ended.items() if not how.is_right}


# One of each kind; all of them are slow
SOME = ("fifo", "link to itself", "pickle", "pickle beside", "header of 2^60 bytes", "header nested deeply", "100,000 keys",
        "shape of one dimension", "float8", "alpha complex", "metadata '1'", "lora_alpha=0", "rank_pattern={'(': 4}",
        "exclude_modules=1", "megatron_core=evil")  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_hostile_file_is_refused_in_one_line_or_works(tmp_path, doors, name):
    folder = tmp_path / "lora"
    folder.mkdir()
    CASES[name](folder)
    before = sorted(folder.iterdir())
    assert not wrong(folder, doors)
    assert not (tmp_path / "touched").exists() and [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert sorted(path for path in folder.iterdir() if path.name != "exported.safetensors") == before


PATTERNS = {
    True: [r".*attn2\.to_[kv]", "to_q", ".*", r"(.*)\.(to_q|to_k)", r".*blocks\.\d+\..*\.to_[qkv]",
           r"down_blocks\.[0-9]+\.attentions\.\d+\..*", "(?:conv_in)?"],
    False: [SLOW, "(a+)+$", "(a|a)*", "(.*a){20}", ".*" * 5 + "x", r"(\w+\.)*to_q", "a?" * 30 + "a" * 30, "(aa|a)" * 30,
            "(?=(a+)+)b", r"(a*)\1*", "(a{0,100}){0,100}", "(?P<x>.*)(?P=x)+", "(", "*", "x" * 3000, "(" * 900 + ")" * 900],
}  # fmt: skip


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
@pytest.mark.parametrize(("pattern", "is_taken"), [(p, taken) for taken, some in PATTERNS.items() for p in some])
def test_a_pattern_that_could_take_for_ever_is_refused(setting, pattern, is_taken):
    """The file says which modules it adapts, and Python's regular expressions have no limit of time."""
    text = json.dumps({f"unet.{setting}": {pattern: 4} if setting == "rank_pattern" else pattern})
    if is_taken:
        assert read_header(text, Path("lora"))
    else:
        with pytest.raises(
            ValueError, match=f"^The LoRA lora has the pattern .*as `{setting}` in its header, which .*Save"
        ):
            read_header(text, Path("lora"))


def test_a_harmless_file_passes_all_doors(tmp_path, doors):
    """What is refused above is not refused because everything is."""
    saved()(tmp_path)
    assert {name: outcome(lambda door=door: door(tmp_path)).kind for name, door in doors.items()} == dict.fromkeys(
        doors, "ok"
    )


# ----- any bytes -----

KEYS = st.sampled_from(
    ["unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.a.alpha", "__metadata__", "../x", "", "lora_unet_a.alpha"]
)
NUMBERS = st.one_of(st.integers(-1, 40), st.sampled_from([2**31, 2**62, 2**64]), st.floats(), st.none())
ENTRIES = st.one_of(
    st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "X", 1]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    }),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)),
)  # fmt: skip
HEADERS = st.dictionaries(KEYS, ENTRIES, max_size=4).map(lambda header: json.dumps(header).encode())
FILES = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda text, rest: struct.pack("<Q", len(text)) + text + rest, HEADERS, st.binary(max_size=64)),
    st.builds(lambda size, text: struct.pack("<Q", size) + text, st.integers(0, 2**64 - 1), HEADERS),
)
SETTINGS = st.dictionaries(
    st.sampled_from(["unet.r", "unet.lora_alpha", "unet.target_modules", "unet.rank_pattern", "unet.alpha_pattern", "unet.use_dora", "r", "unet.", "unet.exclude_modules", "unet.layers_pattern", "unet.megatron_config", "unet.init_lora_weights"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["to_q", ".*", "("]),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
        max_leaves=6,
    ),
)  # fmt: skip
QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def try_file(content: bytes, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LORA_WEIGHTS_NAME).write_bytes(content)
    for read in (read_lora, read_expert, lambda path: export_lora(path, folder / "out.safetensors")):
        try:
            read(folder)
        except ValueError as error:
            assert "\n" not in str(error) and str(folder) in str(error)


def try_settings(content: dict, folder: Path, pipeline) -> None:
    folder.mkdir(exist_ok=True)
    saved(**{key.removeprefix("unet."): value for key, value in content.items() if key.startswith("unet.")})(folder)
    for read in (read_lora, lambda path: load_lora(pipeline, find_lora(path), "any")):
        try:
            read(folder)
        except ValueError as error:
            assert "\n" not in str(error) and str(folder) in str(error)
        finally:
            pipeline.unload_lora_weights()


@given(FILES)
@settings(max_examples=60, **QUIET)
def test_any_bytes(tmp_path_factory, content):
    try_file(content, tmp_path_factory.getbasetemp() / "any")


@pytest.mark.slow
@given(FILES)
@settings(max_examples=5_000, **QUIET)
def test_very_many_bytes(tmp_path_factory, content):
    try_file(content, tmp_path_factory.getbasetemp() / "any")


@pytest.fixture(scope="module")
def pipeline():
    return tiny.sd_pipeline()


@given(content=SETTINGS)
@settings(max_examples=25, **QUIET)
def test_any_settings(tmp_path_factory, pipeline, content):
    try_settings(content, tmp_path_factory.getbasetemp() / "settings", pipeline)


@pytest.mark.slow
@given(content=SETTINGS)
@settings(max_examples=1_000, **QUIET)
def test_very_many_settings(tmp_path_factory, pipeline, content):
    try_settings(content, tmp_path_factory.getbasetemp() / "settings", pipeline)
