# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Shell completion: scripts for bash, zsh and fish that know all commands, flags and choices, and start nothing. They are made of
`help.json`, so that a shell gets its script at once.
"""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from .accelerate_config import NAMES
from .help import SHIPPED, read_pages


PATH = "/"  # stands for any file or folder where the values of a flag are listed
# Flags that take a file or a folder, some of them a name of the Hub or a word instead
PATHS = (
    "--accelerator_config --base_model --config --criteria --dataset_name --deepspeed --detector --evaluation "
    "--expert --expert_prompt --fsdp_config --initial_lora --judge_prompt --lora --model --model_name_or_path "
    "--models --negative_loras --output --output_dir --planner_prompt --precompute_dir --prompts --protocol "
    "--references --resume_from_checkpoint --sample_model --segmenter --single_file_config --vae --vlm"
).split()
LONGEST = 80  # characters of what a flag is described with


class Flag(NamedTuple):
    """
    What a shell has to know about a flag.

    Attributes:
        name (`str`):
            The flag, with its dashes. Empty for the words that belong to no flag.
        count (`str`):
            How many values it takes: `"0"`, `"1"` or `"n"`.
        values (`tuple[str, ...]`):
            Its choices, and [`PATH`] where it takes a file. Empty where nothing can be proposed.
        text (`str`):
            What it does, in one line.
    """

    name: str
    count: str
    values: tuple[str, ...]
    text: str


# What is known of `accelerate launch`, which has many more
LAUNCHER = (
    Flag("--accelerate_config", "1", (*NAMES, PATH), "Configuration of `accelerate launch`"),
    Flag("--num_processes", "1", (), "Number of processes, on all machines"),
    Flag("--num_machines", "1", (), "Number of machines"),
    Flag("--machine_rank", "1", (), "Number of this machine, from 0"),
    Flag("--main_process_ip", "1", (), "Address of the first machine"),
    Flag("--main_process_port", "1", (), "Port of the first machine"),
)


def flags_of(page: dict) -> list[Flag]:
    """
    The flags of a command.

    Args:
        page (`dict`):
            Its help, see [`page_of`].

    Returns:
        `list[Flag]`: in the order of the help; positional arguments are one without a name.
    """
    flags = []
    for title, lines in page["groups"].items():
        for written, text in lines:
            name, _, value = written.split(", ")[-1].partition(" ")
            if title == "positional arguments":
                flags.append(Flag("", "n", (PATH,), ""))
                continue
            count = "0" if not value else "n" if value.endswith(" ...") else "1"
            path = (PATH,) if name in PATHS else ()
            flags.append(Flag(name, count, tuple(page["choices"].get(name, path)), first_sentence(text)))
    return flags + (list(LAUNCHER) if page["epilog"] else [])


def first_sentence(text: str) -> str:
    """The first sentence of a help text, cut where it is long."""
    sentence = text.split(". ")[0].split(" (default")[0].rstrip(".")
    return sentence if len(sentence) <= LONGEST else f"{sentence[: LONGEST - 3].rstrip()}..."


def completion_script(shell: str, commands: dict[str, str]) -> str:
    """
    The script that completes `trl-diffusion` in a shell.

    Args:
        shell (`str`):
            `"bash"`, `"zsh"` or `"fish"`.
        commands (`dict[str, str]`):
            The commands with what they do, `completion` among them.

    Returns:
        `str`: the script, for `source` or a file.
    """
    flags = {command: flags_of(page) for command, page in read_pages(SHIPPED).items()}
    flags["completion"] = [Flag("--help", "0", (), "show this help message and exit"), Flag("", "n", tuple(LINES), "")]
    return "\n".join(LINES[shell](commands, flags)) + "\n"


def bash_lines(commands: dict[str, str], flags: dict[str, list[Flag]]) -> Iterator[str]:
    """The script for bash: a table of flags for each command, and a function that reads it."""
    yield BASH_START % " ".join([*commands, "--help", "--version"])
    for command, known in flags.items():
        table = "\n".join(" ".join((flag.name or "-", flag.count, *flag.values)) for flag in known)
        yield f"        {command}) table='{table}' ;;"
    yield BASH_END


BASH_START = r"""# Completes trl-diffusion in bash: source <(trl-diffusion completion bash)
_trl_diffusion() {
    local IFS=$' \t\n' word=${COMP_WORDS[COMP_CWORD]} table
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W '%s' -- "$word"))
        return
    fi
    # Of each flag: its name, how many values it takes, and these; / is any path, and - the words that belong to no flag
    case ${COMP_WORDS[1]} in"""
BASH_END = r"""        *) return ;;
    esac

    # The last flag on the left, and how many words stand between; bash makes a word of = too
    local at=$((COMP_CWORD - 1)) between=0 last=''
    [[ $word == = ]] && word=''
    while ((at > 1)) && [[ ${COMP_WORDS[at]} != --* ]]; do
        [[ ${COMP_WORDS[at]} == = ]] || between=$((between + 1))
        at=$((at - 1))
    done
    if ((at > 1)); then
        last=${COMP_WORDS[at]#--}
        last=--${last//-/_}
    fi

    local name count values others='' proposals=''
    while read -r name count values; do
        if [[ $name == - ]]; then
            others+=" $values"
        elif [[ $word != -* && $name == "$last" && ($count == n || $count$between == 10) ]]; then
            proposals=" $values "
        else
            others+=" $name"
        fi
    done <<< "$table"
    proposals=${proposals:-$others }
    if [[ $proposals == *' / '* ]]; then
        proposals=${proposals/ \/ / }
        compopt -o default 2> /dev/null
    fi
    COMPREPLY=($(compgen -W "$proposals" -- "$word"))
}
complete -F _trl_diffusion trl-diffusion"""


def zsh_lines(commands: dict[str, str], flags: dict[str, list[Flag]]) -> Iterator[str]:
    """The script for zsh, which describes flags to `_arguments`."""
    described = "\n".join(f"            {shlex.quote(f'{name}:{text}')}" for name, text in commands.items())
    yield ZSH_START % described
    for command, known in flags.items():
        named = [f"            {shlex.quote(zsh_argument(flag))} \\" for flag in known if flag.name]
        yield "\n".join(
            [f"        {command}) _arguments \\", *named, "            '*:value:_trl_diffusion_others' ;;"]
        )
    yield ZSH_OTHERS
    for command, known in flags.items():
        for flag in known:
            if flag.count == "n" and flag.values:
                words = [value for value in flag.values if value != PATH]
                files = "compset -P '*='; _files" if flag.name else "_files"
                action = f"compadd -- {' '.join(words)}" if words else files
                yield f"        '{command} '{flag.name or '*'}) {action} ;;"
    yield ZSH_END


ZSH_START = """#compdef trl-diffusion
# Completes trl-diffusion in zsh: source <(trl-diffusion completion zsh)
_trl_diffusion() {
    if ((CURRENT == 2)); then
        local -a commands=(
%s
        )
        _describe command commands
        _arguments '--help[show the commands]' '--version[print the version]'
        return
    fi
    shift words
    ((CURRENT--))
    case $words[1] in"""
ZSH_OTHERS = """    esac
}
_trl_diffusion_others() { # further values of the last flag, or the words that belong to no flag
    local -a before=(${(M)words[2,CURRENT-1]:#--*})
    case "$words[1] ${${before[-1]//-/_}/#__/--}" in"""
ZSH_END = """    esac
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _trl_diffusion; else compdef _trl_diffusion trl-diffusion; fi"""


def zsh_argument(flag: Flag) -> str:
    """A flag as `_arguments` takes it."""
    words = " ".join(value for value in flag.values if value != PATH)
    action = f"({words})" if words else "_files" if flag.values else " "
    if words and PATH in flag.values:
        action = rf'{{_alternative "words\:word\:({words})" "files\:file\:_files"}}'
    if flag.count == "n" and PATH in flag.values:
        action = '{compset -P "*="; _files}'
    text = re.sub(r"[\\\[\]:]", r"\\\g<0>", flag.text)
    return f"{flag.name}[{text}]" if flag.count == "0" else f"{flag.name}=[{text}]:value:{action}"


def fish_lines(commands: dict[str, str], flags: dict[str, list[Flag]]) -> Iterator[str]:
    """The script for fish, a line for each flag of each command."""
    yield FISH_START
    for command, text in commands.items():
        yield f"complete -c trl-diffusion -n __trl_diffusion_command -a {command} -d {fish_quote(text)}"
    yield "complete -c trl-diffusion -n __trl_diffusion_command -l help -d 'show the commands'"
    yield "complete -c trl-diffusion -n __trl_diffusion_command -l version -d 'print the version'"
    for command, known in flags.items():
        for flag in known:
            start = f"complete -c trl-diffusion -n '__trl_diffusion_command {command}'"
            words = " ".join(value for value in flag.values if value != PATH)
            values = (f" -a {fish_quote(words)}" if words else "") + (" -F" if PATH in flag.values else " -f")
            if not flag.name:
                yield start + values
                continue
            takes = "" if flag.count == "0" else f" -r{values}"
            yield f"{start} -l {flag.name[2:]}{takes} -d {fish_quote(flag.text)}"
            if flag.count == "n" and flag.values:
                yield f"complete -c trl-diffusion -n '__trl_diffusion_behind {command} {flag.name}'{values}"


FISH_START = r"""# Completes trl-diffusion in fish: trl-diffusion completion fish | source
function __trl_diffusion_command # whether the command is this one; without a name, whether there is none yet
    set -l words (commandline -opc)
    test "$words[2]" = "$argv[1]"
end
function __trl_diffusion_behind # whether the last flag of a command is this one
    set -l words (commandline -opc)
    set -l flags (string match -- '--*' $words)
    test "$words[2] $flags[-1]" = "$argv"
end
complete -c trl-diffusion -f"""


def fish_quote(text: str) -> str:
    """A text as one word of fish."""
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


LINES = {"bash": bash_lines, "zsh": zsh_lines, "fish": fish_lines}
