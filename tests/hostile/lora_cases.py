# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Folders that hold something hostile under the name of a LoRA file, one function call each."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from trl_diffusion.backbones.names import LORA_WEIGHTS_NAME


TARGET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
DEEP = "[" * 10_000 + "]" * 10_000
SLOW = r"(a|a)*(_|_)*((\w|\w)+)+\Z\b!"  # exponential on a name of 40 letters

Writer = Callable[[Path], Any]


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def header(text: str | bytes, length: int | None = None, rest: bytes = b"") -> Writer:
    """A file with this header, whose length may be said to be another."""
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return data(struct.pack("<Q", len(content) if length is None else length) + content + rest)


def data(content: bytes) -> Writer:
    return lambda folder: (folder / LORA_WEIGHTS_NAME).write_bytes(content)


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def layer(module: str = TARGET, r: int = 4, size: int = 16, prefix: str = "unet.") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{module}.lora_A.weight": torch.full((r, size), 0.1),
        f"{prefix}{module}.lora_B.weight": torch.full((size, r), 0.1),
    }


def saved(
    weights: dict[str, torch.Tensor] | None = None, metadata: str | dict | None = None, **settings: Any
) -> Writer:
    """A true safetensors file, with a configuration in its header as diffusers writes it, some settings of it changed."""
    weights = layer() if weights is None else weights

    def write(folder: Path) -> None:
        text = metadata
        if not isinstance(metadata, str):
            config = LoraConfig(r=4, lora_alpha=4, target_modules=[TARGET]).to_dict()
            config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()} | settings
            text = json.dumps(
                {f"unet.{key}": value for key, value in config.items()} if metadata is None else metadata
            )
        save_file(weights, folder / LORA_WEIGHTS_NAME, {"format": "pt", "lora_adapter_metadata": text})

    return write


def kohya(alpha: torch.Tensor, **changed: torch.Tensor) -> Writer:
    """A file of kohya's scripts."""
    name = f"lora_unet_{TARGET.replace('.', '_')}"
    weights = {
        f"{name}.lora_down.weight": torch.full((4, 16), 0.1),
        f"{name}.lora_up.weight": torch.full((16, 4), 0.1),
        f"{name}.alpha": alpha,
    }
    return lambda folder: save_file(weights | changed, folder / LORA_WEIGHTS_NAME)


def link(target: str) -> Writer:
    return lambda folder: (folder / LORA_WEIGHTS_NAME).symlink_to(target)


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(folder / LORA_WEIGHTS_NAME, "w") as file:
        file.writestr("../../evil.txt", "evil")


def with_values(value: float) -> dict[str, torch.Tensor]:
    weights = layer()
    next(iter(weights.values()))[0, 0] = value
    return weights


def pickled(name: str) -> Writer:
    """A pickle that makes the folder `touched` beside the LoRA's folder when it is loaded."""

    def write(folder: Path) -> None:
        content = {"unet.lora": Bomb(folder.parent / "touched")}
        if name.endswith(".ckpt"):
            torch.save(content, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(content))

    return write


CASES: dict[str, Writer] = {
    # what is there is no file of weights
    "empty": data(b""),
    "seven bytes": data(b"1234567"),
    "zeros": data(bytes(100)),
    "text": data(b"hello, I am a model"),
    "web page": data(b"<!doctype html><title>Sign in</title>"),
    "pointer": data(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "folder": lambda folder: (folder / LORA_WEIGHTS_NAME).mkdir(),
    "fifo": lambda folder: os.mkfifo(folder / LORA_WEIGHTS_NAME),
    "device": link("/dev/zero"),
    "link to itself": link(LORA_WEIGHTS_NAME),
    "link to nothing": link("nowhere"),
    "zip": zipped,
    "pickle": lambda folder: pickled(LORA_WEIGHTS_NAME)(folder),
    "pickle beside": lambda folder: pickled("pytorch_lora_weights.bin")(folder),
    "ckpt beside": lambda folder: pickled("pytorch_lora_weights.ckpt")(folder),
    "pt beside": lambda folder: pickled("adapter_model.pt")(folder),
    # headers
    "header of 2^60 bytes": header("{}", 2**60),
    "header of 2^64-1 bytes": header("{}", 2**64 - 1),
    "header longer by one": header("{}", 3),
    "header null": header("null"),
    "header list": header("[]"),
    "header number": header("1e999"),
    "header string": header('"x"'),
    "header without end": header('{"a":'),
    "header no utf-8": header(b"\xff\xfe\xff"),
    "header nested deeply": header('{"a":' + DEEP + "}"),
    "header empty": header("{}"),
    "header metadata null": header('{"__metadata__":null}'),
    "header metadata of numbers": header('{"__metadata__":{"a":1}}'),
    "header metadata nested": header('{"__metadata__":{"a":{"b":"c"}}}'),
    "entry null": header('{"a":null}'),
    "entry of another kind": header('{"a":[1,2]}'),
    "entry without offsets": header('{"a":{"dtype":"F32","shape":[1]}}'),
    "key twice": header('{"a":' + json.dumps(entry()) + ',"a":' + json.dumps(entry()) + "}", rest=bytes(4)),
    "unknown dtype": header(json.dumps({"a": entry("F1")}), rest=bytes(4)),
    "negative shape": header(json.dumps({"a": entry(shape=[-1])}), rest=bytes(4)),
    "shape of 2^62": header(json.dumps({"a": entry(shape=[2**62, 2**62])}), rest=bytes(4)),
    "shape of floats": header(json.dumps({"a": entry(shape=[1.5])}), rest=bytes(4)),
    "offsets reversed": header(json.dumps({"a": entry(offsets=(4, 0))}), rest=bytes(4)),
    "offsets overlapping": header(json.dumps({"a": entry(), "b": entry()}), rest=bytes(4)),
    "offsets beyond the end": header(json.dumps({"a": entry(offsets=(0, 2**50), shape=[2**48])}), rest=bytes(4)),
    "offsets with a hole": header(json.dumps({"a": entry(), "b": entry(offsets=(8, 12))}), rest=bytes(12)),
    "bytes after the end": header(json.dumps({"a": entry()}), rest=bytes(400)),
    # keys and shapes
    "key with ..": saved({"../../evil.lora_A.weight": torch.ones(4, 16), "../../evil.lora_B.weight": torch.ones(16, 4)}),
    "key absolute": saved({"/etc/x.lora_A.weight": torch.ones(4, 16), "/etc/x.lora_B.weight": torch.ones(16, 4)}),
    "key empty": saved({"": torch.ones(4, 16)}),
    "key of dots": saved({"...": torch.ones(4, 16)}),
    "key NUL": saved({"unet.\x00.lora_A.weight": torch.ones(4, 16)}),
    "key of 100,000 letters": saved(layer("x" * 100_000)),
    "key of code": saved(layer("__class__.__init__.__globals__")),
    "100,000 keys": header(
        json.dumps({f"unet.x{n}.lora_A.weight": entry(offsets=(4 * n, 4 * n + 4)) for n in range(100_000)}),
        rest=bytes(400_000),
    ),
    "A without B": saved({key: value for key, value in layer().items() if "lora_A" in key}),
    "B without A": saved({key: value for key, value in layer().items() if "lora_B" in key}),
    "module that is not there": saved(layer("mid_block.nothing.to_q")),
    "one module more": saved(layer() | layer("mid_block.nothing.to_q")),
    "module that is no layer": saved(layer("mid_block")),
    "wrong shape": saved(layer(size=17)),
    "shape without dimensions": saved({key: torch.ones(()) for key in layer()}),
    "shape of one dimension": saved({key: torch.ones(4) for key in layer()}),
    "shape of five dimensions": saved({key: torch.ones(4, 1, 1, 1, 16) for key in layer()}),
    "shape of rank 0": saved(layer(r=0)),
    "rank 0 in both": saved(layer(r=0), r=0),
    "int64": saved({key: value.long() for key, value in layer().items()}),
    "bool": saved({key: value.bool() for key, value in layer().items()}),
    "complex": saved({key: value.to(torch.complex64) for key, value in layer().items()}),
    "float8": saved({key: value.to(torch.float8_e4m3fn) for key, value in layer().items()}),
    "nan": saved(with_values(float("nan"))),
    "inf": saved(with_values(float("inf"))),
    "two ways of naming": saved(layer() | {"lora_unet_a.lora_down.weight": torch.ones(4, 16)}),
    "two components": saved(layer() | layer(prefix="transformer.")),
    "text encoder": saved(layer(prefix="text_encoder.")),
    "no prefix": saved(layer(prefix="")),
    "magnitudes without DoRA": saved(layer() | {f"unet.{TARGET}.lora_magnitude_vector": torch.ones(16)}),
    # kohya
    "alpha 0": kohya(torch.tensor(0.0)),
    "alpha nan": kohya(torch.tensor(float("nan"))),
    "alpha negative": kohya(torch.tensor(-4.0)),
    "alpha of two numbers": kohya(torch.ones(2)),
    "alpha without numbers": kohya(torch.ones(0)),
    "alpha huge": kohya(torch.tensor(3e38)),
    "alpha bool": kohya(torch.tensor(True)),
    "alpha complex": kohya(torch.tensor(1j)),
    "kohya of no module": kohya(torch.tensor(4.0), **{"lora_unet_nothing.lora_down.weight": torch.ones(4, 16)}),
    "kohya with a block of 10^30": kohya(
        torch.tensor(4.0),
        **{"lora_unet_input_blocks_" + "9" * 30 + "_1_proj_in.lora_down.weight": torch.ones(4, 16)},
    ),
    # the configuration
    **{f"metadata {text[:20]!r}": saved(metadata=text) for text in (
        "", "null", "[]", "1", '"x"', "{", "nan", "NaN", DEEP, '{"a":' * 20_000, "\ud800".encode("utf-8", "replace").decode(),
        '{"unet": 1}', '{"unet.r": 4}', '{"unet.": 1}', '{"": 1}', '{"unet.__class__": 1}', '{"unet.self": 1}',
        '{"unet.r": ' + "9" * 5000 + "}",
    )},
    **{f"{name}={str(value)[:30]}": saved(**{name: value}) for name, values in {
        "r": (0, -1, 10**12, 1.5, "4", None, True, [4], 1e300),
        "lora_alpha": (0, -1, float("nan"), float("inf"), 1e300, "4", None, [4], {}, 10**400),
        "target_modules": (SLOW, "(", "*", "", [], [SLOW], None, 1, {"a": 1}, [1], [None], "all-linear", ".*", ["x" * 10**5],
                           "(" * 5000 + ")" * 5000, [""], [[]]),
        "exclude_modules": (SLOW, "(", [1], 1, {}),
        "layers_pattern": ("(", SLOW, [1], 5),
        "layers_to_transform": ("a", [None], 1e9, [10**30], -1),
        "rank_pattern": ({SLOW: 4}, {"(": 4}, [], "x", {".*": 0}, {".*": "a"}, {".*": -3}, {".*": 10**12}, {"": 4}),
        "alpha_pattern": ({SLOW: 4}, {"(": 4}, ["a"], {".*": 0}, {".*": float("nan")}, {".*": None}),
        "peft_type": ("EVIL", "LOHA", None, 1, []),
        "auto_mapping": ({"base_model_class": "os.system", "parent_library": "evil"}, 1, "x"),
        "base_model_name_or_path": ("../../etc/passwd", "http://127.0.0.1:9/x", 1, "\x00"),
        "revision": ("../..", 1),
        "lora_dropout": (2, float("nan"), "a", -1),
        "use_dora": ("yes", True, 1, []),
        "use_rslora": ("yes", [], True),
        "use_bdlora": ("x", {"a": 1}, True),
        "init_lora_weights": ("pissa", "evil", [], {}, 1),
        "lora_bias": (True, "x"),
        "bias": ("all", 1),
        "modules_to_save": (["conv_in"], "x", 1),
        "task_type": ("CAUSAL_LM", "x", 1),
        "megatron_config": ({}, "x"),
        "megatron_core": ("os", "evil"),
        "loftq_config": ({"a": 1}, 1),
        "eva_config": ({}, {"rho": 2}),
        "corda_config": ({"cache_file": "/etc/x"}, 3),
        "layer_replication": ([[0, 1]], "x"),
        "trainable_token_indices": ([1], {"a": [1]}),
        "runtime_config": ({}, {"ephemeral_gpu_offload": 1}, 1),
        "target_parameters": (["a"], 1),
        "inference_mode": ("x", True),
        "fan_in_fan_out": (True, "x"),
        "unknown": (1,),
        "__post_init__": (1,),
    }.items() for value in values},
}  # fmt: skip
