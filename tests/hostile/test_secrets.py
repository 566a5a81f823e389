# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
No secret in any output: the commands run with secrets in flags, addresses and every variable of the environment where one is usual;
then every byte that they printed and wrote is searched.
"""

import base64
import json
import os
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from tests import tiny
from tests.cli import processes
from trl_diffusion import AttributeSFTConfig, ComplexPOConfig, DDSPOConfig, InstanceDPOConfig


# Each can be told from the others in a message of a failure
VARIABLES = {
    "HF_TOKEN": "hf_canaryTOKENaaaaaaaaaaaaaaaaaaaaaaaa",
    "HUGGING_FACE_HUB_TOKEN": "hf_canaryOLDTOKENbbbbbbbbbbbbbbbbbbb",
    "OPENAI_API_KEY": "sk-canary-OPENAI-cccccccccccccccccc",
    "WANDB_API_KEY": "canaryWANDBdddddddddddddddddddddddddddddd",
    "COMET_API_KEY": "canaryCOMETeeeeeeeeeeeeeeeeeeeeee",
    "AWS_ACCESS_KEY_ID": "AKIACANARYFFFFFFFFFF",
    "AWS_SECRET_ACCESS_KEY": "canary/AWS+gggggggggggggggggggggggggggg",
    "AWS_SESSION_TOKEN": "canaryAWSSESSIONhhhhhhhhhhhhhhhh",
    "HTTPS_PROXY": "http://canaryproxyuser:canaryproxypassword@127.0.0.1:9",
    "GITHUB_TOKEN": "ghp_canaryGITHUBiiiiiiiiiiiiiiiiiiiii",
    "NEPTUNE_API_TOKEN": "canaryNEPTUNEjjjjjjjjjjjjjjjjjj",
}
FLAG = "hf_canaryFLAGkkkkkkkkkkkkkkkkkkkkkkkkk"
URL = "http://canaryurluser:canary%20url-password@127.0.0.1:9/v1?key=canaryQUERYllllllll"
PARTS = (
    "canaryproxyuser",
    "canaryproxypassword",
    "canaryurluser",
    "canary%20url-password",
    "canary url-password",
    "canaryQUERYllllllll",
)


def forms(secret: str) -> set[bytes]:
    """A secret as it may stand somewhere: itself, quoted, in base 64, in UTF-16."""
    plain = {secret, quote(secret), quote_plus(secret), base64.b64encode(secret.encode()).decode().rstrip("=")}
    return {text.encode() for text in plain} | {secret.encode("utf-16-le")}


SECRETS = {
    form: secret
    for secret in (*VARIABLES.values(), FLAG, *PARTS)
    if "127.0.0.1" not in secret
    for form in forms(secret)
}


def leaks(result, folder: Path) -> list[str]:
    """Which secrets were printed or written, and where."""
    places = {"stdout": result.stdout.encode(), "stderr": result.stderr.encode()}
    places |= {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    places["names of files"] = "\n".join(str(file) for file in folder.rglob("*")).encode()
    return [
        f"{secret} in {place}"
        for place, content in places.items()
        for form, secret in SECRETS.items()
        if form in content
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.sd_pipeline().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    tiny.pairs(4).to_parquet(folder / "data" / "train.parquet")
    (folder / "prompts.txt").write_text("a red circle\n")
    (folder / "criteria.yaml").write_text(tiny.CRITERIA)
    (folder / "secret.yaml").write_text(f"hub_token: {FLAG}\nunknown_flag: {FLAG}\n")
    return folder


def commands(inputs: Path, out: Path) -> dict[str, tuple[int, list]]:
    """Each command with the status that it ends with: once as it works, once as it fails."""
    model, data = inputs / "model", inputs / "data"
    training = ["instance-dpo", "--model_name_or_path", model, "--dataset_name", data, "--use_peft", "--lora_r", 2, "--max_steps", 1,
                "--report_to", "tensorboard", "--save_steps", 1, "--logging_steps", 1, "--output_dir", out / "run", "--use_cpu",
                "--hub_token", FLAG]  # fmt: skip
    evaluation = ["evaluate", f"base={model}", "--prompts", inputs / "prompts.txt", "--metrics", "--num_inference_steps", 1,
                  "--resolution", 32, "--use_cpu", "--hub_token", FLAG, "--output_dir", out / "evaluation"]  # fmt: skip
    annotation = ["annotate-instances", "--dataset_name", data, "--vlm", "any", "--vlm_base_url", URL, "--vlm_max_tries", 1,
                  "--detector", "tiny", "--output_dir", out / "annotations"]  # fmt: skip
    return {
        "env": (0, ["env"]),
        "a training": (0, training),
        "a training that pushes": (2, [*training, "--push_to_hub", "--hub_model_id", "user/model"]),
        "a training of nothing": (2, [*training, "--model_name_or_path", f"https://user:{FLAG}@huggingface.co/user/model"]),
        "a training by a file": (2, ["instance-dpo", "--config", inputs / "secret.yaml"]),
        "a training with a token for the model": (0, [*training, "--model_init_kwargs", json.dumps({"token": FLAG})]),
        "an evaluation of a link": (2, [*evaluation, f"x={URL}"]),
        "an annotation": (2, annotation),
        "an annotation with a key": (2, [*annotation, "--vlm_request", f'{{"api_key": "{FLAG}"}}']),
        "a check": (2, ["check-dataset", "--dataset_name", URL]),
        "an export": (2, ["export-lora", URL, "--output", out / "x.safetensors"]),
        "masks": (2, ["show-masks", "--dataset_name", URL, "--output_dir", out / "masks"]),
        "criteria": (2, ["show-criteria", "--criteria", URL]),
        "a card": (2, ["model-card", out / "run", "--hub_token", FLAG, "--push_to_hub", "user/model"]),
        "no command": (2, [FLAG]),
    }  # fmt: skip


FAST = ("env", "a training", "a training by a file", "an annotation with a key", "a check")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in commands(Path(), Path())]


@pytest.mark.parametrize("name", NAMES)
def test_no_secret_is_printed_or_written(folders, tmp_path, name):
    status, args = commands(folders, tmp_path)[name]
    env = os.environ | VARIABLES | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hub")}
    result = processes.run(["-c", processes.COMMAND, *args], env=env)
    found = leaks(result, tmp_path)
    assert not found, found
    assert result.returncode == status, result.stderr[-2000:]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("config", [InstanceDPOConfig, AttributeSFTConfig, ComplexPOConfig, DDSPOConfig])
def test_settings_show_no_token(tmp_path, config):
    """Printed, or given to a tracker."""
    args = config(
        output_dir=str(tmp_path),
        hub_token=FLAG,
        model_init_kwargs={"token": FLAG, "variant": "fp16"},
        report_to="none",
        use_cpu=True,
    )
    for text in (str(args), repr(args), args.to_json_string(), json.dumps(args.to_sanitized_dict(), default=str)):
        assert FLAG not in text and "fp16" in text
    assert args.hub_token == args.model_init_kwargs["token"] == FLAG
