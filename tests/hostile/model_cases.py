# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What may be wrong with a pipeline's folder that somebody else made: each case changes a good one."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.lora_cases import DEEP, Bomb


Change = Callable[[Path], Any]
INDEX, UNET, TEXT, VAE = "model_index.json", "unet/config.json", "text_encoder/config.json", "vae/config.json"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
EVIL = "import os\nos.mkdir({canary!r})\n"


def canary(folder: Path) -> str:
    """What evil code makes, beside the folder."""
    return str(folder.parent / "touched")


def settings(file: str, **changed: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | changed))

    return change


def text(file: str, content: str | bytes) -> Change:
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(content)


def code(file: str, *changes: Change) -> Change:
    """Puts evil code into the folder, beside other changes."""

    def change(folder: Path) -> None:
        (folder / file).write_text(
            EVIL.format(canary=canary(folder))
            + "from diffusers import *\nfrom transformers import *\nclass Evil: pass\n"
        )
        for each in changes:
            each(folder)

    return change


def pickled(part: str, name: str, is_zip: bool = True, keeps: bool = False, evil: bool = True) -> Change:
    """Weights as a pickle in place of safetensors, or beside them."""

    def change(folder: Path) -> None:
        file = folder / part / WEIGHTS[part]
        weights: dict[str, Any] = load_file(file)
        if evil:
            weights["evil"] = Bomb(Path(canary(folder)))
        if is_zip:
            torch.save(weights, folder / part / name)
        else:
            (folder / part / name).write_bytes(pickle.dumps(weights))
        if not keeps:
            file.unlink()

    return change


def sharded(part: str, *names: Any) -> Change:
    """An index of shards with these file names."""

    def change(folder: Path) -> None:
        file = folder / part / WEIGHTS[part]
        weights = load_file(file)
        outside = folder.parent / "outside.safetensors"
        shutil.copy(file, outside)
        file.rename(folder / part / "good.safetensors")
        pickled_file = folder / part / "evil.bin"
        torch.save({**weights, "evil": Bomb(Path(canary(folder)))}, pickled_file)
        index = {"metadata": {}, "weight_map": {key: names[n % len(names)] for n, key in enumerate(weights)}}
        (folder / part / f"{WEIGHTS[part]}.index.json").write_text(json.dumps(index))

    return change


def instead_of_weights(part: str, content: bytes) -> Change:
    """An index of shards, and no shards."""

    def change(folder: Path) -> None:
        (folder / part / WEIGHTS[part]).unlink()
        (folder / part / f"{WEIGHTS[part]}.index.json").write_bytes(content)

    return change


def weights(part: str, change_weights: Callable[[dict], Any]) -> Change:
    def change(folder: Path) -> None:
        content = load_file(folder / part / WEIGHTS[part])
        change_weights(content)
        save_file(content, folder / part / WEIGHTS[part])

    return change


def truncated(part: str) -> Change:
    def change(folder: Path) -> None:
        file = folder / part / WEIGHTS[part]
        file.write_bytes(file.read_bytes()[:-100])

    return change


def instead(file: str, make: Callable[[Path], Any]) -> Change:
    """Another kind of thing under the name of a file."""

    def change(folder: Path) -> None:
        path = folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return change


def first(content: dict) -> torch.Tensor:
    return next(value for value in content.values() if value.is_floating_point())


REMOTE = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
CASES: dict[str, Change] = {
    # the index
    **{f"index {content[:20]!r}": text(INDEX, content) for content in
       (b"", b"null", b"[]", b"1", b'"x"', b"{", b"\xff\xfe", b"{}", DEEP.encode(), b'{"a":' * 20_000, b'{"_class_name": 1e999}')},
    **{f"_class_name={str(value)[:40]}": settings(INDEX, _class_name=value) for value in
       (None, 1, "", [], {}, "../x", "/etc/passwd", "os", "DiffusionPipeline", "UNet2DModel", "utils", "x" * 10**5, "\u202eevil",
        "__builtins__", "KandinskyCombinedPipeline", "AutoPipelineForText2Image", "FluxPipeline", "StableDiffusionInpaintPipeline")},
    "_class_name of code": code("pipeline.py", settings(INDEX, _class_name=["pipeline", "Evil"])),
    "_class_name of code elsewhere": code("../evil.py", settings(INDEX, _class_name=["../evil", "Evil"])),
    "pipeline.py beside": code("pipeline.py"),
    **{f"unet={str(value)[:40]}": settings(INDEX, unet=value) for value in
       (["mycode", "Evil"], ["../x", "Evil"], ["os", "system"], ["subprocess", "Popen"], ["builtins", "eval"], ["diffusers", "../x"],
        ["diffusers", "DiffusionPipeline"], ["transformers", "pipeline"], ["transformers", "AutoModel"], ["diffusers"], [], [1, 2],
        ["diffusers", None], "x", 1, {}, ["a", "b", "c"], ["diffusers", "FluxTransformer2DModel"], ["", ""], ["diffusers", "utils"],
        ["x" * 10**5, "y"], ["sys", "modules"], ["trl_diffusion", "export_lora"])},
    "component of code": code("unet/evil.py", settings(INDEX, unet=["evil", "Evil"])),
    "component of code elsewhere": code("evil.py", settings(INDEX, unet=["../evil", "Evil"])),
    "scheduler of code": code("scheduler/evil.py", settings(INDEX, scheduler=["evil", "Evil"])),
    "component with a path": settings(INDEX, **{"../../evil": ["diffusers", "UNet2DConditionModel"]}),
    "component absolute": settings(INDEX, **{"/etc": ["diffusers", "UNet2DConditionModel"]}),
    "component more": settings(INDEX, evil=["diffusers", "UNet2DConditionModel"]),
    **{f"_diffusers_version={value}": settings(INDEX, _diffusers_version=value) for value in ("x", None, [], "9" * 4000, 1)},
    "_ignore_files": settings(INDEX, _ignore_files=["../x"]),
    "requires_safety_checker=x": settings(INDEX, requires_safety_checker=["x"]),
    # code of components
    "text encoder's auto_map": code("text_encoder/evil.py", settings(TEXT, auto_map=REMOTE)),
    "AutoModel with auto_map": code(
        "text_encoder/evil.py", settings(TEXT, auto_map=REMOTE), settings(INDEX, text_encoder=["transformers", "AutoModel"])
    ),
    "tokenizer's auto_map": code("tokenizer/evil.py", settings(TOKENIZER, auto_map=REMOTE)),
    "AutoTokenizer with auto_map": code(
        "tokenizer/evil.py", settings(TOKENIZER, auto_map=REMOTE), settings(INDEX, tokenizer=["transformers", "AutoTokenizer"])
    ),
    "attention of the Hub": settings(TEXT, _attn_implementation="evil/kernel", attn_implementation="evil/kernel"),
    "tokenizer_class": settings(TOKENIZER, tokenizer_class="EvilTokenizer"),
    # pickles
    **{f"{part} as {name}": pickled(part, name, is_zip) for part, name, is_zip in (
        ("unet", "diffusion_pytorch_model.bin", True), ("unet", "diffusion_pytorch_model.bin", False),
        ("vae", "diffusion_pytorch_model.bin", True), ("text_encoder", "pytorch_model.bin", True),
        ("text_encoder", "pytorch_model.bin", False), ("unet", "diffusion_pytorch_model.pt", True),
        ("unet", "diffusion_pytorch_model.fp16.bin", True))},
    "harmless pickle": pickled("unet", "diffusion_pytorch_model.bin", evil=False),
    "pickle beside": pickled("unet", "diffusion_pytorch_model.bin", keeps=True),
    "text encoder's pickle beside": pickled("text_encoder", "pytorch_model.bin", keeps=True),
    "weights named in the settings": lambda folder: (
        pickled("text_encoder", "adapter_model.bin", keeps=True)(folder),
        settings(TEXT, transformers_weights="adapter_model.bin")(folder),
    ),
    "weights named outside": settings(TEXT, transformers_weights="../../outside.safetensors"),
    # shards
    **{f"{part} shard {str(name)[:30]!r}": sharded(part, name) for part in ("unet", "text_encoder") for name in
       ("../../outside.safetensors", "/etc/passwd", "evil.bin", "", ".", "..", "..\\..\\x.safetensors", None, 1, [], "x\x00.safetensors",
        "missing.safetensors", "y" * 5000 + ".safetensors")},
    **{f"{part} index {content[:12]!r}": instead_of_weights(part, content) for part in ("unet", "text_encoder") for content in
       (b"", b"null", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": 1}', b'{"weight_map": {}}', DEEP.encode())},
    # weights
    **{f"{part} truncated": truncated(part) for part in WEIGHTS},
    **{f"{part} empty": text(f"{part}/{name}", b"") for part, name in WEIGHTS.items()},
    **{f"{part} nan": weights(part, lambda content: first(content).fill_(torch.nan)) for part in WEIGHTS},
    **{f"{part} without one": weights(part, lambda content: content.pop(next(iter(content)))) for part in WEIGHTS},
    **{f"{part} with one more": weights(part, lambda content: content.update(evil=torch.ones(2))) for part in WEIGHTS},
    "unet of integers": weights("unet", lambda content: content.update({k: v.long() for k, v in content.items()})),
    "unet without dimensions": weights("unet", lambda content: content.update({k: torch.ones(()) for k in content})),
    **{f"{name} in place of {file}": instead(file, make) for name, make in (
        ("fifo", os.mkfifo), ("folder", Path.mkdir), ("link to itself", lambda path: path.symlink_to(path.name)),
        ("link to zeros", lambda path: path.symlink_to("/dev/zero")), ("link to passwd", lambda path: path.symlink_to("/etc/passwd")))
       for file in (INDEX, UNET, TOKENIZER, "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")},
    "unet missing": lambda folder: shutil.rmtree(folder / "unet"),
    "unet a file": instead("unet", lambda path: path.write_text("x")),
    # settings
    **{f"{file} {content[:12]!r}": text(file, content) for file in (UNET, TEXT, VAE, SCHEDULER, TOKENIZER, "tokenizer/tokenizer.json")
       for content in (b"", b"null", b"[]", b"{}", b"\xff", DEEP.encode(), b'{"a":' * 20_000)},
    **{f"{file} {key}={str(value)[:30]}": settings(file, **{key: value}) for file, values in {
        UNET: {"block_out_channels": ([10**12, 10**12], [-1, 8], "x", [10**400]), "layers_per_block": (10**12, [10**9] * 2, -1),
               "cross_attention_dim": (10**12, "x", None), "transformer_layers_per_block": (10**12,), "in_channels": (10**12, 0, 9),
               "sample_size": (10**12, None), "down_block_types": (["evil.Block"], "x"), "act_fn": ("__import__('os')",),
               "_class_name": ("Evil", 1, None), "norm_num_groups": (0, 3), "attention_head_dim": (0, 10**12)},
        TEXT: {"hidden_size": (10**12, -1, "x", 17), "num_hidden_layers": (10**12, -1, 10**6), "vocab_size": (10**12, 0),
               "model_type": ("evil", 1, None), "architectures": (["Evil"], 1), "hidden_act": ("evil",), "dtype": ("evil", 1),
               "quantization_config": ({"quant_method": "evil"}, 1), "max_position_embeddings": (10**12, 1)},
        VAE: {"block_out_channels": ([10**12] * 3,), "latent_channels": (10**12, 0), "scaling_factor": ("x", None, 1e308, 10**400)},
        SCHEDULER: {"num_train_timesteps": (10**12, 10**9, 0, -1, "x"), "beta_start": (float("nan"), "x"), "beta_schedule": ("evil",),
                    "trained_betas": ([[1]], "x", [1e9] * 10), "_class_name": ("Evil",)},
        TOKENIZER: {"model_max_length": (10**400, -1, "x", 10**12), "bos_token": (1, {"a": 1}), "chat_template": ("{{ ''.__class__.__mro__ }}", 1),
                    "extra_special_tokens": (["x"] * 10, {"../x": "y"}, 1), "added_tokens_decoder": ({"99999999999999": {"content": "x"}}, 1)},
    }.items() for key, all_values in values.items() for value in all_values},
    "merges": text("tokenizer/merges.txt", b"\x00\xff" * 100),
    "vocab": text("tokenizer/vocab.json", b'{"a": "b"}'),
}  # fmt: skip
