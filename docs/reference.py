# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Turns `[[autodoc]]` and references to names into the Markdown that MyST reads."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

from docs.docstrings import AUTODOC, ENTRIES, Entry, autodocs, entries, find, sections


# Names of other libraries, which are shown and not linked
OTHERS = re.compile(
    r"(accelerate|datasets|diffusers|evaluate|filelock|huggingface_hub|peft|torch|transformers|trainer_utils|trl)(\.|$)"
)
REFERENCE = re.compile(r"\[`(~?[\w.]+)`\](?![(\[])")
CODE = re.compile(r"^ *(`{3,}).*?^ *\1`*[ \t]*$", re.DOTALL | re.MULTILINE)
LONGEST_DEFAULT = 40


class Reference:
    """
    The objects that the pages document, and where a reference to one leads.

    Attributes:
        faults (`list[str]`):
            What is wrong with the pages, as it is found.

    Args:
        pages (`dict[str, str]`):
            The text of each page, by its name.
    """

    def __init__(self, pages: dict[str, str]):
        self.faults: list[str] = []
        self.members: dict[str, list[str]] = {}
        self.names: dict[int, str] = {}
        self.found: set[str] = set()
        for page, text in pages.items():
            for name, members in autodocs(text):
                if name in self.members:
                    self.faults.append(f"{page}: `{name}` is documented twice; leave one [[autodoc]] of it.")
                self.members[name] = members
                for path in (name, *(f"{name}.{member}" for member in members)):
                    try:
                        self.names.setdefault(identity(find(path)), path)
                        self.found.add(path)
                    except ValueError as error:
                        self.faults.append(f"{page}: {error}")

    def link(self, name: str, module: Any, where: str) -> str:
        """
        A reference in MyST.

        Args:
            name (`str`):
                The name as it is written, such as `"~datasets.Dataset"` or `"losses.complex_po_loss"`.
            module (`Any`):
                The module that it is written in, or `None` for a page.
            where (`str`):
                Where it stands, for the message.

        Returns:
            `str`: a link to the place that documents the object, or its name as code where no page does.
        """
        short = name.removeprefix("~")
        if OTHERS.match(short):
            return plain(name)
        found = None
        for path in (short, *(f"{known.rpartition('.')[0]}.{short}" for known in self.members if "." in known)):
            try:
                found = find(path)
                break
            except ValueError:
                continue
        if found is None and module is not None:
            found = find_in(module, short)
        if found is None:
            self.faults.append(f"{where}: [`{name}`] is no name of this package; correct it or write it as code.")
            return f"`{short}`"
        documented = self.names.get(identity(found))
        return f"{{py:obj}}`{short} <trl_diffusion.{documented}>`" if documented else f"`{short}`"

    def references(self, text: str, module: Any, where: str) -> str:
        """
        Replaces the references of a text by links, outside of code.

        Args:
            text (`str`):
                Markdown.
            module (`Any`):
                The module that it is written in, or `None` for a page.
            where (`str`):
                Where it stands, for messages.

        Returns:
            `str`: Markdown for MyST.
        """
        return outside_code(text, lambda part: REFERENCE.sub(lambda found: self.link(found[1], module, where), part))

    def expand(self, text: str) -> str:
        """
        Replaces `[[autodoc]]` by signatures and docstrings.

        Args:
            text (`str`):
                The page.

        Returns:
            `str`: Markdown for MyST.
        """
        return AUTODOC.sub(lambda found: self.directive(found[1]) + "\n", text)

    def directive(self, name: str) -> str:
        """An object with its members; nothing for one that is not there, which was said already."""
        if name not in self.found:
            return ""
        documented = find(name)
        if not inspect.isclass(documented):
            return self.object(name, "function", documented, ":::::::", "")
        members = [
            self.object(f"{name}.{member}", "method", find(f"{name}.{member}"), "::::::", "")
            for member in self.members[name]
            if f"{name}.{member}" in self.found
        ]
        return self.object(name, "class", documented, ":::::::", "\n\n".join(members))

    def object(self, name: str, kind: str, documented: Any, fence: str, members: str) -> str:
        """One object as a directive of Sphinx's Python domain."""
        where = f"the docstring of {name}"
        is_config = dataclasses.is_dataclass(documented) and kind == "class" and name.endswith("Config")
        module = inspect.getmodule(documented)
        parts = []
        for title, text in sections(inspect.getdoc(documented) or ""):
            if title in ENTRIES:
                text = "\n\n".join(
                    field(name, entry) if is_config and entry.kinds else definition(entry) for entry in entries(text)
                )
            parts.append(f"**{title}**\n\n{text}" if title and not (is_config and title in ENTRIES) else text)
        body = "\n\n".join(parts)
        if documented.__doc__ and module is not None and module.__name__.startswith("trl_diffusion"):
            body = self.references(body, module, where)
        else:  # inherited from another library, whose references only it can resolve
            body = outside_code(body, lambda part: REFERENCE.sub(lambda found: plain(found[1]), part))
        signature = "" if is_config else arguments(documented)
        return f"{fence}{{py:{kind}}} trl_diffusion.{name}{signature}\n\n{body}\n\n{members}\n{fence}\n"


def plain(name: str) -> str:
    """A name of another library as code: behind a `~` without its modules."""
    words = name.removeprefix("~").split(".")
    if name.startswith("~"):
        is_method = len(words) > 1 and words[-2][0].isupper()
        words = words[-2:] if is_method else words[-1:]
    return f"`{'.'.join(words)}`"


def identity(found: Any) -> int:
    """The same number for a method however it is reached."""
    return id(getattr(found, "__func__", found))


def find_in(module: Any, name: str) -> Any:
    """The object of this name that a module defines or imports, also inside its classes, or `None`."""
    scopes = [module, *(value for value in vars(module).values() if inspect.isclass(value))]
    for scope in scopes:
        found = scope
        for word in name.split("."):
            found = getattr(found, word, None)
        if found is not None:
            return found
    return None


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Applies a change to what stands outside of code blocks."""
    parts, end = [], 0
    for block in CODE.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def arguments(documented: Any) -> str:
    """The arguments of a function or a class, without types, which stand below. Long defaults are left out."""
    parts, named = [], False
    for parameter in inspect.signature(documented).parameters.values():
        if parameter.name in ("self", "cls") or parameter.name.startswith("_"):
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            named = True
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            parts.append("*")
            named = True
        default = "" if parameter.default is parameter.empty else f"={shown(parameter.default)}"
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        parts.append(f"{stars}{parameter.name}{default}")
    return f"({', '.join(parts)})"


def shown(default: Any) -> str:
    text = repr(default)
    return "..." if len(text) > LONGEST_DEFAULT or text.startswith("<") else text


def definition(entry: Entry) -> str:
    """An entry as a definition list; a group's title as text."""
    if not entry.kinds:
        return f"*{entry.head}*"
    names = ", ".join(f"**`{name}`**" + (f" ({kind})" if kind else "") for name, kind in entry.kinds.items())
    text = entry.text.replace("\n", "\n  ") or "\\-"
    return f"{names}\n: {text}"


def field(owner: str, entry: Entry) -> str:
    """A parameter of a configuration as an object of its own, that other pages can link to and the search finds."""
    return "\n\n".join(
        f"::::::{{py:attribute}} trl_diffusion.{owner}.{name}\n:no-contents-entry:\n\n({kind}) {entry.text}\n::::::"
        for name, kind in entry.kinds.items()
    )
