# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trl_diffusion.cli import help as help_module
from trl_diffusion.cli.help import SHIPPED, find_page, kept_file, page_of, parser_for
from trl_diffusion.cli.main import COMMANDS, main, script_of
from trl_diffusion.cli.script import parser_of


WRITE = "write it anew with `python -m trl_diffusion.cli.write_help`"
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def printed_help(command: str, capsys, *flags: str) -> str:
    """What a command prints when it is asked for its help."""
    with pytest.raises(SystemExit) as ended:
        main([command, "--help", *flags])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_that_is_shipped_is_that_of_the_parser(command, monkeypatch):
    """At every width, down to the last space; the texts are those of now."""
    parser, page = parser_of(command, script_of(command)), json.loads(SHIPPED.read_text())["pages"][command]
    assert page_of(parser) == page, WRITE
    for width in (40, 62, 80, 100, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        text = parser_for(parser.prog, page).format_help()
        assert text == parser.format_help()
        assert text.startswith(f"usage: trl-diffusion {command} [flags]\n") and "--config FILE" in text


def test_the_help_that_is_shipped_is_for_the_versions_that_work_together():
    """`help.json` names the versions of `constraints.txt`, and the commands that there are."""
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().split() if "==" in line)
    shipped = json.loads(SHIPPED.read_text())
    assert shipped["versions"] == {name: pins[name] for name in ("transformers", "trl")}, WRITE
    assert list(shipped["pages"]) == list(COMMANDS), WRITE


def test_help_loads_no_library():
    """Each command prints its help, -h too, in one process that imports none of the packages that take seconds."""
    code = """
import contextlib, sys
from trl_diffusion.cli.main import COMMANDS, main
for command in COMMANDS:
    for flag in ("-h", "--help"):
        with contextlib.suppress(SystemExit):
            main([command, flag])
heavy = ("torch", "transformers", "diffusers", "datasets", "peft", "trl", "accelerate", "numpy")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "[]\n"
    assert result.stdout.count("usage: trl-diffusion ") == 2 * len(COMMANDS)


def test_help_for_other_versions_is_made_once(tmp_path, monkeypatch, capsys):
    """With another version of trl, the parser itself answers the first time, and what it said is kept for that version."""
    expected = printed_help("instance-dpo", capsys)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(help_module, "versions", lambda: {"transformers": "5.0", "trl": "99.0"})
    assert find_page("instance-dpo") is None
    assert printed_help("instance-dpo", capsys) == expected
    assert printed_help("env", capsys).startswith("usage: trl-diffusion env")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.json")] == [kept_file().relative_to(tmp_path)]

    monkeypatch.setitem(sys.modules, "trl_diffusion.cli.script", None)  # to import it is an error
    assert printed_help("instance-dpo", capsys) == expected
    monkeypatch.setattr(help_module, "versions", lambda: {"transformers": "5.0", "trl": "100.0"})
    assert find_page("instance-dpo") is None


def test_help_that_cannot_be_kept_is_printed(tmp_path, monkeypatch, capsys):
    """Where the cache folder is a file, and where what it holds is broken."""
    monkeypatch.setattr(help_module, "versions", lambda: {"trl": "99.0"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert printed_help("env", capsys).startswith("usage: trl-diffusion env")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept_file().parent.mkdir()
    kept_file().write_text("{")
    assert printed_help("env", capsys).startswith("usage: trl-diffusion env")
    assert find_page("env")["description"]


def test_help_with_a_file_shows_its_values(tmp_path, monkeypatch, capsys):
    """Behind `--config` the defaults are those of the file, and they are kept for nobody else."""
    monkeypatch.setattr(help_module, "versions", lambda: {"trl": "99.0"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "masks.yaml").write_text("num_rows: 123")
    assert "(default: 123)" in printed_help("show-masks", capsys, "--config", str(tmp_path / "masks.yaml"))
    assert find_page("show-masks") is None
