# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Points the clients of this process at a stand-in of the Hub: they read their settings from the environment once."""

import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants, hf_api, hf_file_system
from huggingface_hub.utils import _http, close_session

from tests.hub.stand_in import StandIn, variables


# Modules that keep copies of such settings, or that wait before they try again. All are imported before anything is
# changed: one that is imported later would copy what is true for a test alone.
KEEPERS = (
    "huggingface_hub.constants",
    "huggingface_hub.utils._cache_manager",
    "huggingface_hub.utils._git_credential",
    "datasets.config",
    "evaluate.config",
    "evaluate.inspect",
    "diffusers.utils",
    "diffusers.utils.constants",
    "diffusers.utils.hub_utils",
    "diffusers.utils.dynamic_modules_utils",
    "diffusers.configuration_utils",
    "diffusers.loaders.lora_base",
    "diffusers.models.attention_dispatch",
    "transformers.utils.hub",
    "peft",
    "trl",
)
SLEEPERS = (
    "huggingface_hub.utils._http",
    "huggingface_hub.file_download",
    "datasets.arrow_dataset",
    "datasets.dataset_dict",
    "datasets.iterable_dataset",
    "datasets.utils.file_utils",
)


def settings(hub: StandIn, home: Path) -> dict[str, object]:
    """Settings by the names that modules keep them under."""
    caches = home / "hub"
    return {
        "ENDPOINT": hub.url,
        "HF_ENDPOINT": hub.url,
        "HUGGINGFACE_CO_RESOLVE_ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HUB_EVALUATE_URL": hub.url + "/spaces/{path}/resolve/{revision}/{name}",
        "HF_LIST_ENDPOINT": hub.url + "/api/spaces?filter={type}",
        "HF_URL_HOSTS": constants.HF_URL_HOSTS | {"127.0.0.1"},
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_OFFLINE": False,
        "HF_EVALUATE_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_UPDATE_DOWNLOAD_COUNTS": False,
        "USE_PARQUET_EXPORT": False,  # a service beside the Hub
        "HF_HOME": str(home),
        "HF_CACHE_HOME": str(home),
        "HF_HUB_CACHE": str(caches),
        "HUGGINGFACE_HUB_CACHE": str(caches),
        "default_cache_path": str(caches),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_DATASETS_CACHE": home / "datasets",
        "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
        "EXTRACTED_DATASETS_PATH": home / "datasets" / "downloads" / "extracted",
        "HF_MODULES_CACHE": str(home / "modules"),
    }


def forget() -> None:
    """Closes connections, and forgets what clients remember of a Hub: another can have the same port."""
    close_session()
    hf_file_system.HfFileSystem.clear_instance_cache()
    hf_file_system.hffs.invalidate_cache()
    hf_api.api._whoami_cache.clear()


def waiting(waits: list[float]) -> SimpleNamespace:
    """The module `time`, but that it notes how long it should sleep instead of sleeping."""
    return SimpleNamespace(**{**vars(time), "sleep": waits.append})


def point(hub: StandIn, home: Path, token: str | None, patch: pytest.MonkeyPatch) -> None:
    """
    Points the clients of this process at a stand-in.

    Args:
        hub (`StandIn`):
            The stand-in, which runs.
        home (`Path`):
            An empty folder for caches.
        token (`str` or `None`):
            What HF_TOKEN is.
        patch (`pytest.MonkeyPatch`):
            Takes all of it back.
    """
    keepers = [import_module(name) for name in KEEPERS]
    sleepers = [import_module(name) for name in SLEEPERS]
    forget()
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_OIDC_RESOURCE",
        "TRANSFORMERS_OFFLINE",
        "HF_DATASETS_OFFLINE",
    ):
        patch.delenv(name, raising=False)
    for name, value in variables(hub.url, token, home).items():
        patch.setenv(name, value)
    for name, value in settings(hub, home).items():
        for module in keepers:
            if name in vars(module):
                patch.setattr(module, name, value)
    origin = ("http", "127.0.0.1", urlsplit(hub.url).port)
    patch.setattr(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {origin})
    patch.setattr(hf_api.api, "endpoint", hub.url)
    patch.setattr(hf_file_system.hffs, "endpoint", hub.url)
    patch.setattr(hf_file_system.hffs._api, "endpoint", hub.url)
    patch.setattr(import_module("transformers.utils.hub"), "_hf_api", None)
    for module in sleepers:
        patch.setattr(module, "time", waiting(hub.waits))
