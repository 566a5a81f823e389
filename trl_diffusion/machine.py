# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Takes out of a text what tells of the machine where it was written: paths of files, addresses of servers, and secrets."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit


PUBLIC_HOSTS = ("huggingface.co", "hf.co", "github.com", "arxiv.org")
AN_ADDRESS = "(an address)"
SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")
ADDRESS = re.compile(
    r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+|\b(?:localhost|\d{1,3}(?:\.\d{1,3}){3})(?::\d+)?\b(?:/[^\s'\"<>`]*)?"
)
TOKEN = re.compile(r"\b(?:hf|api_org|sk|ghp|gho|github_pat|glpat|xox[abp])[_-][A-Za-z0-9_-]{8,}|\bAKIA[A-Z0-9]{12,}")
IN_ADDRESS = re.compile(
    r"(?P<user>(?:(?<=://)|(?<=:/)(?!/))[^\s/'\"<>`@]+(?=@))|(?P<query>(?<=[?&])[\w.%-]+=[^\s&#'\"<>`]+)"
)
SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
SHORTEST_SECRET = 8  # characters; shorter values, such as "none" and "1", stand for none
ROOT = r"(?:~\w*|[A-Za-z]:|\.{1,2})?[/\\]"
QUOTED = re.compile(rf"(['\"`])({ROOT}[^'\"`\n]+)\1")
PATH = re.compile(rf"(?<![\w.:/<~\\]){ROOT}(?:[^\s'\"`/\\:,;()<>]+[/\\])+[^\s'\"`/\\:,;()<>]*")


def without_places(text: str, folders: tuple[str | Path, ...] = ()) -> str:
    """
    Takes paths and addresses out of a text that was written for the user of this machine, such as an error.

    Args:
        text (`str`):
            The text. A prompt is not meant: it may hold a path on purpose.
        folders (`tuple[str | Path, ...]`, *optional*):
            Folders that the text may name, also with spaces in their names, besides the working folder, the home folder and the
            one for temporary files.

    Returns:
        `str`: the text, with the last part of each path, and a note in place of each address but public ones.
    """
    known = {str(Path(folder).absolute()) for folder in (*folders, Path.cwd(), Path.home(), tempfile.gettempdir())}
    known |= {os.path.realpath(folder) for folder in known}
    for folder in sorted(known, key=len, reverse=True):
        if len(Path(folder).parts) > 1:
            text = re.sub(rf"{re.escape(folder)}(?=[/\\])", "/.", text)  # so that what follows is still a path
    parts, end = [], 0
    for found in ADDRESS.finditer(text):
        parts += [_without_paths(text[end : found.start()]), found[0] if _is_public(found[0]) else AN_ADDRESS]
        end = found.end()
    return "".join([*parts, _without_paths(text[end:])])


def without_secrets(text: str) -> str:
    """
    Hides tokens, passwords and keys in a text, such as an error about an address that was given.

    Args:
        text (`str`):
            The text.

    Returns:
        `str`: with `***` in place of tokens, of user, password and values of the query in an address, and of what environment variables
        hold whose names say that it is secret.
    """
    values = {
        value.strip()
        for name, value in os.environ.items()
        if SECRET_VARIABLE.search(name) and len(value.strip()) >= SHORTEST_SECRET
    }
    forms = {form for value in values for form in (value, quote(value), quote_plus(value))}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    text = IN_ADDRESS.sub(_without_secret, text)
    return TOKEN.sub("***", text)


def _without_secret(found: re.Match[str]) -> str:
    return "***" if found["user"] else f"{found['query'].partition('=')[0]}=***"


def public_name(name: str | None) -> str | None:
    """The name of a model, a LoRA or a file; of a path of this machine the last part, of an address what is no secret."""
    if name is None:
        return None
    name = SECRET.sub("***", str(name))
    if "://" in name:
        parts = urlsplit(name)
        if parts.scheme in ("http", "https", "hf"):
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        return public_name(parts.path)
    if re.match(r"[A-Za-z]:[\\/]|\\\\", name):
        return re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    if name.startswith(("/", ".", "~")) or os.path.exists(name) or name.count("/") > 1:
        return os.path.basename(os.path.abspath(os.path.expanduser(name))) or "root"
    return name


def all_without_places(value: Any, folders: tuple[str | Path, ...] = ()) -> Any:
    """[`machine.without_places`] of every text in JSON values, keys too."""
    if isinstance(value, str):
        return without_places(value, folders)
    if isinstance(value, dict):
        return {without_places(name, folders): all_without_places(item, folders) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [all_without_places(item, folders) for item in value]
    return value


def _without_paths(text: str) -> str:
    text = QUOTED.sub(lambda found: f"{found[1]}{_last(found[2])}{found[1]}", text)
    return PATH.sub(lambda found: _last(found[0]), text)


def _last(path: str) -> str:
    """The last part of a path, whichever system's."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _is_public(address: str) -> bool:
    parts = urlsplit(address)
    is_host = any(parts.hostname == host or str(parts.hostname).endswith(f".{host}") for host in PUBLIC_HOSTS)
    return is_host and "@" not in parts.netloc and not parts.query
