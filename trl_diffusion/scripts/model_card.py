# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl-diffusion",
#     "huggingface_hub",
# ]
# ///

"""
Writes the model card of a training again, with an evaluation in it, and pushes it. No model is loaded.

```bash
trl-diffusion model-card sd15-iapo-lora --evaluation evaluation
trl-diffusion model-card user/sd15-iapo-lora --evaluation evaluation --push_to_hub
```
"""

import argparse
import json
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from trl_diffusion.cli.parser import CommandParser


if TYPE_CHECKING:
    from trl_diffusion.cards.facts import EvaluationFacts, ModelFacts

logger = logging.getLogger(__name__)

README, SUMMARY, PIPELINE = "README.md", "summary.json", "model_index.json"
COMMIT_MESSAGE = "Write the model card"


@dataclass
class ModelCardArguments:
    """
    Arguments of `trl-diffusion model-card`.

    Parameters:
        model (`str`):
            Folder or Hub id of a model that a trainer of this library wrote, with or without the flag.
        evaluation (`str`, *optional*):
            Folder of `trl-diffusion evaluate`. Defaults to the evaluation that the card has.
        model_name_in_evaluation (`str`, *optional*):
            Name of the model in the evaluation. Defaults to the one of its folder or Hub id.
        arm (`str`, *optional*):
            Name in the evaluation of the model that was trained alike without what the method adds: with `w_neg=1`, or by SFT.
            Defaults to the one whose training says so.
        output_dir (`str`, *optional*):
            New folder for the card and what belongs to it. Defaults to the model's folder, and for a model of the Hub to its name.
        overwrite (`bool`, *optional*, defaults to `False`):
            Write a README.md again that somebody has edited.
        push_to_hub (`str`, *optional*):
            Push the card. Without a value to the model's own repository, with one to that.
        private (`bool`, *optional*, defaults to `False`):
            Make the repository private if it is new.
        hub_revision (`str`, *optional*):
            Branch to read a model of the Hub from, and to push to.
        hub_token (`str`, *optional*):
            A token of the Hub. Defaults to that of `hf auth login` or HF_TOKEN.
    """

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the trained model, with or without the flag."}
    )
    evaluation: str | None = field(
        default=None,
        metadata={"help": "Folder of `trl-diffusion evaluate`. Defaults to the evaluation that the card has."},
    )
    model_name_in_evaluation: str | None = field(
        default=None,
        metadata={"help": "Name of the model in the evaluation. Defaults to the one of its folder or Hub id."},
    )
    arm: str | None = field(
        default=None,
        metadata={
            "help": "Name in the evaluation of the model that was trained alike without what the method adds: with `w_neg=1`, "
            "or by SFT. Defaults to the one whose training says so."
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "New folder for the card and what belongs to it. Defaults to the model's folder, for a model of the Hub to its name."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Write a README.md again that somebody has edited."})
    push_to_hub: str | None = field(
        default=None,
        metadata={
            "help": "Push the card. Without a value to the model's own repository, with one to that.",
            "nargs": "?",
            "const": "",
            "metavar": "REPO",
        },
    )
    private: bool = field(default=False, metadata={"help": "Make the repository private if it is new."})
    hub_revision: str | None = field(
        default=None, metadata={"help": "Branch to read a model of the Hub from, and to push to."}
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "A token of the Hub. Defaults to that of `hf auth login` or HF_TOKEN."},
    )

    def __post_init__(self):
        if not self.model:
            raise ValueError("Name a model: `trl-diffusion model-card MODEL`, a folder or a Hub id.")
        if self.push_to_hub in ("true", "no"):  # `push_to_hub: true` in a file
            self.push_to_hub = "" if self.push_to_hub == "true" else None
        if self.evaluation is None and (self.arm or self.model_name_in_evaluation):
            raise ValueError(
                "`--arm` and `--model_name_in_evaluation` are names in an evaluation: pass `--evaluation`."
            )
        if self.private and self.push_to_hub is None:
            raise ValueError("`--private` is for a repository that is pushed to: pass `--push_to_hub`.")
        self.hub_token = (self.hub_token or "").strip() or None  # of a file, it ends in a line break
        if self.hub_token and not (self.hub_token.isascii() and self.hub_token.isprintable()):
            raise ValueError(
                "`--hub_token` holds characters that no token has: copy it again, or run `hf auth login`."
            )


# ----- what is read -----


class Place:
    """
    A folder or a repository that holds a card and what it is made of.

    Args:
        name (`str`):
            The folder, or the Hub id.
        revision (`str`, *optional*), token (`str`, *optional*):
            Branch of a repository, and a token.
    """

    def __init__(self, name: str, revision: str | None = None, token: str | None = None):
        self.folder = Path(name).expanduser() if Path(name).expanduser().is_dir() else None
        self.name, self.revision, self.token = name, revision, token

    def file(self, name: str) -> Path | None:
        """
        Finds a file, downloaded if need be.

        Args:
            name (`str`):
                Its path in the place.

        Returns:
            `Path`, or `None` if the place has no such file.

        Raises:
            `ValueError`: If there is no such place, or the Hub does not answer.
        """
        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None

        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        from trl_diffusion.hub import PUSH_ERRORS, describe_failure
        from trl_diffusion.revisions import commit_of

        try:
            path = Path(hf_hub_download(self.name, name, revision=self.revision, token=self.token))
        except PUSH_ERRORS as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                return None
            reason, _ = describe_failure(error, self.token)
            # Without the error behind it, which may hold the token
            raise ValueError(
                f"{self.name!r} is no folder, and the Hub gives no {name} of that name: {reason}."
            ) from None
        self.revision = commit_of(path, name)  # all files are those of one commit
        return path

    def facts(self) -> "ModelFacts | None":
        """What was written of the training."""
        from trl_diffusion.cards.facts import FACTS_NAME, read_model_facts

        return self._read(FACTS_NAME, read_model_facts)

    def evaluation(self) -> "EvaluationFacts | None":
        """What was written of the evaluation."""
        from trl_diffusion.cards.facts import EVALUATION_NAME, read_evaluation_facts

        return self._read(EVALUATION_NAME, read_evaluation_facts)

    def _read(self, name: str, read: Any) -> Any:
        path = self.file(name)
        try:
            return path and read(path)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The {name} of {self.name} is not one that this version of trl_diffusion writes."
            ) from error


def picture_names(facts: "ModelFacts") -> list[str]:
    """
    The pictures of a card.

    Args:
        facts ([`cards.facts.ModelFacts`]):
            What was written of the training, possibly by somebody else.

    Returns:
        `list[str]`: paths beside the card.

    Raises:
        `ValueError`: If one is not in the folder of pictures: nothing else beside a model may be pushed.
    """
    from trl_diffusion.cards.facts import PICTURES

    samples = [name for sample in facts.samples for name in (sample.image, sample.base_image)]
    names = list(dict.fromkeys(name for name in (facts.teaser, facts.curves, facts.masks, *samples) if name))
    for name in names:
        parts = PurePosixPath(name).parts
        if parts[0] != PICTURES or len(parts) < 2 or ".." in parts or "\\" in name:
            raise ValueError(f"training.json names the picture {name!r}, which is not in {PICTURES}/: correct it.")
    return names


def pictures(place: Place, facts: "ModelFacts") -> dict[str, Path]:
    """The files of a card's pictures, by their paths beside the card."""
    found = {}
    for name in picture_names(facts):
        path = place.file(name)
        if path is None:
            raise ValueError(
                f"training.json of {place.name} names the picture {name}, which is not there: put it back."
            )
        if place.folder is not None and not path.resolve().is_relative_to(place.folder.resolve()):
            raise ValueError(
                f"The picture {name} of {place.name} is a link out of the folder: replace it by the picture."
            )
        found[name] = path
    return found


def check_readme(place: Place) -> None:
    """Raises a `ValueError` if the card of a place is not what its own facts make, so that writing it would destroy work."""
    from trl_diffusion.cards.model import model_card

    readme = place.file(README)
    if readme is None:
        return
    facts, evaluation, text = place.facts(), place.evaluation(), readme.read_text(encoding="utf-8").strip()
    if facts is None or text not in (str(model_card(facts, known)).strip() for known in (evaluation, None)):
        raise ValueError(
            f"The README.md of {place.name} is not what this version of trl_diffusion makes of its training.json: somebody has "
            "edited it, or another version wrote it. Nothing was changed. Keep what you want of it, and pass `--overwrite`."
        )


# ----- the evaluation -----


def known_evaluation(place: Place) -> "EvaluationFacts | None":
    """The evaluation that a card has, of the weights that there are."""
    evaluation = place.evaluation()
    if evaluation and has_other_weights(place, evaluation.revision):
        raise ValueError(
            f"The evaluation.json of {place.name} is of other weights than the folder holds now: evaluate it again and pass "
            "`--evaluation`, or delete the file."
        )
    return evaluation


def new_evaluation(args: ModelCardArguments, place: Place, facts: "ModelFacts") -> "EvaluationFacts":
    """
    The evaluation that the flags name.

    Args:
        args ([`ModelCardArguments`]):
            The flags.
        place ([`Place`]):
            Where the model is.
        facts ([`cards.facts.ModelFacts`]):
            What is known of its training.

    Returns:
        [`cards.facts.EvaluationFacts`]

    Raises:
        `ValueError`: If there is no such evaluation, the model is not in it or not only once, or it was evaluated with other weights.
    """
    from trl_diffusion.cards.arms import training_record
    from trl_diffusion.evaluation.card import evaluation_facts
    from trl_diffusion.evaluation.kept_images import is_changed

    path = Path(args.evaluation).expanduser() / SUMMARY
    if not path.is_file():
        raise ValueError(f"{args.evaluation} holds no {SUMMARY}: name the `--output_dir` of `trl-diffusion evaluate`.")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        records = {name: summary["settings"].get("models", {}).get(name, {}) for name in summary["models"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The {SUMMARY} of {args.evaluation} is not one of `trl-diffusion evaluate`.") from error
    if is_changed(path):
        raise ValueError(
            f"The {SUMMARY} of {args.evaluation} has changed since it was written: repeat the command that wrote it. Images and scores "
            "that are there are kept."
        )
    name = args.model_name_in_evaluation or name_of(place, facts, records)
    if name in records and has_other_weights(place, records[name].get("revision")):
        message = f"{name!r} of the evaluation was sampled with other weights than {place.name} holds now"
        if not args.model_name_in_evaluation:
            raise ValueError(f"{message}: evaluate it again, or pass `--model_name_in_evaluation {name}`.")
        logger.warning(f"{message}.")
    if name in records:
        records[name].setdefault("training", training_record(facts))  # of an evaluation before it was written
    return evaluation_facts(summary, name, args.arm)


def name_of(place: Place, facts: "ModelFacts", records: dict[str, dict[str, Any]]) -> str:
    """The name under which a model was evaluated."""
    own = {place.name, facts.model_id} if place.folder is None else {place.folder.absolute().name, facts.model_id}
    names = [name for name, record in records.items() if record.get("path") in own - {None}]
    if len(names) != 1:
        found = f"has {' and '.join(names)}, which are both of {place.name}" if names else f"names no {place.name}"
        raise ValueError(f"The evaluation {found}: pass `--model_name_in_evaluation`, one of {', '.join(records)}.")
    return names[0]


def has_other_weights(place: Place, revision: str | None) -> bool:
    """Whether a folder holds other weights than those that were evaluated, as far as both are known."""
    from trl_diffusion.cards.quick_start import WEIGHTS
    from trl_diffusion.revisions import digest_of_file

    folder = place.folder
    if folder is None or not (revision or "").startswith("sha256:"):
        return False
    if (folder / WEIGHTS).is_file():
        return digest_of_file(folder / WEIGHTS) != revision
    if not (folder / PIPELINE).is_file():
        return False

    from trl_diffusion.evaluation.models import kind_and_revision  # imports diffusers

    return kind_and_revision(str(folder))[1] != revision


# ----- the command -----


def main(args: ModelCardArguments) -> None:
    place = Place(args.model, args.hub_revision, args.hub_token)
    facts = place.facts()
    if facts is None:
        raise ValueError(
            f"{args.model} has no training.json, which the trainers of this library write beside a model and its card."
        )
    files = pictures(place, facts)
    if not args.overwrite:
        check_readme(place)
    evaluation = known_evaluation(place) if args.evaluation is None else new_evaluation(args, place, facts)
    if args.output_dir is None and place.folder is not None:
        write_card(args, place.folder, facts, evaluation, files)
    elif args.output_dir is not None or args.push_to_hub is None:
        folder = Path(args.output_dir or args.model.rpartition("/")[2])
        if folder.exists():
            raise ValueError(
                f"The card of {args.model} is written to the folder {folder}, which exists: move it away, or pass another `--output_dir`."
            )
        write_card(args, folder, facts, evaluation, files)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_card(args, Path(folder), facts, evaluation, files)


def write_card(
    args: ModelCardArguments,
    folder: Path,
    facts: "ModelFacts",
    evaluation: "EvaluationFacts | None",
    files: dict[str, Path],
) -> None:
    """Writes a card and what it is made of into a folder, and pushes it if the flags say so."""
    from trl_diffusion.cards.facts import EVALUATION_NAME, FACTS_NAME, write_facts
    from trl_diffusion.cards.model import model_card
    from trl_diffusion.files import write_file
    from trl_diffusion.hub import create_repository, push_files, pushing

    known_id, is_of_hub = facts.model_id, not Path(args.model).expanduser().is_dir()
    if is_of_hub:
        facts.model_id = args.model
    if args.push_to_hub is not None:
        with pushing("Nothing was changed.", args.hub_token):
            facts.model_id = create_repository(  # which the code on the card loads
                args.push_to_hub or facts.model_id or folder.absolute().name,
                private=args.private or None,
                revision=args.hub_revision,
                token=args.hub_token,
            )
        if not args.overwrite:
            check_readme(Place(facts.model_id, args.hub_revision, args.hub_token))
    changed = [
        README,
        *([EVALUATION_NAME] if evaluation else []),
        *([FACTS_NAME] if facts.model_id != known_id else []),
    ]

    folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        if file != folder / name:
            write_file(folder / name, file.read_bytes())
    if FACTS_NAME in changed or is_of_hub or args.output_dir is not None:
        write_facts(facts, folder / FACTS_NAME)
    if evaluation:
        write_facts(evaluation, folder / EVALUATION_NAME)
    write_file(folder / README, f"{model_card(facts, evaluation)}".encode())
    if args.push_to_hub is None:
        print(f"Wrote {' and '.join(changed)} in {folder}.")
        return
    is_kept = args.output_dir is not None or not is_of_hub
    with pushing(f"The card is saved in {folder}." if is_kept else "Nothing was changed.", args.hub_token):
        address = push_files(
            {name: folder / name for name in [*changed, *files]},
            facts.model_id,
            commit_message=COMMIT_MESSAGE,
            revision=args.hub_revision,
            token=args.hub_token,
        )
    print(f"Pushed {' and '.join(changed)} to {facts.model_id}: {address}")


def make_parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser((ModelCardArguments,), prog=prog)
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="the same as --model")
    return parser


if __name__ == "__main__":
    import sys

    from trl_diffusion.cli.script import run_script

    sys.exit(run_script("model-card", lambda: sys.modules[__name__]))
