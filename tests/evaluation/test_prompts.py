# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import csv
import json
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import layouts
from trl_diffusion.evaluation import prompts as module
from trl_diffusion.evaluation.prompts import Prompt, PromptSet, load_prompts, make_prompts


COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = ["a cat", 'a "red" circle, and a square', "  a dog: ünïcode "]


def write(path, rows: list[dict]) -> str:
    """Writes rows to a file, in the format of its suffix."""
    if path.suffix == ".txt":
        path.write_text("\n".join(row["prompt"] for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([row["prompt"] for row in rows]), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub cache that records the requested repositories, names and revisions."""
    asked = []

    def put(repo_id: str, filename: str, content: str | pa.Table):
        path = tmp_path / "hub" / repo_id / "snapshots" / COMMIT / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            pq.write_table(content, path)

    def download(repo_id, filename, revision, repo_type):
        asked.append((repo_id, filename, revision, repo_type))
        path = tmp_path / "hub" / repo_id / "snapshots" / COMMIT / filename
        if not path.exists():
            raise FileNotFoundError("the repository is gone.\nmore")
        return str(path)

    monkeypatch.setattr(module, "hf_hub_download", download)
    return SimpleNamespace(put=put, asked=asked)


class TestFiles:
    @pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet"])
    def test_texts_are_read_as_they_are(self, tmp_path, suffix):
        """All file formats give the same prompts, with row numbers as ids."""
        prompt_set = load_prompts(write(tmp_path / f"my{suffix}", [{"prompt": text} for text in TEXTS]))
        assert prompt_set.prompts == tuple(Prompt(f"0000{n}", text) for n, text in enumerate(TEXTS))
        assert (prompt_set.name, prompt_set.revision) == (f"my{suffix}", None)
        same = load_prompts(write(tmp_path / "other.jsonl", [{"prompt": text} for text in TEXTS]))
        assert prompt_set.digest == same.digest and prompt_set.digest.startswith("sha256:")

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
    def test_ids_groups_and_other_columns(self, tmp_path, suffix):
        """Ids and groups come from the file, for any name of the prompt column."""
        rows = [{"id": "x-1", "caption": "a cat", "group": "pets"}, {"id": "B.2", "caption": "a dog", "group": "dogs"}]
        path = write(tmp_path / f"my{suffix}", rows)
        assert load_prompts(path, prompt_column="caption").prompts == (
            Prompt("x-1", "a cat", "pets"),
            Prompt("B.2", "a dog", "dogs"),
        )

    def test_numbers_as_ids(self, tmp_path):
        """Numeric ids become strings, and an empty group becomes `None`."""
        path = write(tmp_path / "my.parquet", [{"id": 7, "prompt": "a", "group": ""}])
        assert load_prompts(path).prompts == (Prompt("7", "a", None),)

    def test_images_are_not_read(self, tmp_path, monkeypatch):
        """Of a Parquet file with images, columns of bytes and structs are not read."""
        path = tmp_path / "my.parquet"
        pq.write_table(
            pa.table({"prompt": ["a"], "jpg_0": [b"jpg"], "image": [{"bytes": b"png", "path": None}], "n": [1]}), path
        )
        read, seen = pq.read_table, []
        monkeypatch.setattr(
            pq, "read_table", lambda path, columns: seen.append(columns) or read(path, columns=columns)
        )
        assert [prompt.text for prompt in load_prompts(path).prompts] == ["a"]
        assert seen == [["prompt", "n"]]

    def test_the_mark_of_some_editors(self, tmp_path):
        """A byte order mark is not part of the first prompt or of the first column name."""
        for name, content in (("my.txt", "a cat\n"), ("my.csv", "prompt\na cat\n")):
            (tmp_path / name).write_text(content, encoding="utf-8-sig")
            assert load_prompts(tmp_path / name).prompts[0].text == "a cat"

    def test_the_digest_is_that_of_ids_and_texts(self, tmp_path):
        """The hash changes with texts, ids and order, but not with groups."""
        rows = [{"id": "a", "prompt": "x", "group": "1"}, {"id": "b", "prompt": "y", "group": "1"}]
        others = {
            "text": [rows[0], rows[1] | {"prompt": "z"}],
            "id": [rows[0], rows[1] | {"id": "c"}],
            "order": rows[::-1],
            "group": [rows[0], rows[1] | {"group": "2"}],
        }
        digest = load_prompts(write(tmp_path / "my.jsonl", rows)).digest
        same = {
            name for name, rows in others.items() if load_prompts(write(tmp_path / "my.jsonl", rows)).digest == digest
        }
        assert same == {"group"}

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("my.txt", "", "my.txt holds no prompts"),
            ("my.csv", "prompt\n", "my.csv holds no prompts"),
            ("my.txt", "a cat\n\na dog\n", "The prompt in row 1 of my.txt, counted from 0, is ''"),
            ("my.csv", "id,prompt\na,x\nb,  \n", "The prompt in row 1 of my.csv, counted from 0, is '  '"),
            ("my.json", '["a", 3]', "The prompt in row 1 of my.json, counted from 0, is 3"),
            ("my.json", '{"a": 3}', "my.json cannot be read.*not a list of strings"),
            ("my.csv", "caption,id\nx,1\n", "no 'prompt'; it has 'caption', 'id'.*`prompt_column`"),
            ("my.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "Row 1 of .*my.jsonl, counted from 0, has no 'prompt'"),
            (
                "my.jsonl",
                '{"prompt": "a"}\n{"prompt"\n',
                "my.jsonl cannot be read.*row 1, counted from 0, is not a JSON",
            ),
            ("my.jsonl", '"a cat"\n', "row 0, counted from 0, is not a JSON object"),
            (
                "my.csv",
                'prompt\n"a cat\na dog\n',
                "my.csv cannot be read as a file of prompts: unexpected end of data",
            ),
            (
                "my.csv",
                "prompt\na cat, a dog\n",
                "row 0, counted from 0, has more cells.*Quote texts that contain ','",
            ),
            (
                "my.csv",
                "id,prompt\na,x\nb,y\na,z\n",
                "The id 'a' in row 2 of my.csv, counted from 0, repeats 'a' of an earlier row",
            ),
            ("my.csv", "id,prompt\na,x\nA,y\n", "The id 'A' in row 1 .* repeats 'a' of an earlier row"),
            ("my.csv", "id,prompt\na/b,x\n", "The id 'a/b' in row 0 .* cannot be part of a file name"),
            ("my.csv", "id,prompt\n..,x\n", "The id '..' in row 0 .* cannot be part"),
            ("my.csv", "id,prompt\n,x\n", "The id '' in row 0 .* cannot be part"),
            ("my.parquet", "no parquet", "my.parquet cannot be read as a file of prompts"),
            ("my.md", "a cat", "my.md is not a file of prompts, which must end in one of .txt"),
        ],
    )
    def test_mistakes(self, tmp_path, name, content, message):
        """A mistake in a file raises a ValueError with the file, the row and the way out."""
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_prompts(tmp_path / name)

    def test_files_that_are_not_text_in_utf_8(self, tmp_path):
        """Another encoding raises a ValueError with the file."""
        (tmp_path / "my.txt").write_bytes("ünïcode".encode("latin-1"))
        with pytest.raises(ValueError, match="my.txt cannot be read"):
            load_prompts(tmp_path / "my.txt")

    def test_sources_that_there_are_not(self, tmp_path):
        """For an unknown name, the error lists the known ones; for a missing file, it names the file."""
        with pytest.raises(
            ValueError, match="no prompts called 'partl'. Choose one of parti, hpdv2, pickapic, a file"
        ):
            load_prompts("partl")
        with pytest.raises(ValueError, match="There is no file of prompts at .*my.txt"):
            load_prompts(tmp_path / "my.txt")


class TestLimit:
    def prompt_set(self, num: int) -> PromptSet:
        return PromptSet("x", None, "sha256:0", make_prompts([{"id": None, "prompt": "a", "group": None}] * num, "x"))

    @pytest.mark.parametrize(("num", "limit"), [(10, 3), (1632, 100), (3200, 7), (5, 5), (5, 9), (5, 1)])
    def test_prompts_at_even_distances(self, num, limit):
        """The gaps between selected prompts differ by at most one, and prompts keep their ids."""
        whole = self.prompt_set(num)
        taken = whole.select(limit)
        assert len(taken.prompts) == min(num, limit)
        places = [int(prompt.id) for prompt in taken.prompts]
        gaps = {after - before for before, after in zip(places, [*places[1:], num])}
        assert places[0] == 0 and min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
        assert set(taken.prompts) <= set(whole.prompts)

    def test_twice_the_limit_keeps_what_the_limit_took(self):
        """A selection of twice the size contains the smaller one."""
        whole = self.prompt_set(1632)
        for limit in (1, 7, 50, 333):
            assert set(whole.select(limit).prompts) <= set(whole.select(2 * limit).prompts)

    def test_groups_keep_their_shares(self, hub):
        """Of four styles with 800 prompts each, a selection has a quarter of each."""
        for style in ("anime", "concept-art", "paintings", "photo"):
            hub.put("zhwang/HPDv2", f"benchmark/{style}.json", json.dumps([f"{style} {n}" for n in range(800)]))
        taken = load_prompts("hpdv2", limit=100).prompts
        assert {style: sum(prompt.group == style for prompt in taken) for style in {p.group for p in taken}} == {
            "anime": 25,
            "concept-art": 25,
            "paintings": 25,
            "photo": 25,
        }

    def test_the_digest_stays(self, tmp_path):
        """A selection keeps the name and hash of its set."""
        path = write(tmp_path / "my.txt", [{"prompt": text} for text in TEXTS])
        assert load_prompts(path, limit=1).digest == load_prompts(path).digest

    def test_less_than_one(self, tmp_path):
        """A limit of zero is refused."""
        with pytest.raises(ValueError, match="at least 1, got 0"):
            load_prompts(write(tmp_path / "my.txt", [{"prompt": "a"}]), limit=0)


class TestHub:
    def test_parti(self, hub):
        """Prompts and categories of the published file, with quotes as in pandas, row numbers as ids, at the pinned
        commit."""
        hub.put(
            "nateraw/parti-prompts",
            "PartiPrompts.tsv",
            'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tb\n"G I G" painted\tArts\tLetters\tn\n',
        )
        prompt_set = load_prompts("parti")
        assert prompt_set.prompts == (Prompt("00000", "bond", "Abstract"), Prompt("00001", "G I G painted", "Arts"))
        assert (prompt_set.name, prompt_set.revision) == ("parti", COMMIT)
        ((*_, revision, repo_type),) = hub.asked
        assert len(revision) == 40 and repo_type == "dataset"

    def test_hpdv2(self, hub):
        """Four files of one commit; the style is the group and the beginning of the id."""
        styles = ("anime", "concept-art", "paintings", "photo")
        for style in styles:
            hub.put("zhwang/HPDv2", f"benchmark/{style}.json", json.dumps(["a cat", "a dog"]))
        prompt_set = load_prompts("hpdv2")
        assert prompt_set.prompts[3] == Prompt("concept-art-00001", "a dog", "concept-art")
        assert len(prompt_set.prompts) == 8 and prompt_set.revision == COMMIT
        assert [revision for _, _, revision, _ in hub.asked[1:]] == [COMMIT] * 3

    def test_pickapic(self, hub):
        """The captions of the edition without images; a branch is resolved to its commit."""
        table = pa.table({"are_different": [True], "caption": ["a cat"], "ranking_id": [5], "model_0": ["x"]})
        (filename,) = module.BENCHMARKS["pickapic"].files
        hub.put("yuvalkirstain/pickapic_v2_no_images", filename, table)
        prompt_set = load_prompts("pickapic", revision="refs/pr/1")
        assert prompt_set.prompts == (Prompt("00000", "a cat"),) and prompt_set.revision == COMMIT
        assert hub.asked[0][2] == "refs/pr/1" and "test_unique" in filename

    def test_a_benchmark_that_is_out_of_reach(self, hub):
        """The message names the file, the reason and the command that downloads it, at the pinned commit."""
        with pytest.raises(ValueError, match="the repository is gone. On a machine with network access, run") as error:
            load_prompts("parti")
        revision = module.BENCHMARKS["parti"].revision
        assert f"hf download nateraw/parti-prompts PartiPrompts.tsv --revision {revision} --repo-type dataset" in str(
            error.value
        )

    @pytest.fixture
    def dataset(self, tmp_path, monkeypatch):
        """A dataset of the Hub in a folder, and what it was loaded with."""
        from datasets import load_dataset

        loaded = []

        def load(repo_id, **settings):
            loaded.append(settings)
            assert settings["streaming"] and settings["revision"] == COMMIT
            settings = {name: value for name, value in settings.items() if name != "revision"}
            return load_dataset(str(tmp_path / repo_id), cache_dir=tmp_path / "cache", **settings)

        monkeypatch.setattr(module, "load_dataset", load)
        monkeypatch.setattr(
            module, "HfApi", lambda: SimpleNamespace(dataset_info=lambda *_, **__: SimpleNamespace(sha=COMMIT))
        )
        (tmp_path / "user" / "name" / "data").mkdir(parents=True)
        return SimpleNamespace(folder=tmp_path / "user" / "name" / "data", loaded=loaded)

    def test_a_dataset_with_images(self, dataset):
        """Of a mirror of Pick-a-Pic, only the captions are read, not the images."""
        table = pa.table({"caption": ["a cat", "a dog"], "jpg_0": [b"jpg"] * 2, "jpg_1": [b"jpg"] * 2})
        pq.write_table(table, dataset.folder / "test_unique-00000-of-00001.parquet")
        prompt_set = load_prompts("user/name", prompt_column="caption", split="test_unique")
        assert [prompt.text for prompt in prompt_set.prompts] == ["a cat", "a dog"]
        assert (prompt_set.name, prompt_set.revision, prompt_set.split) == ("user/name", COMMIT, "test_unique")
        assert dataset.loaded[-1]["columns"] == ["caption"]

    def test_a_dataset_with_ids_and_groups(self, dataset):
        """Ids and groups come from the dataset, in Parquet and CSV."""
        row = {"id": "x", "prompt": "a cat", "group": "pets"}
        for name in ("train.parquet", "train.csv"):
            path = dataset.folder / name
            write(path, [row])
            assert load_prompts("user/name").prompts == (Prompt("x", "a cat", "pets"),)
            path.unlink()

    @pytest.mark.parametrize("name", ["train.parquet", "train.csv"])
    def test_a_dataset_without_the_column(self, dataset, name):
        """The message names the existing columns."""
        write(dataset.folder / name, [{"caption": "a cat", "n": 1}])
        with pytest.raises(ValueError, match="has no 'prompt'; it has 'caption', 'n'. Name .* `prompt_column`"):
            load_prompts("user/name")

    def test_a_dataset_that_is_out_of_reach(self):
        """Offline, a name that is not a file raises a ValueError that mentions both the file and the Hub."""
        with pytest.raises(
            ValueError, match="user/name is not a file, and https://huggingface.co/datasets/user/name could not"
        ):
            load_prompts("user/name")


class TestSources:
    """Prompts of files and folders that the other commands read as datasets."""

    @pytest.mark.parametrize(
        ("layout", "column", "prefix"),
        [
            ("jsonl_gz", "prompt", ""),
            ("jsonl_zst", "prompt", ""),
            ("arrow", "prompt", ""),
            ("folder_of_splits", "prompt", ""),
            ("image_folder_csv", "prompt", ""),
            ("tar_json", "json.caption", "pairs-"),
            ("tar_plain", "prompt.txt", "pairs-"),
        ],
    )
    def test_prompts_and_ids_are_those_of_the_rows(self, tmp_path, monkeypatch, layout, column, prefix):
        """A slash in an id, which is part of file names, becomes a hyphen."""
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        prompts = load_prompts(getattr(layouts, layout)(tmp_path / "data"), prompt_column=column).prompts
        assert [prompt.text for prompt in prompts] == layouts.PROMPTS
        assert [prompt.id for prompt in prompts] == [prefix + row_id for row_id in layouts.IDS]

    def test_json_of_objects(self, tmp_path):
        """A list of objects has columns, as JSON lines have."""
        (tmp_path / "a.json").write_text(json.dumps([{"id": "x", "caption": "a cat", "group": "g"}]))
        assert load_prompts(tmp_path / "a.json", prompt_column="caption").prompts == (Prompt("x", "a cat", "g"),)

    def test_mistakes(self, tmp_path, monkeypatch):
        """The column and the split are named."""
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        folder = layouts.folder_of_jsonl(tmp_path / "data")
        with pytest.raises(ValueError, match="data has no 'text'; it has 'id', 'prompt'"):
            load_prompts(folder, prompt_column="text")
        with pytest.raises(ValueError, match="data has no split 'test'; it has train"):
            load_prompts(folder, split="test")
