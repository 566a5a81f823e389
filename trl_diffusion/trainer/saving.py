# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""When a training saves, which checkpoint it goes on from, and that no other run has its output directory meanwhile."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..files import describe_write_error, lock_folder
from .alike import check_models_alike
from .callbacks import NothingToTrainError
from .checkpoint_folders import (
    SAVING,
    checkpoints_in,
    clear_left_overs,
    discard,
    finish_checkpoint,
    rotate,
    spoiled_components,
    step_of,
    what_is_wrong,
    written_aside,
)
from .checkpoints import forget_best_checkpoint
from .publishing import on_main_process
from .run_record import write_run_record


logger = get_logger(__name__)

ALL_NEED_IT = "All machines need the whole folder: let them share a disk, copy it to each, or have each save with `--save_on_each_node`"
SAME_COMMAND = "the same command with `--resume_from_checkpoint true`, in Python `train(resume_from_checkpoint=True)`,"


@contextmanager
def using(output_dir: str | Path) -> Iterator[None]:
    """
    Keeps an output directory for this process, which may ask for it more than once.

    Args:
        output_dir (`str` or `Path`):
            The directory. It is created if it does not exist.

    Raises:
        `ValueError`: If it cannot be written, or another process has it.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason, way_out = describe_write_error(error)
        raise ValueError(
            f"The output directory {folder} cannot be written: {reason}. {way_out} before the training starts."
        ) from error
    lock = lock_folder(
        folder,
        f"Another run is using the output directory {folder}. Wait until it ends, stop it, or name another `output_dir`.",
        is_shared=True,
    )
    try:
        yield
    finally:
        lock.release()


class Saver:
    """
    Saves and finds the checkpoints of a trainer.

    Args:
        trainer ([`DiffusionTrainer`]):
            The trainer, of which only `args` is there yet.
        trains (`bool`):
            Whether it can train. If so, the output directory is looked at before anything takes long.

    Attributes:
        folder (`Path`, *optional*):
            Where transformers writes a checkpoint to, while one is saved.
        passed_over (`list[Path]`):
            Checkpoints from which the training could not go on.
    """

    def __init__(self, trainer: Trainer, trains: bool):
        self.trainer = trainer
        self.args = trainer.args
        self.folder: Path | None = None
        self.passed_over: list[Path] = []
        if trains:
            on_main_process(self.args, self._check_output_dir)

    def _check_output_dir(self) -> None:
        with using(self.args.output_dir):
            pass

    @property
    def _is_first_of_node(self) -> bool:
        return self.args.local_process_index == 0

    @contextmanager
    def training(self) -> Iterator[None]:
        """Keeps the output directory while the context lasts, and clears what killed runs have left there."""
        args, used = self.args, using(self.args.output_dir)
        check_models_alike(self.trainer)
        on_main_process(args, used.__enter__)
        try:
            self._clear(Path(args.output_dir))
            yield
        finally:
            if args.process_index == 0:
                used.__exit__(None, None, None)

    def _clear(self, output_dir: Path) -> None:
        on_main_process(self.args, lambda: clear_left_overs(output_dir))
        if self._is_first_of_node:  # on its own disk, where there is more than one
            clear_left_overs(output_dir)
        self.trainer.accelerator.wait_for_everyone()

    # ----- saving -----

    @contextmanager
    def model_folder(self, folder: Path) -> Iterator[Path]:
        """Yields where a model is written that belongs to a folder: there, in a checkpoint that is being saved, else aside."""
        if self.folder is not None and self.folder in folder.parents:
            yield folder
            return
        with written_aside(folder) as aside:
            yield aside

    def save(self, output_dir: Path, save: Callable[[], None]) -> None:
        """
        Saves a checkpoint, whole or not at all, and then deletes and pushes as the settings say.

        Args:
            output_dir (`Path`):
                The folder of the checkpoints.
            save (`Callable`):
                Writes the checkpoint into `self.folder`, in all processes.

        Raises:
            `ValueError`: If it cannot be written, for example because the disk is full.
        """
        args, trainer, state = self.args, self.trainer, self.trainer.state
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self._clear(output_dir)
        self.folder, place = output_dir / SAVING, output_dir / name
        written = self.folder / name
        try:
            if args.should_save:
                write_run_record(written, trainer.run_record)
            save()
            trainer.accelerator.wait_for_everyone()
            on_main_process(args, lambda: self._finish(written, place))
        except Exception as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if not (described := describe_write_error(error.__cause__ or error)):
                raise
            reason, way_out = described
            raise ValueError(
                f"{place} cannot be saved: {reason}. Nothing of it is left, and the checkpoints before it are whole. {way_out}; "
                f"{SAME_COMMAND} continues."
            ) from error
        finally:
            self.folder = None
        if (
            self._is_first_of_node and written.exists()
        ):  # this node has a disk of its own, and its part of the checkpoint
            self._finish(written, place)
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if best.is_dir():
            state.best_model_checkpoint = str(best)
        if args.push_to_hub:
            trainer.publisher.push_checkpoint(place)
        if args.should_save:
            self._rotate(output_dir)

    def _rotate(self, output_dir: Path) -> None:
        state = self.trainer.state
        rotate(output_dir, state.global_step, self.args.save_total_limit, state.best_global_step, self.passed_over)

    def _finish(self, written: Path, place: Path) -> None:
        forget_best_checkpoint(written)
        finish_checkpoint(written, place, self.trainer.backbone.denoiser_name)
        if self.trainer.backbone.saved_in == written.resolve():
            self.trainer.backbone.saved_in = place.resolve()

    def keep_the_best(self, output_dir: Path) -> None:
        """Deletes all checkpoints but the best one, as transformers does after a training with `save_total_limit=1`."""
        best = self.trainer.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            for checkpoint in checkpoints_in(output_dir):
                if checkpoint.name != Path(best).name:
                    discard(checkpoint)

    # ----- going on -----

    def resume(self, train: Callable, resume: str | bool | None, *args, **kwargs) -> TrainOutput:
        """
        Trains on from a checkpoint. Where `args.resume_from_checkpoint` asks for it wherever the run stood, one whose steps are all
        done, but that was stopped before its model was saved, ends at once.

        Args:
            train (`Callable`):
                Trains, from the checkpoint that is its first argument, with the further arguments.
            resume (`str` or `bool`, *optional*):
                See [`~Saver.choose`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]
        """
        trainer = self.trainer
        try:
            return train(self.choose(resume), *args, **kwargs)
        except NothingToTrainError:
            if (
                self.args.resume_from_checkpoint is not True
                or not 0 < trainer.state.global_step == trainer.state.max_steps
            ):
                raise
        logger.info(f"All {trainer.state.global_step} steps are done.")
        output_dir = Path(self.args.output_dir)
        on_main_process(self.args, lambda: self._rotate(output_dir))  # perhaps it was killed before
        on_main_process(self.args, lambda: self.keep_the_best(output_dir))
        if self.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        trainer.control = trainer.callback_handler.on_train_end(self.args, trainer.state, trainer.control)
        trainer.is_in_train = False
        return TrainOutput(trainer.state.global_step, 0.0, {})

    def choose(self, resume: str | bool | None) -> str | None:
        """
        Finds the checkpoint to go on from, the same one in all processes.

        Args:
            resume (`str` or `bool`, *optional*):
                A folder, or `True` for the newest whole checkpoint of the output directory.

        Returns:
            `str` or `None`: the folder; `None` if the training starts from the beginning.

        Raises:
            `ValueError`: If the folder that is named is no whole checkpoint.
        """
        output_dir = Path(self.args.output_dir)
        if not isinstance(resume, bool | None):
            chosen: Path | None = Path(resume)
            if wrong := self._what_is_wrong(chosen):
                raise ValueError(self._refusal(chosen, wrong))
        elif not resume:
            chosen = None
        else:
            chosen = self._newest_whole(output_dir)
        if chosen is not None and self._is_first_of_node and (spoiled := spoiled_components(chosen)):
            logger.warning(
                f"The training goes on from {chosen}, although the checkpoint does not load as a pipeline: {'; '.join(spoiled)}.",
                main_process_only=False,
            )
        self._warn_of_later_ones(output_dir, chosen)
        return None if chosen is None else str(chosen)

    def _newest_whole(self, output_dir: Path) -> Path | None:
        names = self._names(output_dir)
        self.passed_over, reasons = [], []
        is_whole_somewhere = False
        for name in names:
            if not (wrong := self._what_is_wrong(output_dir / name)):
                chosen = f"The training goes on from {output_dir / name}."
                break
            self.passed_over.append(output_dir / name)
            reasons.append(f"{name}: {wrong}")
            is_whole_somewhere |= ALL_NEED_IT in wrong
        else:
            if is_whole_somewhere:
                raise ValueError(f"The training cannot go on: {'; '.join(reasons)}.")
            name, chosen = (
                None,
                f"There is no whole checkpoint in {output_dir}: the training starts from the beginning.",
            )
        if reasons:
            chosen += f" Passed over: {'; '.join(reasons)}."
        logger.log(30 if reasons or name is None else 20, chosen)
        return None if name is None else output_dir / name

    def _names(self, folder: Path) -> list[str]:
        """The names of the first process's checkpoints in a folder, the last one first."""
        return gather_object([[path.name for path in reversed(checkpoints_in(folder))]])[0]

    def _what_is_wrong(self, checkpoint: Path) -> str | None:
        """What any process finds wrong: each node looks at its own disk."""
        wrong = what_is_wrong(checkpoint) if self._is_first_of_node else None
        found = gather_object([wrong])
        first = next((number for number, wrong in enumerate(found) if wrong), None)
        if first is None:
            return None
        if first == 0:
            return found[0]
        (place,) = gather_object([str(checkpoint.resolve())])[first : first + 1]
        return f"{found[first]} in {place} on the machine of process {first}. {ALL_NEED_IT}"

    def _refusal(self, checkpoint: Path, wrong: str) -> str:
        others = [checkpoint.parent / name for name in self._names(checkpoint.parent) if name != checkpoint.name]
        whole = next((path for path in others if self._what_is_wrong(path) is None), None)
        way_out = (
            f"Name {whole}, the newest whole one beside it, or let `true` take the newest whole one of the output directory."
            if whole
            else "Name another one, or start from the beginning without `resume_from_checkpoint`."
        )
        return f"The training cannot go on from {checkpoint}: {wrong}. {way_out}"

    def _warn_of_later_ones(self, output_dir: Path, chosen: Path | None) -> None:
        passed_over = {path.name for path in self.passed_over}
        step = 0
        if chosen is not None:
            step = TrainerState.load_from_json(str(chosen / TRAINER_STATE_NAME)).global_step
        later = [path.name for path in checkpoints_in(output_dir) if step_of(path) > step]
        later = [name for name in later if name not in passed_over]
        if later:
            logger.warning(
                f"{output_dir} holds {', '.join(later)} of an earlier run. They stay until this one saves the same step; until "
                "then, `resume_from_checkpoint=True` would take the last of them. Delete them if they are not wanted."
            )
