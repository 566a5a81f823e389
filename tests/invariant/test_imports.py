# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Imports go one way, and nothing heavy is imported before it is used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import trl_diffusion


PACKAGE = Path(trl_diffusion.__file__).parent
# Each may import those before it
MATHEMATICS = [
    *("messages", "boxes", "masks", "randomness", "process", "noising", "inversion", "losses", "yaml_files"),
    *("segmentation", "criteria"),
]
OPTIONAL = {
    *("ray", "vllm", "gradio", "wandb", "trackio", "bitsandbytes", "deepspeed", "tensorboard"),
    *("matplotlib", "torchmetrics"),
}
# What nothing but itself, `scripts`, `cli` and `quickstart` may import
APPLICATIONS = ["scripts", "cli", "quickstart", "__main__"]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(("trl_diffusion", *(part for part in parts if part != "__init__")))


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str, module: str, is_package: bool = False) -> list[tuple[str, bool]]:
    """All modules that a source imports, by absolute name, and whether that happens when the module is imported."""
    found = []

    def visit(node: ast.AST, at_import: bool):
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) + is_package - node.level]
                base = ".".join([*parts, base] if base else parts)
            # `from .. import masks` imports a module, `from ..masks import f` a function of it
            found.extend(
                (f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base, at_import)
                for alias in node.names
            )
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, at_import)
        else:
            inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, at_import and not inside_function)

    visit(ast.parse(source), True)
    return found


def imports_of(module: str) -> list[tuple[str, bool]]:
    path = MODULES[module]
    return imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def room(module: str) -> str:
    """The part of the package that a module belongs to; the package itself is the empty string."""
    return module.split(".")[1] if "." in module else ""


def internal_rooms(module: str) -> set[str]:
    """The other parts of the package that a module imports, inside of functions and for type checkers too."""
    names = [name for name, _ in imports_of(module) if name.split(".")[0] == "trl_diffusion"]
    return {room(name) for name in names} - {room(module)}


def modules_of(*rooms: str) -> list[str]:
    return [module for module in MODULES if room(module) in rooms]


def test_the_reader_of_imports():
    """Imports are seen relative and absolute, at the top and inside of functions, classes, `try` and type checks."""
    source = """
import torch
from . import masks
from ..losses import diffusion_dpo_loss
try:
    import ray.data
except ImportError:
    pass
if TYPE_CHECKING:
    import gradio
else:
    import wandb
class A:
    import vllm
    def f(self):
        from .. import trainer
        import trackio
"""
    assert imports(source, "trl_diffusion.data.x") == [
        ("torch", True),
        ("trl_diffusion.data", True),
        ("trl_diffusion.losses", True),
        ("ray.data", True),
        ("gradio", False),
        ("wandb", True),
        ("vllm", True),
        ("trl_diffusion.trainer", False),
        ("trackio", False),
    ]
    assert imports("from .base import Backbone", "trl_diffusion.backbones", True) == [
        ("trl_diffusion.backbones.base", True)
    ]
    assert imports("from ..noising import add_noise", "trl_diffusion.backbones", True) == [
        ("trl_diffusion.noising", True)
    ]


def test_all_modules_are_seen():
    """The checks below do not pass for want of files."""
    assert {"boxes", "masks", "noising", "losses", "backbones", "data", "trainer"} <= {room(m) for m in MODULES}


@pytest.mark.parametrize("module", modules_of(*MATHEMATICS))
def test_mathematics_imports_torch_and_itself_downwards(module):
    """The mathematics needs torch, the standard library, and what comes before it."""
    names = {name.split(".")[0] for name, _ in imports_of(module)} - {"trl_diffusion"}
    # The attribute tree is read from YAML, and masks are decoded where no tensor is needed
    assert names <= {
        "torch",
        *(["numpy"] if room(module) == "segmentation" else []),
        *(["yaml"] if room(module) in ("yaml_files", "criteria") else []),
        *sys.stdlib_module_names,
    }
    assert internal_rooms(module) <= set(MATHEMATICS[: MATHEMATICS.index(room(module))])


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The circles of a graph: its strongly connected components of more than one node, or of one that leads to itself."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_nodes: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        open_nodes.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in open_nodes:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            component = set()
            while node not in component:
                component.add(open_nodes.pop())
            if len(component) > 1 or node in graph[node]:
                found.append(component)

    for node in graph:
        if node not in order:
            visit(node)
    return found


def test_circles_are_found():
    """Of a made-up graph: a circle of three, one of two behind it, one of one, and none in a diamond and a chain."""
    graph = {
        "a": {"b", "chain"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "self": {"self"},
        "top": {"left", "right"}, "left": {"bottom"}, "right": {"bottom", "a"}, "bottom": set(), "chain": {"bottom"},
    }  # fmt: skip
    assert sorted(map(sorted, circles(graph))) == [["a", "b", "c"], ["d", "e"], ["self"]]
    graph["c"].remove("a")
    graph["self"].clear()
    assert circles(graph) == [{"d", "e"}]


def test_the_package_has_no_import_circle():
    """No module leads back to itself, by imports inside of functions and for type checkers too; a package is its `__init__`."""
    graph = {module: {name for name, _ in imports_of(module) if name in MODULES} for module in MODULES}
    assert sum(map(len, graph.values())) > 200
    assert circles(graph) == []


@pytest.mark.parametrize("module", modules_of("backbones", "data"))
def test_backbones_and_data_import_the_mathematics(module):
    """Of this package, backbones and data import the mathematics and themselves."""
    assert internal_rooms(module) <= set(MATHEMATICS)


@pytest.mark.parametrize("module", modules_of("cards"))
def test_cards_import_plain_modules(module):
    """A card is made of facts: no model, no data, no trainer. Trainers, evaluation, annotation and scripts may make one."""
    assert internal_rooms(module) <= {"files", "hub"}


@pytest.mark.parametrize("module", modules_of("trainer"))
def test_trainers_import_what_lies_below(module):
    """Trainers import neither annotation nor metrics nor evaluation nor the applications, nor anything by way of the package itself."""
    assert not internal_rooms(module) & {"", "annotation", "metrics", "evaluation", *APPLICATIONS}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) not in ("", "trainer", *APPLICATIONS)])
def test_nothing_below_imports_trainers(module):
    """Trainers and applications are imported by applications alone: annotation, metrics and evaluation keep away from trainers."""
    assert not internal_rooms(module) & {"", "trainer", *APPLICATIONS}


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_used(module):
    """Packages that not everybody has are imported inside of functions, and torchvision nowhere."""
    at_import = {name.split(".")[0] for name, at_import in imports_of(module) if at_import}
    assert not at_import & OPTIONAL
    assert "torchvision" not in {name.split(".")[0] for name, _ in imports_of(module)}


@pytest.mark.parametrize("module", ["instances", "attributes", "ray_executor", "endpoint_vlm", "join", "preview"])
def test_annotating_without_a_model_of_ones_own_imports_no_model_library(module):
    """A process of Ray, or one that asks a server, starts with neither transformers nor diffusers, through no other module."""
    reached, waiting = set(), [f"trl_diffusion.annotation.{module}"]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        names = {imported for imported, at_import in imports_of(name) if at_import} if name in MODULES else set()
        waiting += names - reached
    assert len(reached & MODULES.keys()) > 2
    assert not {"transformers", "diffusers", "peft", "accelerate", "trl"} & {name.split(".")[0] for name in reached}


WORDS_OF_PROCESSES = {"epsilon", "v_prediction", "prediction_type", "alphas_cumprod"}


def words_of_processes(source: str) -> set[str]:
    """The words of one kind of process that code uses: as names, attributes, arguments or strings, but not in docstrings."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        used |= {
            value for field in ("id", "attr", "arg", "value") if isinstance(value := getattr(node, field, None), str)
        }
    return used & WORDS_OF_PROCESSES


def test_words_of_processes_are_found():
    """In a comparison, an argument, an attribute and a key, and not in a docstring or a comment."""
    source = '''
def f(pipeline, prediction_type):
    """Says epsilon."""
    if pipeline["kind"] == "epsilon":  # or "v_prediction"
        return pipeline.alphas_cumprod
'''
    assert words_of_processes(source) == {"prediction_type", "epsilon", "alphas_cumprod"}


@pytest.mark.parametrize(
    "module",
    [
        module
        for module in MODULES
        if module
        not in (
            "trl_diffusion.process",
            *(f"trl_diffusion.backbones.{name}_checks" for name in ("sana", "stable_diffusion")),
        )
    ],
)
def test_only_the_process_knows_what_a_model_predicts(module):
    """No code beside the process and the checks of a pipeline asks for a prediction type or a schedule."""
    assert not words_of_processes(MODULES[module].read_text(encoding="utf-8"))


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor comments nor in docstrings."""
    tree, docstrings = ast.parse(source), set()
    for node in ast.walk(tree):
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_text:
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and at not in docstrings for at, line in lines)


SHARED_FILES = {"base", "flow", "quantization", "qwen_parts", "single_file", "source"}
FAMILIES = [
    module
    for module in modules_of("backbones")
    if module.count(".") == 2 and not module.endswith("checks") and module.split(".")[2] not in SHARED_FILES
]


@pytest.mark.parametrize("module", FAMILIES)
def test_a_family_is_a_short_file(module):
    """A new family of models costs at most 90 lines of code."""
    assert 10 < lines_of_code(MODULES[module].read_text(encoding="utf-8")) <= 90


def test_the_shared_loop_is_a_short_file():
    """What all trainers share has at most 450 lines."""
    source = MODULES["trl_diffusion.trainer.diffusion_trainer"].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 450


def test_importing_the_package_loads_nothing_heavy():
    """`import trl_diffusion`, its version and its `dir` load no torch, transformers, diffusers or datasets."""
    code = """
import sys
import trl_diffusion
assert trl_diffusion.__version__
assert set(trl_diffusion.__all__) <= set(dir(trl_diffusion))
print([name for name in ("torch", "transformers", "diffusers", "datasets", "peft", "trl") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", trl_diffusion.__all__)
def test_public_names_import(name):
    """Every public name is there, and is what its own module calls so."""
    value = getattr(trl_diffusion, name)
    assert value.__module__.startswith("trl_diffusion.")
    assert getattr(importlib.import_module(value.__module__), name) is value


def test_public_names_are_known_to_type_checkers():
    """The names imported for type checkers are those that exist, from the modules that they are loaded from."""
    declared = {}
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            declared.update({alias.name: node.module for alias in node.names})
    assert sorted(declared) == list(trl_diffusion.__all__)
    for name, module in declared.items():
        assert hasattr(importlib.import_module(f"trl_diffusion.{module}"), name)


def test_unknown_names_are_refused():
    """A name that does not exist is an AttributeError that repeats it."""
    name = "NoSuchTrainer"
    with pytest.raises(AttributeError, match="'NoSuchTrainer'"):
        getattr(trl_diffusion, name)
