# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""What a trainer pushes to the Hub: a list of files and nothing else, at the end and at checkpoints, and what is said of a failure."""

import json
import os
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import yaml
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..backbones.names import INDEX, LORA_WEIGHTS_NAME
from ..cards.facts import EVALUATION_NAME, FACTS_NAME, PICTURES, RECIPE_NAME
from ..cards.quick_start import comfyui_path
from ..criteria import Criteria
from ..hub import (
    NO_TOKEN,
    PUSH_ERRORS,
    check_repository_name,
    create_repository,
    describe_failure,
    has_token,
    is_temporary,
    list_files,
    push_files,
    pushing,
)
from ..lora_export import export_lora


logger = get_logger(__name__)

Result = TypeVar("Result")

CARD_FILES = ("README.md", FACTS_NAME, RECIPE_NAME, EVALUATION_NAME)
LINKED_PICTURE = re.compile(rf"\b(?:{PICTURES}|samples)/[\w./-]+\.(?:png|jpe?g|webp|gif)\b")
# What diffusers and transformers write into the folder of a component
COMPONENT_FILE = re.compile(
    r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors|(diffusion_pytorch_model|model)\.safetensors\.index\.json"
    r"|((scheduler|tokenizer|generation|preprocessor|processor|video_preprocessor)_)?config\.json"
    r"|tokenizer\.json|vocab\.(json|txt)|merges\.txt|(spiece|tokenizer|sentencepiece\.bpe)\.model"
    r"|(added_tokens|special_tokens_map)\.json|chat_template\.(jinja|json)"
)
# What a training is resumed from besides the weights; not the pickled arguments, which hold the token and paths
STATE_FILE = re.compile(
    r"(optimizer|scheduler|scaler)\.pt|optimizer\.bin|rng_state(_\d+)?\.pth|(trainer_state|run_record|attribute_expert)\.json"
)
# As TensorBoard names them: with the host
RUN_FOLDER = re.compile(r"(.+?\d\d_\d\d-\d\d-\d\d)_.*")
EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\..*")
STAGED = ".push-"  # folders of files that are pushed in the background


# ----- which files -----


def model_files(folder: Path, is_lora: bool) -> dict[str, Path]:
    """
    Lists the files of a saved model.

    Args:
        folder (`Path`):
            Where [`trainer.checkpoints.save_weights`] saved it.
        is_lora (`bool`):
            Whether it is a LoRA, or a whole pipeline.

    Returns:
        `dict[str, Path]`: the files by their paths in a repository.
    """
    if is_lora:
        return {LORA_WEIGHTS_NAME: folder / LORA_WEIGHTS_NAME}
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    # A component is named by its library and class, both `None` where there is none; settings may be lists too
    components = [name for name, value in index.items() if isinstance(value, list) and isinstance(value[0], str)]
    files = {
        f"{name}/{file.name}": file
        for name in components
        for file in sorted((folder / name).iterdir())
        if file.is_file() and COMPONENT_FILE.fullmatch(file.name)
    }
    return {INDEX: folder / INDEX} | files


def checkpoint_files(folder: Path, denoiser_name: str | None) -> dict[str, Path]:
    """
    Lists what a training is resumed from. The components of a pipeline that are not trained are not in it.

    Args:
        folder (`Path`):
            The checkpoint.
        denoiser_name (`str` or `None`):
            Name of the denoiser that is trained whole; `None` for a LoRA.

    Returns:
        `dict[str, Path]`: the files by their paths in the checkpoint.
    """
    model = model_files(folder, denoiser_name is None)
    trained = {name: file for name, file in model.items() if not denoiser_name or name.startswith(f"{denoiser_name}/")}
    return trained | {file.name: file for file in sorted(folder.iterdir()) if STATE_FILE.fullmatch(file.name)}


def card_files(folder: Path) -> dict[str, Path]:
    """The card of an output directory, the facts beside it, and the pictures that it links."""
    card = folder / "README.md"
    pictures = sorted(set(LINKED_PICTURE.findall(card.read_text(encoding="utf-8")))) if card.exists() else []
    names = [*CARD_FILES, *(name for name in pictures if ".." not in name)]
    return {name: folder / name for name in names if (folder / name).is_file()}


def event_files(folder: Path) -> dict[str, Path]:
    """The TensorBoard files of an output directory, by names that do not hold the host's, which TensorBoard gives them."""
    files, number = {}, Counter()
    for file in sorted((folder / "runs").glob("*/events.out.tfevents.*")):
        run, event = RUN_FOLDER.fullmatch(file.parent.name), EVENT_FILE.fullmatch(file.name)
        if run and event:
            name = f"runs/{run[1]}/events.out.tfevents.{event[1]}"
            files[f"{name}.{number[name]}"] = file
            number[name] += 1
    return files


def criteria_file(criteria: Criteria, args: TrainingArguments) -> dict[str, bytes]:
    """
    A criteria tree of the user's as a YAML file, without the comments of the file that it was read from.

    Args:
        criteria ([`Criteria`]):
            The tree.
        args ([`AttributeSFTConfig`] or [`ComplexPOConfig`]):
            `criteria` is used.

    Returns:
        `dict[str, bytes]`: the file by its path in a repository; empty for a tree that comes with the library.
    """
    if not Path(args.criteria).is_file():
        return {}
    tree: dict = {}
    for attribute in criteria.attributes:
        node = tree
        for name in attribute.path:
            node = node.setdefault(name, {})
        forms = {"positive": attribute.positive, "negative": attribute.negative, "definition": attribute.definition}
        node[attribute.id] = forms
    content = {"name": criteria.name, "levels": list(criteria.levels), "tree": tree}
    return {"criteria.yaml": yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120).encode()}


def stage(files: dict[str, Path | bytes], folder: Path) -> dict[str, Path | bytes]:
    """
    Keeps files as they are now, while a push in the background reads them: a training replaces its card, and deletes checkpoints.

    Args:
        files (`dict[str, Path | bytes]`):
            The files.
        folder (`Path`):
            Where they are linked to if they are weights, which are not written twice, or where there are no links, copied.

    Returns:
        `dict[str, Path | bytes]`: the same, read from there.
    """
    staged = dict(files)
    for name, file in files.items():
        if not isinstance(file, Path) or folder in file.parents:
            continue
        staged[name] = folder / name
        staged[name].parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".safetensors", ".pt", ".pth", ".bin"):
            try:
                os.link(file, staged[name])
                continue
            except OSError:
                pass
        shutil.copyfile(file, staged[name])
    return staged


# ----- when, and what is said -----


def on_main_process(args: TrainingArguments, call: Callable[[], Result]) -> Result | None:
    """
    Calls in the main process while the others wait. An error is raised in all of them, so that none waits for one that has ended.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The configuration.
        call (`Callable`):
            What is called.

    Returns:
        The result in the main process, `None` in the others.
    """
    result = error = None
    if args.process_index == 0:
        try:
            result = call()
        except Exception as caught:
            error = caught
    if args.world_size > 1:
        (message,) = broadcast_object_list([None if error is None else str(error) or type(error).__name__])
        if message is not None and error is None:
            raise ValueError(message)
    if error is not None:
        raise error
    return result


class Publisher:
    """
    Pushes what a trainer makes. The main process pushes; the others wait where it is not done in the background.

    Where `args.push_to_hub` is set, the repository is created here, before anything that takes long. What cannot come right by
    itself (a token that is missing, wrong or may not write, a bad name, offline mode) is an error now. A Hub that is not reached or
    is busy is a warning: the training needs it only later, and each push tries again.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer, of which only `args` is there yet.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.args = trainer.args
        self.repo_id: str | None = None
        self.executor = ThreadPoolExecutor(max_workers=1)  # one push after the other
        self.running: Future | None = None
        self.troubles: dict[Path, str] = {}  # checkpoints that did not arrive, and why, until it is said
        self.missing: list[Path] = []  # the same, until they are pushed
        if self.args.push_to_hub:
            on_main_process(self.args, self._prepare)

    def _prepare(self) -> None:
        for left in Path(self.args.output_dir).glob(f"{STAGED}*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._check_name()
        token = self.args.hub_token
        if not has_token(token):
            raise ValueError(f"`push_to_hub` cannot push. {NO_TOKEN}")
        try:
            self.open()
        except PUSH_ERRORS as error:
            reason, way_out = describe_failure(error, token)
            if not is_temporary(error):
                raise ValueError(f"`push_to_hub` cannot push to {self._name}: {reason}. {way_out}") from None
            logger.warning(
                f"The repository {self._name} cannot be created at present: {reason}. The training goes on, and each push tries again."
            )

    @property
    def _name(self) -> str:
        return self.repo_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _check_name(self) -> None:
        given = "`hub_model_id`" if self.args.hub_model_id else "`hub_model_id` is missing, and the folder's name"
        check_repository_name(self._name, given)

    def open(self, token: str | None = None, private: bool | None = None, revision: str | None = None) -> str:
        """
        Creates the repository where there is none, and the branch.

        Args:
            token (`str`, *optional*), private (`bool`, *optional*), revision (`str`, *optional*):
                In place of `hub_token`, `hub_private_repo` and `hub_revision`.

        Returns:
            `str`: the whole name, `"user/name"`.
        """
        self._check_name()
        self.repo_id = create_repository(
            self._name,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
        )
        self.trainer.hub_model_id = self.repo_id
        return self.repo_id

    def push(
        self,
        commit_message: str,
        blocking: bool,
        token: str | None,
        revision: str | None,
        private: bool | None,
        card: dict[str, object],
    ) -> str | Future | None:
        """Saves and pushes the model, see [`DiffusionTrainer.push_to_hub`]; `card` is for [`DiffusionTrainer.create_model_card`]."""
        trainer, token = self.trainer, token or self.args.hub_token
        trainer.callback_handler.on_push_begin(self.args, trainer.state, trainer.control)

        def push() -> str | Future:
            if not trainer.is_sharding:
                trainer.save_model(_internal_call=True)  # before anything that may fail
            with pushing(self._where_it_is(), token):
                self.open(token, private, revision)
                trainer.create_model_card(**card)
                self.finish()
                output_dir = Path(self.args.output_dir)
                missing = {folder: self._place(folder) for folder in self.missing if folder.is_dir()}
                job = self._job(output_dir, missing, commit_message, revision, token, staged=not blocking)
                if blocking:
                    return job()
                self.running = self.executor.submit(self._said, job, output_dir)
                return self.running

        if trainer.is_sharding:
            trainer.save_model(_internal_call=True)  # in which all processes take part
        return on_main_process(self.args, push)

    def push_checkpoint(self, folder: str | Path) -> None:
        """
        Pushes the model as a checkpoint holds it, and the checkpoint where `hub_strategy` says so, in one commit in the background.
        A failure does not stop the training: it is said when it happens and when the training ends.

        Args:
            folder (`str` or `Path`):
                The checkpoint, already saved.
        """
        args, checkpoint = self.args, Path(folder)
        if args.process_index != 0 or args.hub_strategy == HubStrategy.END:
            return
        keeps = args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        if self.running is not None and not self.running.done() and not args.hub_always_push:
            self._note(checkpoint, "the push before it was still running")
            return
        self.trainer.callback_handler.on_push_begin(args, self.trainer.state, self.trainer.control)
        message = f"Training in progress, {checkpoint.name.replace('checkpoint-', 'step ')}"
        try:
            places = {checkpoint: self._place(checkpoint)} if keeps else {}
            job = self._job(checkpoint, places, message, None, args.hub_token, staged=True)
        except (OSError, ValueError) as error:
            self._failed(checkpoint, error)
            return
        self.running = self.executor.submit(self._said, job, checkpoint)

    def finish(self) -> None:
        """Waits for a push that is running, and says which checkpoints did not arrive."""
        if self.running is not None and not self.running.done():
            logger.info("Waiting for a push that is still running.")
        if self.running is not None:
            self.running.exception()
        if self.troubles:
            said = "; ".join(f"{folder.name}: {why}" for folder, why in self.troubles.items())
            logger.warning(
                f"{len(self.troubles)} pushes of checkpoints are missing on the Hub ({said}). They are saved in {self.args.output_dir}; "
                "`push_to_hub()` at the end pushes the model, and those of them that `hub_strategy` keeps."
            )
            self.troubles.clear()

    def _place(self, checkpoint: Path) -> str:
        return checkpoint.name if self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS else "last-checkpoint"

    def _job(
        self,
        weights: Path,
        checkpoints: dict[Path, str],
        message: str,
        revision: str | None,
        token: str | None,
        staged: bool,
    ) -> Callable[[], str]:
        """A push of the model in the folder `weights`, with checkpoints by where they go, of the files as they are now if `staged`."""
        is_lora = isinstance(self.trainer.policy, PeftModel)
        output_dir = Path(self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=STAGED, dir=output_dir))
        try:
            files = model_files(weights, is_lora) | card_files(output_dir) | event_files(output_dir)
            files |= self.trainer.further_files()
            if is_lora and self.trainer.backbone.has_comfyui_names:
                name = comfyui_path(self._name.split("/")[-1])
                try:
                    files[name] = export_lora(weights, folder / name)
                except ValueError as error:  # such as a DoRA
                    logger.warning(f"No file for ComfyUI is pushed. {error}")
            denoiser_name = None if is_lora else self.trainer.backbone.denoiser_name
            for checkpoint, place in checkpoints.items():
                state = checkpoint_files(checkpoint, denoiser_name)
                files |= {f"{place}/{name}": file for name, file in state.items()}
            files = stage(files, folder) if staged else files
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

        replaced = self.missing if self.args.hub_strategy == HubStrategy.CHECKPOINT and checkpoints else []
        done = {*replaced, *checkpoints}

        def push() -> str:
            try:
                repo_id, branch = self.repo_id or self.open(), revision or self.args.hub_revision
                stale: list[str] = []
                if "last-checkpoint" in checkpoints.values():
                    known = list_files(repo_id, branch, token)
                    stale = [name for name in known if name.startswith("last-checkpoint/") and name not in files]
                commit = push_files(files, repo_id, commit_message=message, revision=branch, token=token, delete=stale)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            self.missing = [each for each in self.missing if each not in done]
            return commit

        return push

    def _said(self, job: Callable[[], str], folder: Path) -> str:
        """Runs a push in the background; its failure is logged at once."""
        try:
            return job()
        except Exception as error:
            self._failed(folder, error)
            raise

    def _failed(self, folder: Path, error: Exception) -> None:
        reason, way_out = describe_failure(error, self.args.hub_token)
        logger.warning(f"The push of {folder} in the background failed: {reason}. {way_out}")
        if folder != Path(self.args.output_dir):
            self._note(folder, reason)

    def _note(self, checkpoint: Path, why: str) -> None:
        self.troubles[checkpoint] = why
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            self.missing = [checkpoint]
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            self.missing.append(checkpoint)

    def _where_it_is(self) -> str:
        """Where the model is saved, and the command that pushes it without the trainer."""
        folder = Path(self.args.output_dir)
        names = [*model_files(folder, isinstance(self.trainer.policy, PeftModel)), *CARD_FILES[:3], f"{PICTURES}/*"]
        patterns = dict.fromkeys(f"{name.split('/')[0]}/*" if "/" in name else name for name in names)
        command = ["hf", "upload", self._name, str(folder), "."]
        command += [word for pattern in patterns for word in ("--include", pattern)]
        return f"The model is saved in {folder}: `push_to_hub()` pushes it again, or, without the trainer, `{shlex.join(command)}`."
