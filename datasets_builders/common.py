# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Shared by the builders: reading the source, writing the folder and its card, and pushing to the Hub."""

import argparse
import re
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import (
    BuilderConfig,
    Dataset,
    DatasetInfo,
    GeneratorBasedBuilder,
    IterableDataset,
    SplitDict,
    SplitGenerator,
    SplitInfo,
)
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import CommitOperationAdd, DatasetCard, HfApi

from datasets_builders.dataset_card import describe_role, public, render_card  # noqa: F401 also used by builders
from datasets_builders.example_pictures import EXAMPLE, Picture, example_pictures
from trl_diffusion.annotation.join import find_runs, join_annotations, read_manifest
from trl_diffusion.annotation.records import STATUSES
from trl_diffusion.annotation.run import Row
from trl_diffusion.cards.text import fenced, python_string  # noqa: F401 also used by builders
from trl_diffusion.cards.text import one_line as cell  # noqa: F401
from trl_diffusion.checksums import DamagedFile, digest_of, read_json, write_json
from trl_diffusion.files import only_run, write_file
from trl_diffusion.hub import check_repository_name, create_repository, list_files, push_files, pushing
from trl_diffusion.hub_datasets import stale_files
from trl_diffusion.machine import without_places
from trl_diffusion.scripts.annotation import AnnotationArguments, load_rows
from trl_diffusion.trainer.diffusion_trainer import DiffusionTrainer


ANNOTATIONS = "annotations"  # the configuration without images
SHARD_BYTES = 500_000_000  # size of the rows of a file before compression
FILES_PER_COMMIT = 25_000  # the Hub's limit: a dataset is one commit
ROW_GROUP = 100


@dataclass
class SourceConfig(BuilderConfig):
    """
    A configuration of a builder.

    Args:
        annotations_dir (`str`, *optional*, defaults to `""`):
            Folder of a run, or the `output_dir` of runs.
        source (`str`, *optional*, defaults to `""`):
            The annotated dataset: a Hub id, a file or a folder, see [`data.sources.load_source`].
        source_config (`str`, *optional*):
            Configuration of the source.
        source_revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        source_streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream the source instead of storing it on the disk.
        columns (`str`, *optional*):
            JSON mapping from our names to the columns of the source, see [`annotation.records.pair_columns`].
        criteria (`str`, *optional*, defaults to `"painting"`):
            Criteria tree of the attributes, if there are any: a YAML file, or the name of a shipped tree.
        license (`str`, *optional*):
            License of the annotations, as the Hub names it. By default none is declared.
    """

    annotations_dir: str = ""
    source: str = ""
    source_config: str | None = None
    source_revision: str | None = None
    source_streaming: bool = False
    columns: str | None = None
    criteria: str = "painting"
    license: str | None = None

    def arguments(self, split: str) -> AnnotationArguments:
        """The source as arguments of the annotation commands."""
        return AnnotationArguments(
            dataset_name=self.source,
            dataset_config=self.source_config,
            dataset_revision=self.source_revision,
            dataset_streaming=self.source_streaming,
            dataset_split=split,
            columns=self.columns,
        )

    def load_stream(
        self, split: str, find_columns: Callable[[list[str], dict[str, str] | None], dict[str, str]]
    ) -> tuple[IterableDataset, dict[str, str]]:
        """
        Loads a split of the source.

        Args:
            split (`str`):
                The split.
            find_columns (`Callable`):
                [`annotation.records.pair_columns`] or [`annotation.records.image_columns`].

        Returns:
            `tuple`: a stream of the rows, and the mapping from our names to its columns.
        """
        dataset, columns, _ = load_rows(self.arguments(split), find_columns)
        return dataset.to_iterable_dataset() if isinstance(dataset, Dataset) else dataset, columns


class AnnotatedDatasetBuilder(GeneratorBasedBuilder):
    """
    A builder with two configurations: the rows for the trainers, with images, and the full annotations, without
    images.
    """

    BUILDER_CONFIG_CLASS = SourceConfig

    TASK: str  # name of the task in the manifests of the runs
    TEMPLATE: Path  # template of the card
    COLUMNS: dict[str, tuple[str, str, str]]  # shape, unit and meaning of each column, and of the fields of objects
    TAGS: list[str]
    HAS_BOXES: bool  # whether a card has something to show without the images
    TRAINER: type[DiffusionTrainer]  # the card cites its paper

    def annotations(self) -> dict[str, Dataset]:
        """The annotations of each split."""
        raise NotImplementedError

    def joined(self, annotations: dict[str, Dataset]) -> dict[str, IterableDataset]:
        """The rows for the trainers, of each split that has any."""
        raise NotImplementedError

    def describe(self, annotations: dict[str, Dataset]) -> dict[str, Any]:
        """Values for the template of the card, besides the names of the dataset and its source."""
        raise NotImplementedError

    def plan(self) -> dict[str, Any]:
        """The same of a recipe that was not run, with the default models and without figures."""
        raise NotImplementedError

    def picture(self, row: Row, with_images: bool) -> PIL.Image.Image:
        """Draws a row of the configuration with images, see [`example_pictures.example_pictures`]."""
        raise NotImplementedError

    def interest(self, row: Row) -> int:
        """How much a card shows with such a row."""
        raise NotImplementedError

    def runs(self) -> dict[str, Path]:
        """
        Finds the runs.

        Returns:
            `dict[str, Path]`: the folder of the run of each split.

        Raises:
            `ValueError`: If there are none, or their task is not that of this builder.
        """
        runs = find_runs(self.config.annotations_dir)
        for run in runs.values():
            if (task := read_manifest(run)["task"]) != self.TASK:
                raise ValueError(
                    f"{run} holds annotations of {task}, but `{self.name}` needs annotations of {self.TASK}: create them "
                    f"with `trl-diffusion annotate-{self.TASK}`."
                )
        return runs

    def rows(self) -> dict[str, Dataset | IterableDataset]:
        """
        The rows of this configuration.

        Returns:
            `dict`: the rows of each split. With images, these are streams in the order of the source.

        Raises:
            `ValueError`: If the configuration with images has no rows.
        """
        self.expected: dict[str, int] = {}
        self.counts: dict[str, Counter] = {}
        annotations = self.annotations()
        if self.config.name == ANNOTATIONS:
            return annotations
        if not (joined := self.joined(annotations)):
            raise ValueError(
                f"No row in {self.config.annotations_dir} has the status ok: there is nothing to train on."
            )
        return joined

    def join(
        self,
        split: str,
        stream: IterableDataset,
        annotations: Dataset,
        columns: dict[str, str],
        ties: bool = False,
    ) -> dict[str, IterableDataset]:
        """The joined rows of a split, if there are any. Stores their expected number."""
        is_tie = annotations["tie"][:] if "tie" in annotations.column_names else [False] * len(annotations)
        number = sum(
            STATUSES[status] == "ok" and tie == ties
            for status, tie in zip(annotations["status"][:], is_tie, strict=True)
        )
        if not number:
            return {}
        self.expected[split], self.counts[split] = number, Counter()
        return {split: join_annotations(stream, annotations, columns, ties, self.counts[split])}

    def check_complete(self) -> None:
        """
        Checks that all annotations were joined, after the rows have been read.

        Raises:
            `ValueError`: If rows are missing in the source.
        """
        for split, number in self.expected.items():
            if self.counts[split]["joined"] < number:
                raise ValueError(
                    f"The split {split} has {number:,} annotated rows, but the source has only "
                    f"{self.counts[split]['joined']:,} of them. Pass the dataset and the revision that were annotated, with "
                    "`--dataset_name` and `--dataset_revision`."
                )

    def _split_generators(self, dl_manager) -> list[SplitGenerator]:
        return [SplitGenerator(name=split, gen_kwargs={"rows": rows}) for split, rows in self.rows().items()]

    def _generate_examples(self, rows: Dataset | IterableDataset) -> Iterator[tuple[int, Row]]:
        # Decoded images would be encoded again
        undecoded = rows.decode(False) if isinstance(rows, IterableDataset) else rows
        yield from enumerate(map(public_reasons, undecoded) if self.config.name == ANNOTATIONS else undecoded)


def public_reasons(row: Row) -> Row:
    """An annotation row whose reasons name no folder and no server of the machine that annotated it."""
    row = row | {"reason": without_places(row["reason"])}
    if "dropped" in row:
        row["dropped"] = [found | {"reason": without_places(found["reason"])} for found in row["dropped"] or []]
    return row


# ----- the folder -----


def build(builder: AnnotatedDatasetBuilder, folder: Path) -> DatasetInfo:
    """
    Writes a configuration as Parquet files that contain the images, with the file names of `push_to_hub`.

    Args:
        builder ([`AnnotatedDatasetBuilder`]):
            The builder.
        folder (`Path`):
            Parent of the configuration's folder.

    Returns:
        [`~datasets.DatasetInfo`]: columns and splits.

    Raises:
        `ValueError`: If the source and the annotations do not match.
    """
    target = folder / builder.config.name
    try:
        builder.download_and_prepare(str(target), file_format="parquet", max_shard_size=SHARD_BYTES)
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None
    builder.check_complete()
    for split in builder.info.splits:
        files = sorted(target.glob(f"{builder.name}-{split}-*.parquet")) or [
            target / f"{builder.name}-{split}.parquet"
        ]
        for number, file in enumerate(files):
            file.rename(target / f"{split}-{number:05d}-of-{len(files):05d}.parquet")
    builder.info.download_size = sum(file.stat().st_size for file in target.glob("*.parquet"))
    (target / "dataset_info.json").unlink()  # the card contains the same information
    for lock in folder.glob("*.lock"):
        lock.unlink()
    return builder.info


# ----- the card -----


def make_card(
    builder: AnnotatedDatasetBuilder,
    described: dict[str, Any],
    infos: dict[str, DatasetInfo],
    name: str,
    pictures: Iterable[Picture] = (),
) -> DatasetCard:
    """
    Writes the card.

    Args:
        builder ([`AnnotatedDatasetBuilder`]):
            The builder, with either configuration.
        described (`dict`):
            The builder's values for the template.
        infos (`dict[str, DatasetInfo]`):
            The configurations of the dataset. The first is the default.
        name (`str`):
            Hub id or folder of the dataset.
        pictures (`Iterable[Picture]`, *optional*):
            The pictures beside the card, see [`card_pictures`].

    Returns:
        [`~huggingface_hub.DatasetCard`]
    """
    config = builder.config
    source = public(config.source)
    arguments = [python_string(value) for value in (source, config.source_config) if value]
    arguments += [f"revision={python_string(config.source_revision)}"] if config.source_revision else []
    called = {
        "source": source,
        "arguments": ", ".join(arguments),
        "mapping": config.arguments("").mapping,
        "command": commands(builder, described),
    }
    return render_card(
        builder.TEMPLATE,
        described | called,
        infos,
        name,
        columns=builder.COLUMNS,
        tags=builder.TAGS,
        paper=builder.TRAINER.method.paper,
        annotations=ANNOTATIONS,
        license=config.license,
        pictures=pictures,
    )


def commands(builder: AnnotatedDatasetBuilder, described: dict[str, Any]) -> str:
    """The commands that annotate the source and build the dataset, for a shell."""
    config = builder.config
    dataset = {
        "dataset_name": public(config.source),
        "dataset_config": config.source_config,
        "dataset_revision": config.source_revision,
        "columns": config.columns,
    }
    annotate = {**dataset, "dataset_split": described["annotated_split"], **described["flags"]}
    build = {**dataset, "annotations_dir": "annotations", "output_dir": "dataset"}
    flags = [*annotate.items(), ("output_dir", "annotations")], build.items()
    programs = f"trl-diffusion annotate-{builder.TASK}", f"python -m datasets_builders.{builder.name}"
    return "\n".join(
        " \\\n    ".join(
            [program, *(f"--{flag} {shlex.quote(str(value))}" for flag, value in given if value is not None)]
        )
        for program, given in zip(programs, flags, strict=True)
    )


def card_pictures(builder: AnnotatedDatasetBuilder, folder: Path, with_images: bool = True) -> list[Picture]:
    """
    Draws a few rows of a dataset that was built with images, for its card.

    Args:
        builder ([`AnnotatedDatasetBuilder`]):
            The builder, with either configuration.
        folder (`Path`):
            Folder of the dataset.
        with_images (`bool`, *optional*, defaults to `True`):
            Whether the pictures may show the images, because these are part of the dataset that the card is for. Otherwise they
            show boxes alone.

    Returns:
        `list[Picture]`: the pictures, which the card links and expects beside it. Empty if the folder has no images, or if there
        is nothing to see without them.
    """
    rows = folder / builder.DEFAULT_CONFIG_NAME
    if not any(rows.glob("*.parquet")) or not (with_images or builder.HAS_BOXES):
        return []
    draw = partial(builder.picture, with_images=with_images)
    return example_pictures(rows, draw, builder.interest)


def planned_card(builder_class: type[AnnotatedDatasetBuilder], name: str, **options: Any) -> DatasetCard:
    """
    Writes the card of a dataset that was not built: the recipe, the columns and the commands. Figures are "not measured".

    Args:
        builder_class (`type[AnnotatedDatasetBuilder]`):
            The builder.
        name (`str`):
            Hub id of the dataset.
        options (`dict`):
            Fields of [`SourceConfig`], such as `source`.

    Returns:
        [`~huggingface_hub.DatasetCard`]
    """
    with tempfile.TemporaryDirectory() as scratch:
        builder = builder_class(config_name=ANNOTATIONS, cache_dir=scratch, **options)
        return make_card(builder, builder.plan(), {ANNOTATIONS: builder.info}, name)


# ----- the Hub -----


def push(
    folder: Path,
    repo_id: str,
    builder: AnnotatedDatasetBuilder,
    described: dict[str, Any],
    infos: dict[str, DatasetInfo],
    streamed: AnnotatedDatasetBuilder | None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """
    Pushes a dataset in one commit, which also deletes the files of an earlier one: whoever loads it gets all of the new one or
    all of the old one. Files are uploaded ahead of the commit, and those that the Hub has from an interrupted push are not
    uploaded again.

    Args:
        folder (`Path`):
            Folder of the dataset.
        repo_id (`str`):
            Repository on the Hub, `USER/NAME` or `NAME`.
        builder ([`AnnotatedDatasetBuilder`]):
            The builder, for the card.
        described (`dict`):
            The builder's values for the template of the card.
        infos (`dict[str, DatasetInfo]`):
            The configurations in the folder to push.
        streamed ([`AnnotatedDatasetBuilder`], *optional*):
            A builder whose rows are streamed from the source to the Hub.
        private (`bool`, *optional*):
            Whether a new repository is private.
        revision (`str`, *optional*):
            Branch to push to.
        token (`str`, *optional*):
            A token with the right to write.

    Returns:
        `str`: the whole name of the repository.

    Raises:
        `ValueError`: If rows are missing in the source.
    """
    repo_id = create_repository(repo_id, "dataset", private, revision, token)
    where = {"repo_id": repo_id, "repo_type": "dataset", "revision": revision}
    api, uploaded = HfApi(token=token), []
    if streamed:
        info, uploaded = push_stream(api, where, streamed, scratch_prefix(folder))
        infos = {streamed.config.name: info, **infos}
    pictures = card_pictures(builder, folder, with_images=len(infos) > 1)
    card = str(make_card(builder, described, infos, repo_id, pictures))
    present = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    tables = [name for name in present if name.split("/")[0] in infos]
    others = [name for name in present if name.split("/")[0] not in builder.builder_configs and name in card]
    files = {name: folder / name for name in (*tables, *others)}
    # Without the images in the dataset, these are other pictures than those in the folder
    files |= {picture.name: picture.data for picture in pictures} | {"README.md": card.encode()}
    pushed = {*files, *(addition.path_in_repo for addition in uploaded)}
    if len(pushed) > FILES_PER_COMMIT:
        raise ValueError(
            f"{len(pushed):,} files are more than the {FILES_PER_COMMIT:,} that the Hub takes in one commit."
        )
    earlier = list_files(repo_id, revision, token, "dataset")
    stale = stale_files(earlier, pushed, repo_id, {*builder.builder_configs, "criteria.yaml"})
    stale += sorted({name for name in earlier if EXAMPLE.fullmatch(name)} - {*pushed, *stale})
    message = f"Upload {' and '.join(infos)}"
    push_files(files, commit_message=message, token=token, delete=stale, uploaded=uploaded, **where)
    return repo_id


def scratch_prefix(folder: Path) -> str:
    """What the names of the temporary folders begin with that the push of a dataset has."""
    return f"trl-diffusion-{digest_of(str(folder.absolute()))[:16]}-"


def push_stream(
    api: HfApi, where: dict[str, str | None], builder: AnnotatedDatasetBuilder, prefix: str
) -> tuple[DatasetInfo, list[CommitOperationAdd]]:
    """
    Uploads a configuration whose rows are streamed from the source, without a commit. Only one file at a time is on the disk, and
    one row group in memory. The source is read once for each split. (`IterableDataset.push_to_hub` fails for shards without
    rows.)

    Args:
        api ([`~huggingface_hub.HfApi`]):
            The Hub.
        where (`dict`):
            `repo_id`, `repo_type` and `revision`.
        builder ([`AnnotatedDatasetBuilder`]):
            The builder.
        prefix (`str`):
            What the name of the temporary folder begins with.

    Returns:
        `tuple[DatasetInfo, list[CommitOperationAdd]]`: columns and splits, and what the commit adds.

    Raises:
        `ValueError`: If rows are missing in the source.
    """
    name, info = builder.config.name, builder.info.copy()
    info.splits, info.download_size, info.dataset_size = SplitDict(), 0, 0
    additions = []
    for split, rows in builder.rows().items():
        info.splits.add(SplitInfo(split, num_examples=0, num_bytes=0))
        with tempfile.TemporaryDirectory(prefix=prefix) as uploading:
            for number, (file, num_rows, num_bytes) in enumerate(write_files(rows, Path(uploading))):
                addition = CommitOperationAdd(f"{name}/{split}-{number:05d}.parquet", file)
                api.preupload_lfs_files(additions=[addition], **where)
                if addition.path_or_fileobj:  # not uploaded: the Hub wants a small file together with the commit
                    addition = CommitOperationAdd(addition.path_in_repo, file.read_bytes())
                additions.append(addition)
                info.splits[split].num_examples += num_rows
                info.splits[split].num_bytes += num_bytes
                info.download_size += file.stat().st_size
                info.dataset_size += num_bytes
                file.unlink()
    builder.check_complete()
    return info, additions


def write_files(rows: IterableDataset, folder: Path) -> Iterator[tuple[Path, int, int]]:
    """
    Writes a stream as Parquet files. Each file is written when the caller requests it.

    Args:
        rows ([`~datasets.IterableDataset`]):
            The stream.
        folder (`Path`):
            Folder for the files.

    Yields:
        `tuple[Path, int, int]`: a file, its number of rows, and their size in bytes before compression.
    """
    features, iterator = rows.features, iter(rows.decode(False))
    blocks = iter(lambda: [features.encode_example(row) for row in islice(iterator, ROW_GROUP)], [])
    tables = (pa.Table.from_pylist(block, schema=features.arrow_schema) for block in blocks)
    for number in count():
        path, num_rows, num_bytes = folder / f"{number}.parquet", 0, 0
        with pq.ParquetWriter(path, features.arrow_schema) as writer:
            for table in tables:
                writer.write_table(table)
                num_rows += table.num_rows
                num_bytes += table.nbytes
                if num_bytes > SHARD_BYTES:
                    break
        if not num_rows:
            return
        yield path, num_rows, num_bytes


# ----- the command -----


def make_parser(name: str, images: str) -> argparse.ArgumentParser:
    """
    Creates the parser of a builder.

    Args:
        name (`str`):
            Name of the builder.
        images (`str`):
            Name of its configuration with images.

    Returns:
        `argparse.ArgumentParser`
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m datasets_builders.{name}",
        description="Builds a dataset from annotations and the annotated dataset: a folder with a card for `load_dataset`.",
    )
    parser.add_argument(
        "--dataset_name",
        required=True,
        help="The annotated dataset: a Hub id, a file of rows, or a folder of files or images.",
    )
    parser.add_argument("--dataset_config", help="Configuration of the dataset.")
    parser.add_argument("--dataset_revision", help="Branch, tag or commit on the Hub.")
    parser.add_argument(
        "--dataset_streaming", action="store_true", help="Stream the dataset instead of storing it on the disk."
    )
    parser.add_argument("--columns", help="JSON mapping from our names to the columns of the dataset.")
    parser.add_argument(
        "--annotations_dir", required=True, help="Folder of a run, or the `--output_dir` of the annotation command."
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="New or empty folder for the dataset.")
    parser.add_argument(
        "--no_images", action="store_true", help=f"Build only the annotations, without the configuration `{images}`."
    )
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="License of the annotations, as the Hub names it, such as cc-by-4.0. It covers neither prompts nor images.",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="USER/NAME",
        help="Push the annotations and the card to this repository. Without USER it is one of the token's user.",
    )
    parser.add_argument(
        "--push_images",
        action="store_true",
        help=f"Also push `{images}`. With `--no_images`, its rows are streamed from the source to the Hub.",
    )
    parser.add_argument("--private", action="store_true", help="Make the repository private if it is new.")
    parser.add_argument("--hub_revision", help="Branch to push to. It is created if there is none.")
    parser.add_argument("--hub_token", help="Token for the push. Defaults to that of `hf auth login` or HF_TOKEN.")
    return parser


def described_command(args: argparse.Namespace) -> dict[str, str]:
    """The flags of a command, without the token."""
    return {name: str(value) for name, value in vars(args).items() if name != "hub_token"}


def file_states(folder: Path) -> dict[str, list[int]]:
    """Sizes and times of the files of a folder."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def is_ours(folder: Path, built: Path, args: argparse.Namespace) -> bool:
    """Whether the same command has built a folder and was killed before its end, such as while it was pushed."""
    try:
        found = read_json(built)
    except DamagedFile:  # or missing
        return False
    return found == {"command": described_command(args), "files": file_states(folder)}


@contextmanager
def ended(work: Path, built: Path) -> Iterator[None]:
    """Removes the traces of a build when it ends, in whatever way but a kill. What was built is known to the last."""
    try:
        yield
    finally:
        shutil.rmtree(work)
        built.unlink(missing_ok=True)


def main(builder_class: type[AnnotatedDatasetBuilder], args: argparse.Namespace, criteria: str | None = None) -> None:
    """
    Builds a dataset, and pushes it if requested.

    Args:
        builder_class (`type[AnnotatedDatasetBuilder]`):
            The builder.
        args (`argparse.Namespace`):
            The flags of [`make_parser`].
        criteria (`str`, *optional*):
            Criteria tree of the attributes.

    Raises:
        `ValueError`: If the folder is not empty, or the source and the annotations do not match.
    """
    if args.push_to_hub:
        check_repository_name(args.push_to_hub, "`--push_to_hub`")
    for flag in ("push_images", "private", "hub_revision", "hub_token"):
        if getattr(args, flag) and not args.push_to_hub:
            raise ValueError(f"`--{flag}` needs a repository: name one with `--push_to_hub`.")
    if args.license and not re.fullmatch("[a-z0-9.-]+", args.license):
        raise ValueError(
            f"`--license` must be a name of the Hub, such as cc-by-4.0 or other, got {args.license!r}. The names are on "
            "https://huggingface.co/docs/hub/repositories-licenses."
        )
    folder = args.output_dir.absolute()
    work, built_file = (folder.with_name(f".{folder.name}-{what}") for what in ("building", "built.json"))
    if not is_ours(folder, built_file, args) and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{args.output_dir} exists and is not empty. Choose another `--output_dir`.")
    options = {
        "annotations_dir": args.annotations_dir,
        "source": args.dataset_name,
        "source_config": args.dataset_config,
        "source_revision": args.dataset_revision,
        "source_streaming": args.dataset_streaming,
        "columns": args.columns,
        "criteria": criteria,
        "license": args.license,
    }
    name = args.push_to_hub if "/" in (args.push_to_hub or "") else folder.name
    images = builder_class.DEFAULT_CONFIG_NAME
    with only_run(work, f"building {folder.name}"), ended(work, built_file):
        scratch = work / "scratch"
        for left in [scratch, *Path(tempfile.gettempdir()).glob(f"{scratch_prefix(folder)}*")]:
            shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
        scratch.mkdir()
        builders = {
            config: builder_class(config_name=config, cache_dir=str(scratch), **options)
            for config in (images, ANNOTATIONS)
        }
        described = builders[ANNOTATIONS].describe(builders[ANNOTATIONS].annotations())
        built = scratch / "built"
        built.mkdir()
        infos = {ANNOTATIONS: build(builders[ANNOTATIONS], built)}
        if not args.no_images:
            infos = {images: build(builders[images], built), **infos}
        if criteria and Path(criteria).is_file():
            shutil.copy(criteria, built / "criteria.yaml")
        pictures = card_pictures(builders[ANNOTATIONS], built)
        for picture in pictures:
            write_file(built / picture.name, picture.data)
        make_card(builders[ANNOTATIONS], described, infos, name, pictures).save(built / "README.md")
        if folder.exists():
            folder.rename(scratch / "earlier")  # empty, or of a run of this command that was killed
        write_json(built_file, {"command": described_command(args), "files": file_states(built)})
        built.rename(folder)
        for config, info in infos.items():
            for split in info.splits.values():
                print(f"{args.output_dir}: {config}, {split.name}: {split.num_examples:,} rows")
        if args.push_to_hub:
            pushed = {config: info for config, info in infos.items() if config == ANNOTATIONS or args.push_images}
            streamed = builders[images] if args.push_images and args.no_images else None
            with pushing(f"The dataset is saved in {args.output_dir}.", args.hub_token):
                repo_id = push(
                    folder,
                    args.push_to_hub,
                    builders[ANNOTATIONS],
                    described,
                    pushed,
                    streamed,
                    args.private or None,
                    args.hub_revision,
                    args.hub_token,
                )
            print(f"Pushed to {HfApi().endpoint}/datasets/{repo_id}.")
