# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""
Makes the cards of `model_cards/`.

```bash
python -m examples.model_cards                          # renders all cards again, from the facts that lie beside them
python -m examples.model_cards --train --work_dir work  # trains and evaluates the quickstart's models first
```

The cards of the reference recipes say what their YAML files say: nobody has trained them yet, and they have no figures. Those of
the quickstart's tiny models and datasets are of what the first run made: with figures, pictures and curves.
"""

import argparse
import shutil
from pathlib import Path

from trl_diffusion.cards.facts import (
    EVALUATION_NAME,
    FACTS_NAME,
    PICTURES,
    ModelFacts,
    read_evaluation_facts,
    read_model_facts,
    write_facts,
)
from trl_diffusion.cards.methods import PAIR_LOSSES
from trl_diffusion.cards.model import model_card
from trl_diffusion.files import write_file

from . import datasets, reference, tiny


MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
INDEX = """
# Model cards

`python -m examples.model_cards` makes these cards from the facts that lie beside them, and a test keeps them true.

## The reference recipes

Nobody has trained or built these yet: the cards say what their recipes say, and have no figures. `user` stands for whoever does it.

{reference}

## The quickstart's models and datasets

Small, but real: trained with seed {seed}, evaluated on 1,024 prompts by an oracle that reads the images, and looked at. `python -m
examples.model_cards --train --work_dir DIR` makes them again, with their weights in `DIR/models`. Their bases and the expert come with the
package, in `trl_diffusion/quickstart/`, under its licence.

{tiny}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=MODEL_CARDS, help="Folder of the cards.")
    parser.add_argument("--train", action="store_true", help="Train and evaluate the quickstart's models first.")
    parser.add_argument("--work_dir", type=Path, default=Path("model_cards_work"), help="Where models are trained.")
    args = parser.parse_args()
    if args.train:
        tiny.make(args.work_dir)
        for names in tiny.CARDS.values():
            for name in names:
                copy_card(args.work_dir / "models" / name, args.output_dir / name)
        datasets.make(args.output_dir)
    for name in reference.CARDS:
        (args.output_dir / name).mkdir(parents=True, exist_ok=True)
        write_facts(reference.reference_facts(name), args.output_dir / name / FACTS_NAME)
    for folder in sorted(file.parent for file in args.output_dir.glob(f"*/{FACTS_NAME}")):
        write_file(folder / "README.md", render(folder).encode())
    for name in datasets.REFERENCE:
        write_file(args.output_dir / name / "README.md", datasets.reference_card(name).encode())
    write_file(args.output_dir / "README.md", index(args.output_dir).encode())


def index(output_dir: Path) -> str:
    """A page that lists the cards."""
    models = [read_model_facts(output_dir / name / FACTS_NAME) for name in reference.CARDS]
    rows = [f"| [{facts.name}]({facts.name}/README.md) | {method_of(facts)}, `{facts.recipe_file}` |" for facts in models]
    rows += [f"| [{name}]({name}/README.md) | a dataset, `datasets_builders/` |" for name in datasets.REFERENCE]
    tiny_rows = [
        f"| [{name}]({name}/README.md) | {tiny.EXPERIMENTS[world].arms[arm].title}, on the {world} |"
        for world, names in tiny.CARDS.items()
        for name, arm in names.items()
    ]
    tiny_rows += [f"| [{name}]({name}/README.md) | a dataset, {datasets.NUM_ROWS} rows |" for name in datasets.TINY]
    head = ["| card | of |", "|---|---|"]
    text = INDEX.format(reference="\n".join([*head, *rows]), tiny="\n".join([*head, *tiny_rows]), seed=tiny.SEED)
    return text.lstrip()


def method_of(facts: ModelFacts) -> str:
    """The method of a recipe, and the loss of pairs if it is another than Diffusion-DPO's."""
    loss = PAIR_LOSSES.get(facts.hyperparameters.get("loss_type"))
    return f"{facts.method} with the loss of {loss}" if loss else facts.method


def render(folder: Path) -> str:
    """The card of the facts that lie in a folder."""
    evaluation = folder / EVALUATION_NAME
    known = read_evaluation_facts(evaluation) if evaluation.exists() else None
    return f"{model_card(read_model_facts(folder / FACTS_NAME), known)}"


def copy_card(model: Path, folder: Path) -> None:
    """Copies the facts and the pictures of a model's card."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in (FACTS_NAME, EVALUATION_NAME):
        shutil.copy(model / name, folder / name)
    shutil.copytree(model / PICTURES, folder / PICTURES, ignore=shutil.ignore_patterns("*.json"))


if __name__ == "__main__":
    main()
