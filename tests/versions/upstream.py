# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
What this library overrides or calls of TRL's and transformers' private parts, as it was when the library was written for it.

```bash
python -m tests.versions.upstream --record tests/versions/upstream.json      # after a look at what changed
```

Three kinds are kept: the signature of each method that the trainers override, the code of TRL's private base classes, and the
signatures of further private methods that the trainers call.
"""

import argparse
import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import transformers
import trl
from transformers import Trainer
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer

import trl_diffusion


FILE = Path(__file__).with_name("upstream.json")
# Of the Trainer: called, or relied on to call what is overridden
CALLED = (
    *("_inner_training_loop", "_prepare_for_training", "_run_epoch", "_get_output_dir", "_get_eval_sampler"),
    *(
        "_save_optimizer_and_scheduler",
        "_save_scaler",
        "_save_rng_state",
        "_load_rng_state",
        "_maybe_log_save_evaluate",
    ),
    *(
        "_load_optimizer_and_scheduler",
        "is_world_process_zero",
        "store_flos",
        "save_model",
        "compute_loss_context_manager",
    ),
)


def recorded() -> dict[str, dict[str, str]]:
    """All that is kept, of the versions that are installed."""
    return {
        "overridden": {name: signature(getattr(base, name)) for name, base in overridden().items()},
        "called": {name: signature(getattr(Trainer, name)) for name in CALLED if hasattr(Trainer, name)},
        "code": {
            f"{owner.__name__}.{name}": digest(member)
            for owner in (_BaseTrainer, _BaseConfig)
            for name, member in vars(owner).items()
            if inspect.isfunction(member)
            and member.__code__.co_filename == inspect.getfile(owner)  # not a dataclass's
        },
        "attributes": {
            f"{owner.__name__}.{name}": repr(value)
            for owner in (_BaseTrainer, _BaseConfig)
            for name, value in vars(owner).items()
            if not callable(value) and not name.startswith("__") and not isinstance(value, property)
        },
    }


def overridden() -> dict[str, type]:
    """The methods of a base class that any trainer or configuration defines again, and that class."""
    public = [getattr(trl_diffusion, name) for name in trl_diffusion.__all__]
    trainers = [each for each in public if inspect.isclass(each) and issubclass(each, _BaseTrainer)]
    configs = [each for each in public if inspect.isclass(each) and issubclass(each, _BaseConfig)]
    return {
        name: base
        for classes, base in ((trainers, _BaseTrainer), (configs, _BaseConfig))
        for each in classes
        for own in each.__mro__
        if own.__module__.startswith("trl_diffusion.")
        for name, member in vars(own).items()
        if inspect.isfunction(member)
        and hasattr(base, name)
        and (not name.startswith("__") or name == "__post_init__")
    }


def signature(function: Callable) -> str:
    """Names, kinds and defaults of the parameters; annotations have no effect."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters)


def digest(function: Callable) -> str:
    """A hash of a function's code, without its comments and its docstring."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    body = tree.body[0].body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]
    return hashlib.blake2b(ast.unparse(tree).encode(), digest_size=8).hexdigest()


def changes(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """A line for each thing that is another, is gone, or is new in TRL's base."""
    what = {
        "overridden": "`{}`, which is overridden here, takes other arguments",
        "called": "`{}`, which is called here, takes other arguments",
        "code": "`{}` has other code",
        "attributes": "`{}` has another value",
    }
    lines = []
    for kind, words in what.items():
        was, is_ = before[kind], now[kind]
        for name in sorted(was.keys() | is_.keys()):
            if name not in is_:
                lines.append(f"`{name}` is gone")
            elif name not in was:
                lines.append(f"`{name}` is new")
            elif was[name] != is_[name]:
                values = "" if kind == "code" else f": ({was[name]}) before, ({is_[name]}) now"
                lines.append(words.format(name) + values)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.versions.upstream")
    parser.add_argument("--record", type=Path, default=FILE, help="Write what is kept to this file.")
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    content = {"versions": versions, **recorded()}
    parser.parse_args().record.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
