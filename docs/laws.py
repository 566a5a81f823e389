# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What the documentation of a public name must hold. The laws:

- Every public name, every field of a configuration, and the methods of each trainer that users call are documented.
- Every argument has an entry with its type; no entry is about something else; what has a default is *optional*, and a default
  that is named is the true one.
- What is returned has a type. A `ValueError` that a function raises, or one that it calls by name, is listed.
- An argument that is a tensor, and a result that is one, has its shape.
- What is measured has its unit: pixels, tokens, seconds, steps, rows or images.
- A formula and a score name their source.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

import torch
import transformers

import trl_diffusion
from docs.docstrings import autodocs, described, find, sections


TRAINER_METHODS = ("train", "evaluate", "save_model", "push_to_hub")
# From the name of an argument to the words of which its entry holds one. `cell` and `grid` count latents.
UNITS = {
    r"(height|width|resolution|crop_size|max_pixels)$": r"pixel|cell|grid",
    r"(max_new_tokens|max_sequence_length)$": r"token",
    r"(timeout|.*_seconds)$": r"[Ss]econd",
    r"(.*_steps|steps)$": r"[Ss]tep",
    r"(.*batch_size)$": r"image|request|row|prompt|pair",
    r"rows_per_shard$": r"[Rr]ow",
    r"(.*_dir|.*_path|folder)$": r"[Ff]older|[Ff]ile|path|[Hh]ub",
}
SOURCE = re.compile(r"arXiv|https?://|\(ours\)|\bours\b|CVPR|IAPO|InPO")
# A line of a docstring that is set apart and says what something is equal to
FORMULA = re.compile(r"^ {4}\S.*(?: = |\d \()", re.MULTILINE)


def page_faults(pages: dict[str, str]) -> list[str]:
    """
    What the pages leave out.

    Args:
        pages (`dict[str, str]`):
            The text of each page, by its name.

    Returns:
        `list[str]`: the public names that no page documents.
    """
    documented = {name for text in pages.values() for name, _ in autodocs(text)}
    members = {f"{name}.{member}" for text in pages.values() for name, found in autodocs(text) for member in found}
    trainers = [name for name in documented if name.endswith("Trainer") and name != "DiffusionTrainer"]
    methods = [f"{trainer}.{method}" for trainer in trainers for method in TRAINER_METHODS]
    return [
        f"no page documents `{name}`: add an [[autodoc]] of it, or list it below its class."
        for name in sorted({*trl_diffusion.__all__, *methods} - documented - members)
    ]


def documented_objects(pages: dict[str, str]) -> list[str]:
    """
    The objects whose docstrings the pages show, and that are this package's own.

    Args:
        pages (`dict[str, str]`):
            The text of each page, by its name.

    Returns:
        `list[str]`: names, as the pages write them, with those of the members.
    """
    names = []
    for text in pages.values():
        for name, members in autodocs(text):
            names += [name, *(f"{name}.{member}" for member in members)]
    return [name for name in names if is_own(find(name))]


def is_own(documented: Any) -> bool:
    """Whether the docstring was written for this object, and not inherited."""
    module = inspect.getmodule(documented)
    return bool(documented.__doc__) and module is not None and module.__name__.startswith("trl_diffusion")


def object_faults(name: str) -> list[str]:
    """
    What is wrong with the docstring of an object.

    Args:
        name (`str`):
            Its name, as a page writes it.

    Returns:
        `list[str]`: the laws that it breaks, each with the argument.
    """
    documented = find(name)
    docstring = inspect.getdoc(documented) or ""
    titles = [title for title, _ in sections(docstring)]
    faults = [*argument_faults(documented, docstring), *unit_faults(documented)]
    if not inspect.isclass(documented):
        faults += return_faults(documented, docstring)
    if "Raises" not in titles and raises_value_error(documented):
        faults.append("it raises a ValueError, which its docstring does not list")
    if (FORMULA.search(docstring.partition("\nArgs:")[0]) or is_score(documented)) and not SOURCE.search(docstring):
        faults.append("it has no source: a paper, an address, or (ours)")
    return faults


def parameters_of(documented: Any) -> dict[str, inspect.Parameter]:
    """The arguments; of a configuration, the fields that it adds to those that it inherits."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(documented).parameters.items()
        if name not in ("self", "cls") and not name.startswith("_")
    }
    if dataclasses.is_dataclass(documented) and documented.__name__.endswith("Config"):
        return {
            name: parameter for name, parameter in parameters.items() if name in inspect.get_annotations(documented)
        }
    return parameters


def argument_faults(documented: Any, docstring: str) -> list[str]:
    """Arguments without an entry, a type, a shape or the true default, and entries without an argument."""
    parameters, own, elsewhere = (
        parameters_of(documented),
        described(documented),
        described_elsewhere(documented, docstring),
    )
    faults = [f"`{name}` has no entry" for name in parameters if name not in own and name not in elsewhere]
    for name, (kind, _) in own.items():
        if name not in parameters:
            if not inspect.isclass(documented):  # that of a class may be an attribute
                faults.append(f"`{name}` is no argument")
            continue
        parameter = parameters[name]
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if "`" not in kind:
            faults.append(f"`{name}` has no type")
        if parameter.annotation is torch.Tensor and "of shape `(" not in kind:
            faults.append(f"`{name}` is a tensor without a shape")
        faults += default_faults(name, parameter, kind)
    return faults


def described_elsewhere(documented: Any, docstring: str) -> set[str]:
    """
    The arguments that another docstring describes: of a function, transformers' method that it names; of a class, its bases that
    it names or whose fields it has; of a configuration also what its note says of the fields that it inherits.
    """
    if not inspect.isclass(documented):
        name = documented.__name__
        is_named = f"As [`~transformers.Trainer.{name}`]" in docstring
        return set(inspect.signature(getattr(transformers.Trainer, name)).parameters) if is_named else set()
    has_fields, names = dataclasses.is_dataclass(documented), set()
    for base in inspect.getmro(documented)[1:]:
        if f"[`{base.__name__}`]" in docstring or has_fields:
            names |= set(described(base))
    note = docstring.partition("[!NOTE]")[2]
    return names | {
        field.name for field in (dataclasses.fields(documented) if has_fields else ()) if f"`{field.name}`" in note
    }


def default_faults(name: str, parameter: inspect.Parameter, kind: str) -> list[str]:
    """A default that is not said, said wrongly, or said of what has none."""
    if (parameter.default is not parameter.empty) != ("*optional*" in kind):
        return [
            f"`{name}` {'has a' if parameter.default is not parameter.empty else 'has no'} default: check *optional*"
        ]
    said = re.search(r"defaults to `(.+?)`$", kind)
    if not said:
        return []
    try:
        value = ast.literal_eval(said[1])
    except (ValueError, SyntaxError):
        return []  # an object, such as LoraConfig(r=64, lora_alpha=64)
    default = parameter.default
    if type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return []
    return [] if value == default else [f"the default of `{name}` is {default!r}, not {value!r}"]


def return_faults(documented: Any, docstring: str) -> list[str]:
    """A result without a type or a shape."""
    annotation = inspect.signature(documented).return_annotation
    if annotation in (None, inspect.Signature.empty):
        return []
    # What a property or a context manager is needs no section of its own: its first sentence says it.
    found = [text for title, text in sections(docstring) if title in ("Returns", "Yields")]
    if hasattr(documented, "__wrapped__") and "Iterator" in str(annotation):
        return []
    if not found:
        return ["it has no Returns"]
    if "`" not in found[0]:
        return ["its result has no type"]
    if "torch.Tensor" in str(annotation) and "dict" not in str(annotation) and "shape `(" not in found[0]:
        return ["its result is a tensor without a shape"]
    return []


def unit_faults(documented: Any) -> list[str]:
    """Arguments that are measured in something, which their entries name neither themselves nor by another docstring."""
    return [
        f"`{name}` has no unit: one of {words}"
        for name, (kind, text) in described(documented).items()
        for pattern, words in UNITS.items()
        if re.match(pattern, name) and not re.search(words, f"{kind} {text}") and "See [`" not in text
    ]


def raises_value_error(documented: Any, depth: int = 1) -> bool:
    """
    Whether a function, or a class when it is made, has a `raise ValueError` in its own code or in that of this package's functions
    that it calls by name.
    """
    if inspect.isclass(documented):
        own = [vars(documented)[name] for name in ("__init__", "__post_init__") if name in vars(documented)]
        return any(raises_value_error(function) for function in own if inspect.isfunction(function))
    function = inspect.unwrap(getattr(documented, "__func__", documented))
    if not function.__code__.co_filename.endswith(".py"):
        return False  # the constructor that a dataclass makes
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    raised = [ast.unparse(node.exc) for node in nodes if isinstance(node, ast.Raise) and node.exc is not None]
    called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    callees = [function.__globals__.get(name) for name in called] if depth else []
    return any(text.startswith("ValueError") for text in raised) or any(
        raises_value_error(callee, depth - 1) for callee in callees if inspect.isfunction(callee) and is_own(callee)
    )


def is_score(documented: Any) -> bool:
    """Whether it is one of the metrics, or what FID and KID are made of."""
    is_metric = inspect.getmodule(documented).__name__.startswith("trl_diffusion.metrics.")
    return is_metric and bool(re.search(r"\wScorer$|Features$|_result$", documented.__name__))
