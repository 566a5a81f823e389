# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_diffusion.cli.completion import LAUNCHER, LINES, PATHS, completion_script
from trl_diffusion.cli.help import SHIPPED
from trl_diffusion.cli.main import COMMANDS, COMPLETION, LAUNCHED_COMMANDS, SHELLS, main, script_of
from trl_diffusion.cli.script import parser_of


PAGES = json.loads(SHIPPED.read_text())["pages"]
METRICS = PAGES["evaluate"]["choices"]["--metrics"]
ALL = {**COMMANDS, "completion": COMPLETION}
EACH_SHELL = [
    pytest.param(shell, marks=pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed"))
    for shell in SHELLS
]
# Commands that start each shell without the user's own settings, and what makes it complete; a TAB of zsh's own expands
# words first, and runs what they say, whatever completes
INTERACTIVE = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "bind 'set bell-style none'"),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; bindkey '^I' complete-word"),
}
HOSTILE = (
    "$(touch hacked)",
    "`touch hacked`",
    "x;touch hacked",
    "a[$(touch hacked)]",
    "'; touch hacked; '",
    "-e",
    "*",
    "\\",
)
# What is typed, and what a TAB makes of it
TYPED = [
    ("inst", "instance-dpo"),
    ("show-c", "show-criteria"),
    ("instance-dpo --bet", "instance-dpo --beta"),
    ("complex-po --beta 3 --expe", "complex-po --beta 3 --expert"),
    ("complex-po --loss_type s", "complex-po --loss_type stabilized"),
    ("complex-po --loss_type=s", "complex-po --loss_type=stabilized"),
    ("instance-dpo --lr_scheduler_type gr", "instance-dpo --lr_scheduler_type greedy"),
    ("evaluate --metrics fid k", "evaluate --metrics fid kid"),
    ("evaluate --metrics fid --base_m", "evaluate --metrics fid --base_model"),
    ("evaluate --models a=x b=rec", "evaluate --models a=x b=recipe.yaml"),
    ("instance-dpo --config rec", "instance-dpo --config recipe.yaml"),
    ("instance-dpo --config=rec", "instance-dpo --config=recipe.yaml"),
    ("instance-dpo --accelerate_config fs", "instance-dpo --accelerate_config fsdp2"),
    ("instance-dpo --accelerate_config rec", "instance-dpo --accelerate_config recipe.yaml"),
    ("instance-dpo --num_proc", "instance-dpo --num_processes"),
    ("model-card rec", "model-card recipe.yaml"),
    ("completion z", "completion zsh"),
    # Nothing to propose: a number, an unknown flag, another command's flag, an unknown command
    ("instance-dpo --seed rec", "instance-dpo --seed rec"),
    ("instance-dpo --dataset_train_split rec", "instance-dpo --dataset_train_split rec"),
    ("instance-dpo --nothing", "instance-dpo --nothing"),
    ("instance-dpo --expe", "instance-dpo --expe"),
    ("nothing --bet", "nothing --bet"),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, Path]:
    """The file of each shell's script."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        (folder / shell).write_text(completion_script(shell, ALL))
    return {shell: folder / shell for shell in SHELLS}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with one file."""
    (tmp_path / "recipe.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def replies(script: Path, *words: str) -> list[str]:
    """What bash proposes for the last of some words. It has no programs that it could start."""
    code = f'source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _trl_diffusion; printf \'%s\\n\' "${{COMPREPLY[@]}}"'
    command = [shutil.which("bash"), "--norc", "--noprofile", "-c", code, "bash", "trl-diffusion", *words]
    ended = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
    assert ended.returncode == 0 and ended.stderr == ""
    return ended.stdout.split()


def press(shell: str, script: Path, keys: str) -> str:
    """What an interactive shell prints after some keys, up to a line that says `done`."""
    start, setup = INTERACTIVE[shell]
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM="dumb", PS1="", HISTFILE="/dev/null")
        os.execvp(start[0], start)
    try:
        os.write(terminal, f"{setup}; source {script}; echo rea''dy\n".encode())
        read_until(terminal, b"ready\r\n")
        os.write(terminal, keys.encode())
        return read_until(terminal, b"<done>").decode()
    finally:
        os.close(terminal)
        os.waitpid(process, 0)


def read_until(terminal: int, mark: bytes) -> bytes:
    out, end = b"", time.monotonic() + 30
    while mark not in out:
        assert time.monotonic() < end, out
        if select.select([terminal], [], [], 0.1)[0]:
            out += os.read(terminal, 65536)
    return out


def fish_proposals(script: Path, line: str) -> list[str]:
    """What fish proposes for a line, without the descriptions."""
    code = f"source {script}; complete -C $argv[1]"
    ended = subprocess.run(["fish", "--no-config", "-c", code, line], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stderr == ""
    return [proposal.partition("\t")[0] for proposal in ended.stdout.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_bash_proposes_all_flags_of_the_parser_and_their_choices(command, scripts):
    """And none that the parser does not know, but those of the launcher."""
    known = {}
    for action in parser_of(command, script_of(command))._actions:
        known |= {flag: action for flag in action.option_strings if "-" not in flag.lstrip("-")}
    launcher = {flag.name for flag in LAUNCHER} if command in LAUNCHED_COMMANDS else set()
    assert set(replies(scripts["bash"], command, "--")) == {flag for flag in known if flag.startswith("--")} | launcher
    for flag, action in known.items():
        if action.choices:
            assert replies(scripts["bash"], command, flag, "") == list(action.choices)
            assert replies(scripts["bash"], command, flag, "=", "") == list(action.choices)


def test_bash_proposes_what_fits(scripts, folder):
    """The examples by hand: commands, flags, choices, nothing behind a number; dashes in a flag are underscores."""
    script = scripts["bash"]
    assert replies(script, "") == [*COMMANDS, "completion", "--help", "--version"]
    assert replies(script, "annotate-") == ["annotate-instances", "annotate-attributes"]
    assert replies(script, "instance-dpo", "--mask_o") == ["--mask_overlap"]
    assert replies(script, "instance-dpo", "--mask-overlap", "") == ["mean", "covering"]
    assert replies(script, "complex-po", "--loss_type", "=", "un") == ["unstabilized"]
    assert replies(script, "evaluate", "--metrics", "fid", "hp") == ["hpsv2", "hpsv2_1"]
    assert replies(script, "instance-dpo", "--beta", "") == []
    assert replies(script, "instance-dpo", "--mask_overlap", "mean", "cov") == []
    assert "--beta" in replies(script, "instance-dpo", "--mask_overlap", "mean", "")
    assert replies(script, "completion", "") == ["--help", *SHELLS]


@pytest.mark.parametrize("shell", [shell for shell in EACH_SHELL if shell.values[0] in INTERACTIVE])
def test_a_tab_completes_the_line(shell, scripts, folder):
    """In a real terminal: a TAB, then the line that it made is printed word by word."""
    keys = "".join(f"trl-diffusion {typed}\t\x01printf '<%s>' \x05 e''nd\r" for typed, _ in TYPED)
    out = press(shell, scripts[shell], f"{keys}printf '<%s>' do''ne\r")
    lines = re.findall(r"<trl-diffusion>(.*?)<end>", out)
    assert lines == ["".join(f"<{word}>" for word in completed.split()) for _, completed in TYPED]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_proposes_what_fits(scripts, folder):
    """The one proposal that begins with what was typed is the completed word; there is none where nothing fits."""
    for typed, completed in TYPED[:-1]:
        words = fish_proposals(scripts["fish"], f"trl-diffusion {typed}")
        expected = [completed.split()[-1]] if typed != completed else []
        assert [word for word in words if word.startswith(typed.split()[-1])] == expected


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize("command", COMMANDS)
def test_fish_proposes_all_flags(command, scripts):
    """Those of the help, as bash does."""
    assert set(fish_proposals(scripts["fish"], f"trl-diffusion {command} --")) == set(
        replies(scripts["bash"], command, "--")
    )


@pytest.mark.parametrize("shell", EACH_SHELL)
def test_hostile_words_do_nothing(shell, scripts, folder):
    """Whatever stands on the line, or is the name of a file, is not run."""
    (folder / "recipe$(touch hacked).yaml").touch()
    for word in HOSTILE:
        for line in (
            [word],
            [word, "--"],
            ["evaluate", word],
            ["evaluate", "--metrics", word],
            ["evaluate", word, "--be"],
        ):
            if shell == "bash":
                known = {*replies(scripts["bash"], ""), *replies(scripts["bash"], "evaluate", ""), *METRICS}
                assert set(replies(scripts["bash"], *line)) <= known
            if shell == "fish":
                fish_proposals(scripts["fish"], " ".join(["trl-diffusion", *line]))
    if shell in INTERACTIVE:
        lines = ["instance-dpo --config rec", *(f"evaluate --output_dir {word}" for word in HOSTILE)]
        keys = "".join(f"trl-diffusion {line}\t\t\x15" for line in lines)
        press(shell, scripts[shell], f"{keys}printf '<%s>' do''ne\r")
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "recipe$(touch hacked).yaml"}


def test_the_shells_are_those_that_have_a_script():
    """The entry point names them without importing what makes the scripts."""
    assert tuple(LINES) == SHELLS


def test_all_words_of_the_scripts_are_plain():
    """So that nothing in a name or a choice means something to a shell."""
    for page in PAGES.values():
        words = [
            word for lines in page["groups"].values() for written, _ in lines for word in re.findall(r"--\S+", written)
        ]
        assert words
        for word in [*words, *(choice for choices in page["choices"].values() for choice in choices)]:
            assert re.fullmatch(r"[\w-][\w.-]*", word)


@pytest.mark.parametrize("shell", EACH_SHELL)
def test_the_script_is_valid(shell, scripts):
    """The shell itself reads it without an error, and describes flags in the words of the help where it can."""
    assert subprocess.run([shell, "-n", scripts[shell]], capture_output=True, text=True).stderr == ""
    assert shell == "bash" or scripts[shell].read_text().count("YAML file with flags; those given win") == len(
        COMMANDS
    )


def test_flags_for_files_are_known():
    """A flag whose help speaks of a file or a folder completes one, unless it takes something else."""
    others = {"--variant", "--model_init_kwargs", "--model_name_in_evaluation"}
    texts = {}
    for page in PAGES.values():
        for lines in page["groups"].values():
            texts |= {
                written.split()[0]: text for written, text in lines if written.startswith("--") and " " in written
            }
    speaking = {flag for flag, text in texts.items() if re.search(r"\b(file|folder|path)\b", text, re.IGNORECASE)}
    assert speaking - others <= set(PATHS) <= texts.keys() and not others & set(PATHS)


def test_the_script_is_printed_without_imports():
    """Each time a shell starts: none of the packages that take seconds is imported."""
    code = """
import sys
from trl_diffusion.cli import main
status = main(["completion", "bash"])
heavy = ("torch", "transformers", "diffusers", "datasets", "peft", "trl", "accelerate", "numpy")
sys.exit(status or [name for name in heavy if name in sys.modules] or 0)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, completion_script("bash", ALL), "")


@pytest.mark.parametrize("flags", [[], ["tcsh"], ["bash", "zsh"], ["bas"]])
def test_mistakes_are_one_line(flags, capsys):
    """Without one known shell, the line names them."""
    with pytest.raises(SystemExit) as ended:
        main(["completion", *flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "trl-diffusion completion: error: name one shell: bash, zsh, fish\n"
