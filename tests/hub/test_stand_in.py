# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""The stand-in of the Hub does what the Hub does, as far as its genuine clients can tell."""

import hashlib
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import httpx2
import numpy as np
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    HfFileSystem,
    ModelCard,
    constants,
    get_token,
    hf_api,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.pointing import KEEPERS, point, settings
from tests.hub.stand_in import StandIn


MODEL = "user/model"


@pytest.fixture
def api(hub: StandIn) -> HfApi:
    api = HfApi()
    api.create_repo(MODEL)
    return api


def commit(api: HfApi, files: dict[str, bytes], message: str = "Files", **kwargs):
    operations = [CommitOperationAdd(*file) for file in files.items()]
    return api.create_commit(MODEL, operations, commit_message=message, **kwargs)


def bytes_of(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def ask(hub: StandIn, path: str, **headers: str) -> httpx2.Response:
    headers = {"authorization": "Bearer hf_user"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.get(hub.url + path, headers=headers)


# Commits


def test_a_commit_is_made_whole(hub: StandIn, api: HfApi):
    made = commit(api, {"config.json": b"{}", "unet/weights.safetensors": bytes_of(3000), "note.txt": b"one"}, "First")
    operations = [CommitOperationAdd("note.txt", b"two"), CommitOperationDelete("config.json")]
    api.create_commit(MODEL, operations, commit_message="Second", commit_description="More of it")
    files = hub.files(MODEL)
    assert set(files) == {".gitattributes", "note.txt", "unet/weights.safetensors"}
    assert files["note.txt"] == b"two" and files["unet/weights.safetensors"] == bytes_of(3000)
    initial, first, second = hub.commits(MODEL)
    assert initial.message == "initial commit" and initial.paths == [".gitattributes"]
    assert first.message == "First" and first.paths == ["config.json", "note.txt", "unet/weights.safetensors"]
    assert (second.message, second.description, second.author) == ("Second", "More of it", "user")
    assert second.paths == ["config.json", "note.txt"]
    assert made.oid == first.sha and made.commit_url == f"{hub.url}/{MODEL}/commit/{first.sha}"


def test_a_commit_that_cannot_be_whole_changes_nothing(hub: StandIn, api: HfApi):
    commit(api, {"a.txt": b"a"})
    before = hub.commits(MODEL)
    operations = [CommitOperationAdd("b.txt", b"b"), CommitOperationDelete("missing.txt")]
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit(MODEL, operations, commit_message="Half")
    hub.fail("POST", "/objects/batch", status=403)
    with pytest.raises(HfHubHTTPError):
        commit(api, {"b.txt": b"b", "weights.bin": b"w"})
    assert hub.commits(MODEL) == before and set(hub.files(MODEL)) == {".gitattributes", "a.txt"}


def test_a_large_file_that_never_arrived_cannot_be_committed(hub: StandIn, api: HfApi):
    addition = CommitOperationAdd("weights.bin", b"w")
    addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
    with pytest.raises(HfHubHTTPError, match="LFS pointer pointed to a file that does not exist"):
        api.create_commit(MODEL, [addition], commit_message="Without its file")
    assert len(hub.commits(MODEL)) == 1


def test_a_commit_on_another_parent_is_refused(hub: StandIn, api: HfApi):
    old = commit(api, {"a.txt": b"a"}).oid
    commit(api, {"a.txt": b"b"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        commit(api, {"a.txt": b"c"}, parent_commit=old)
    assert error.value.response.status_code == 412
    assert hub.files(MODEL)["a.txt"] == b"b"


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: StandIn, api: HfApi):
    old = commit(api, {"a.txt": b"old"}).oid
    api.create_tag(MODEL, tag="v1")
    api.create_branch(MODEL, branch="refs/odd name")
    commit(api, {"a.txt": b"new"})
    commit(api, {"a.txt": b"other"}, revision="refs/odd name")

    def read(revision: str | None) -> bytes:
        return Path(hf_hub_download(MODEL, "a.txt", revision=revision)).read_bytes()

    assert [read(revision) for revision in (None, "main", "v1", old, "refs/odd name")] == [
        *(b"new", b"new", b"old", b"old", b"other")
    ]
    assert api.model_info(MODEL, revision="v1").sha == old
    references = api.list_repo_refs(MODEL)
    assert [branch.name for branch in references.branches] == ["main", "refs/odd name"]
    assert [(tag.name, tag.target_commit) for tag in references.tags] == [("v1", old)]
    assert [c.title for c in api.list_repo_commits(MODEL, revision="v1")] == ["Files", "initial commit"]
    for create in (api.create_branch, api.create_tag):
        key = create.__name__.removeprefix("create_")
        with pytest.raises(HfHubHTTPError, match="Reference already exists"):
            create(MODEL, **{key: {"branch": "main", "tag": "v1"}[key]})
        create(MODEL, **{key: {"branch": "main", "tag": "v1"}[key]}, exist_ok=True)
    api.delete_branch(MODEL, branch="refs/odd name")
    api.delete_tag(MODEL, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(MODEL, revision="v1")


def test_a_folder_is_uploaded_with_patterns(hub: StandIn, api: HfApi, tmp_path: Path):
    commit(api, {"old/a.json": b"{}", "old/b.txt": b"b", "keep.txt": b"k"})
    for name in ("new/c.json", "new/private.log", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    api.upload_folder(repo_id=MODEL, folder_path=tmp_path, ignore_patterns=["*.log"], delete_patterns=["old/*.json"])
    assert set(hub.files(MODEL)) == {".gitattributes", "old/b.txt", "keep.txt", "new/c.json", "d.txt"}
    assert hub.commits(MODEL)[-1].paths == ["d.txt", "new/c.json", "old/a.json"]
    api.delete_file("d.txt", MODEL)
    api.delete_folder("new", MODEL)
    assert set(hub.files(MODEL)) == {".gitattributes", "old/b.txt", "keep.txt"}


def test_files_that_git_ignores_are_left_out(hub: StandIn, api: HfApi):
    commit(api, {".gitignore": b"# ours\n*.log\nsecret/\n", "a.log": b"1", "secret/b.bin": b"2", "c.txt": b"3"})
    assert set(hub.files(MODEL)) == {".gitattributes", ".gitignore", "c.txt"}


def test_a_large_file_is_copied(hub: StandIn, api: HfApi):
    commit(api, {"a.bin": bytes_of(100)})
    api.create_commit(MODEL, [CommitOperationCopy("a.bin", "b.bin")], commit_message="Copy")
    assert hub.files(MODEL)["b.bin"] == bytes_of(100) and hub.uploaded_files == 1


def test_a_pull_request_leaves_its_branch_alone(hub: StandIn, api: HfApi):
    made = commit(api, {"a.txt": b"a"}, create_pr=True)
    assert made.pr_url == f"{hub.url}/{MODEL}/discussions/1"
    assert "a.txt" not in hub.files(MODEL) and hub.files(MODEL, revision="refs/pr/1")["a.txt"] == b"a"


# Large files


def test_files_are_large_by_name_size_or_content(hub: StandIn, api: HfApi):
    hub.large_from = 1000
    commit(api, {"a.safetensors": b"1", "b.txt": b"2" * 1000, "c.txt": b"3" * 999, "d": b"\0", "e.bin": b""})
    files = {file.path: file.lfs for file in api.list_repo_tree(MODEL)}
    assert [name for name, large in files.items() if large] == ["a.safetensors", "b.txt", "d"]
    assert files["b.txt"].sha256 == hashlib.sha256(b"2" * 1000).hexdigest() and files["b.txt"].size == 1000


def test_a_large_file_is_uploaded_once(hub: StandIn, api: HfApi):
    commit(api, {"a.bin": bytes_of(1000)})
    commit(api, {"b.bin": bytes_of(1000), "c.bin": bytes_of(500, seed=1)})
    assert (hub.uploaded_files, hub.uploaded_bytes) == (2, 1500)


def test_an_interrupted_push_goes_on_with_the_rest(hub: StandIn, api: HfApi):
    files = {"a.bin": bytes_of(100_000), "b.bin": bytes_of(200_000, seed=1)}
    oid = hashlib.sha256(files["b.bin"]).hexdigest()
    hub.fail("PUT", oid, cut_after=150_000, times=6)
    with pytest.raises(RuntimeError, match="Error while uploading 'b.bin'"):
        commit(api, files)
    assert len(hub.commits(MODEL)) == 1 and (hub.uploaded_files, hub.uploaded_bytes) == (1, 100_000)
    commit(api, files)
    assert (hub.uploaded_files, hub.uploaded_bytes) == (2, 300_000)
    assert hub.files(MODEL).items() > files.items()


def test_parts_are_put_together(hub: StandIn, api: HfApi, tmp_path: Path):
    hub.parts_from, hub.part_size = 100_000, 40_000
    path = tmp_path / "weights"
    path.write_bytes(bytes_of(100_001))
    hub.fail("PUT", r"/2\?", cut_after=20_000)
    hub.fail("PUT", r"/3\?", status=503)
    api.upload_file(path_or_fileobj=path, path_in_repo="weights.bin", repo_id=MODEL)
    assert hub.files(MODEL)["weights.bin"] == bytes_of(100_001)
    sent = [(request.path.split("?")[0][-1], request.status) for request in hub.requests if request.method == "PUT"]
    assert sent == [("1", 200), ("2", None), ("2", 200), ("3", 503), ("3", 200)]
    assert (hub.uploaded_files, hub.uploaded_bytes) == (1, 100_001)


def test_a_file_that_changed_on_its_way_is_refused(hub: StandIn, api: HfApi):
    address = hub.store_url(f"model/{MODEL}/{hashlib.sha256(b'a').hexdigest()}")
    assert httpx2.put(address, content=b"b").status_code == 400
    assert httpx2.put(address.replace("signature=", "signature=0"), content=b"a").status_code == 403
    assert httpx2.put(address, content=b"a", headers={"authorization": "Bearer hf_user"}).status_code == 400
    assert hub.uploaded_files == 0
    assert httpx2.put(address, content=b"a").status_code == 200
    assert hub.uploaded_files == 1


def test_large_files_can_be_sent_before_the_commit(hub: StandIn, api: HfApi):
    addition = CommitOperationAdd("weights.bin", bytes_of(1000))
    api.preupload_lfs_files(MODEL, [addition])
    assert hub.uploaded_bytes == 1000 and len(hub.commits(MODEL)) == 1
    api.create_commit(MODEL, [addition], commit_message="Now")
    assert hub.files(MODEL)["weights.bin"] == bytes_of(1000) and hub.uploaded_files == 1


# Downloads


def test_etags_are_those_of_git(hub: StandIn, api: HfApi):
    """`echo hello | git hash-object --stdin` prints the first."""
    commit(api, {"hello.txt": b"hello\n", "weights.bin": b"hello\n"})
    sha256 = hashlib.sha256(b"hello\n").hexdigest()
    small, large = (f"/{MODEL}/resolve/main/{name}" for name in ("hello.txt", "weights.bin"))
    assert ask(hub, small).headers["etag"] == '"ce013625030ba8dba906f756967f9e9ca394464a"'
    answer = ask(hub, large)
    assert answer.headers["x-linked-etag"] == f'"{sha256}"'
    pointer = ask(hub, large.replace("resolve", "raw")).content
    assert pointer.splitlines()[1:] == [f"oid sha256:{sha256}".encode(), b"size 6"]
    in_git = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    assert answer.headers["etag"] == f'"{in_git}"'


def test_large_files_come_from_a_store_without_the_token(hub: StandIn, api: HfApi):
    made = commit(api, {"weights.bin": bytes_of(1000)})
    answer = ask(hub, f"/{MODEL}/resolve/main/weights.bin")
    assert answer.status_code == 302 and answer.headers["location"].startswith("http://localhost:")
    assert answer.headers["x-linked-size"] == "1000" and answer.headers["x-repo-commit"] == made.oid
    hub.requests.clear()
    path = hf_hub_download(MODEL, "weights.bin")
    assert Path(path).read_bytes() == bytes_of(1000) and made.oid in path
    assert [(request.method, request.token) for request in hub.requests] == [("HEAD", "hf_user"), ("GET", None)]


@pytest.mark.parametrize("name", ["small.txt", "large.bin"])
@pytest.mark.parametrize(
    ("asked", "first", "last"), [("bytes=10-19", 10, 19), ("bytes=90-", 90, 99), ("bytes=-5", 95, 99)]
)
def test_a_part_of_a_file(hub: StandIn, api: HfApi, name: str, asked: str, first: int, last: int):
    content = bytes(range(1, 101))
    commit(api, {name: content})
    path = f"/{MODEL}/resolve/main/{name}"
    headers = {"authorization": "Bearer hf_user", "range": asked}
    answer = httpx2.get(hub.url + path, headers=headers, follow_redirects=True)
    assert answer.status_code == 206 and answer.content == content[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/100"
    assert httpx2.get(hub.url + path, headers={"range": "bytes=100-"}, follow_redirects=True).status_code == 416


def test_what_is_missing_is_named(hub: StandIn, api: HfApi):
    for name, expected in [
        (("user/other", "a.txt", "main"), RepositoryNotFoundError),
        (("gpt2", "a.txt", "main"), RepositoryNotFoundError),
        ((MODEL, "a.txt", "other"), RevisionNotFoundError),
        ((MODEL, "a.txt", "main"), RemoteEntryNotFoundError),
    ]:
        repo_id, filename, revision = name
        with pytest.raises(expected):
            hf_hub_download(repo_id, filename, revision=revision)
        if expected is not RemoteEntryNotFoundError:
            with pytest.raises(expected):
                api.model_info(repo_id, revision=revision)
    assert not api.repo_exists("user/other") and not api.file_exists(MODEL, "a.txt")
    assert not api.revision_exists(MODEL, "other") and api.revision_exists(MODEL, "main")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info(MODEL)
    with pytest.raises(RevisionNotFoundError):
        commit(api, {"a.txt": b"a"}, revision="other")


def test_lists_of_files(hub: StandIn, api: HfApi):
    hub.page_size = 2
    commit(api, {"a/b/c.txt": b"c", "a/d.bin": b"dd", "e.txt": b"e"}, "Files")
    assert api.list_repo_files(MODEL) == [".gitattributes", "a/b/c.txt", "a/d.bin", "e.txt"]
    assert [entry.path for entry in api.list_repo_tree(MODEL)] == [".gitattributes", "a", "e.txt"]
    assert [entry.path for entry in api.list_repo_tree(MODEL, "a", recursive=True)] == ["a/b", "a/b/c.txt", "a/d.bin"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(MODEL, "missing"))
    infos = api.get_paths_info(MODEL, ["a", "a/d.bin", "missing", ".gitattributes"], expand=True)
    assert [(info.path, info.last_commit.title) for info in infos] == [
        *(("a", "Files"), ("a/d.bin", "Files"), (".gitattributes", "initial commit"))
    ]
    files = HfFileSystem()
    assert files.glob(f"{MODEL}/**/*.txt") == [f"{MODEL}/a/b/c.txt", f"{MODEL}/e.txt"]
    assert files.read_bytes(f"{MODEL}/a/d.bin") == b"dd" and files.info(f"{MODEL}/a/d.bin")["size"] == 2
    folder = Path(snapshot_download(MODEL, allow_patterns=["a/*"]))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == ["a/b/c.txt", "a/d.bin"]


def test_facts_of_a_repository(hub: StandIn, api: HfApi):
    card = "---\nlicense: mit\nbase_model: org/base\npipeline_tag: text-to-image\ntags:\n- lora\n---\n# Model\n"
    commit(api, {"README.md": card.encode(), "model_index.json": b"{}", "w.bin": bytes_of(100)})
    facts = api.model_info(MODEL, files_metadata=True)
    assert (facts.id, facts.author, facts.private, facts.library_name) == (MODEL, "user", False, "diffusers")
    assert facts.tags == ["diffusers", "text-to-image", "lora", "license:mit", "base_model:org/base"]
    assert facts.card_data.license == "mit" and facts.sha == hub.commits(MODEL)[-1].sha
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs is not None) for sibling in facts.siblings}
    assert sizes["w.bin"] == (100, True) and sizes["model_index.json"] == (2, False)
    facts = api.model_info(MODEL, expand=["cardData", "usedStorage"])
    assert facts.used_storage == 100 and facts.card_data.base_model == "org/base" and facts.siblings is None
    api.create_repo("org/data", repo_type="dataset", private=True)
    assert api.dataset_info("org/data").private and [d.id for d in api.list_datasets(author="org")] == ["org/data"]
    assert hub.repositories == [(MODEL, "model", False), ("org/data", "dataset", True)]


# Who may do what


def test_a_private_repository_is_seen_by_its_owner_alone(hub: StandIn):
    hub.add_user("other", "hf_other")
    hub.add_user("member", "hf_member", orgs=("org",))
    HfApi().create_repo("org/hidden", private=True)
    HfApi().upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="org/hidden")
    for token in ("hf_other", False):
        with pytest.raises(RepositoryNotFoundError) as error:
            hf_hub_download("org/hidden", "a.txt", token=token)
        assert error.value.response.status_code == (404 if token else 401)
        assert list(HfApi(token=token).list_models(author="org")) == []
    for token in ("hf_user", "hf_member"):
        assert Path(hf_hub_download("org/hidden", "a.txt", token=token)).read_bytes() == b"a"
    HfApi().update_repo_settings("org/hidden", private=False)
    assert HfApi(token=False).model_info("org/hidden").private is False


def test_tokens_with_fewer_rights_are_refused(hub: StandIn, api: HfApi):
    hub.add_user("user", "hf_reads", orgs=("org",), role="read")
    hub.add_user("user", "hf_own")
    hub.add_user("other", "hf_other", orgs=("org",))
    api.create_repo("org/model")
    for token, repo_id in [("hf_reads", MODEL), ("hf_own", "org/model"), ("hf_other", MODEL)]:
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            HfApi(token=token).upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=repo_id)
        with pytest.raises(HfHubHTTPError, match="You don't have the rights to create a model"):
            HfApi(token=token).create_repo(repo_id + "-2")
        assert HfApi(token=token).create_repo(repo_id, exist_ok=True).repo_id == repo_id
    HfApi(token="hf_other").upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="org/model")
    assert hub.commits("org/model")[-1].author == "other"
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).create_repo("user/nobody")
    with pytest.raises(HfHubHTTPError, match="401") as error:
        HfApi(token="hf_revoked").model_info(MODEL)
    assert type(error.value) is HfHubHTTPError  # and not RepositoryNotFoundError: the token is at fault
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_revoked").whoami()


def test_accounts_and_repositories(hub: StandIn):
    api = HfApi()
    assert api.whoami()["name"] == "user" and [org["name"] for org in api.whoami()["orgs"]] == ["org"]
    address = api.create_repo("name", repo_type="dataset")
    assert address == f"{hub.url}/datasets/user/name" and address.repo_id == "user/name"
    with pytest.raises(HfHubHTTPError, match="You already created this dataset repo"):
        api.create_repo("name", repo_type="dataset")
    assert api.create_repo("name", repo_type="dataset", exist_ok=True) == address
    api.move_repo("user/name", "org/renamed", repo_type="dataset")
    assert [facts.id for facts in hub.repositories] == ["org/renamed"]
    api.delete_repo("org/renamed", repo_type="dataset")
    assert hub.repositories == []
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("org/renamed", repo_type="dataset")


# Cards


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: [", "YAML"),
        ("license: mit\nlicense: mit", "duplicated mapping key"),
        ("license: Apache 2.0", '"license" with value "Apache 2.0" is not valid'),
        ("base_model: /home/me/model", '"base_model" with value "/home/me/model" is not valid'),
        ("base_model: a/b\nbase_model_relation: child", '"base_model_relation" must be one of'),
        ("datasets: [a/b/c]", '"datasets" with value "a/b/c" is not valid'),
        ("tags: [1, 2]", '"tags" must be a string or an array of strings'),
        ("model-index: 1", '"model-index" must be an array'),
        ("model-index: [1]", '"model-index[0].name" is required'),
        ("model-index: [{name: a, results: [{task: {}}]}]", '"model-index[0].results[0].task.type" is required'),
        (
            "model-index: [{name: a, results: [{task: {type: t}, dataset: {name: d, type: d}, metrics: [{type: m}]}]}]",
            '"model-index[0].results[0].metrics[0].value" is required',
        ),
    ],
)
def test_a_card_that_the_hub_refuses(hub: StandIn, api: HfApi, metadata: str, message: str):
    text = f"---\n{metadata}\n---\n# Model\n"
    answer = httpx2.post(f"{hub.url}/api/validate-yaml", json={"content": text, "repoType": "model"})
    assert answer.status_code == 400 and message in answer.json()["errors"][0]["message"]
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        commit(api, {"README.md": text.encode()})
    assert len(hub.commits(MODEL)) == 1


def test_a_card_that_the_hub_takes(hub: StandIn, api: HfApi):
    index = "model-index: [{name: a, results: [{task: {type: t}, dataset: {name: d, type: d}, metrics: [{type: m, value: 1}]}]}]"
    ModelCard(f"---\nlicense: mit\nbase_model: [a/b]\nlanguage: en\n{index}\n---\n# Model\n").validate()
    DatasetCard("---\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n# Data\n").validate(
        repo_type="dataset"
    )
    with pytest.raises(ValueError, match="config_name"):
        DatasetCard("---\nconfigs: [{data_files: a.csv}]\n---\n# Data\n").validate(repo_type="dataset")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit(api, {"README.md": b"# Model\n"})


# Faults


@pytest.mark.parametrize("status", [401, 403, 409, 412, 429, 500, 502, 503, 504])
def test_a_status_that_was_ordered(hub: StandIn, api: HfApi, status: int):
    """429 and 5xx are asked six times where large files go, everything else once; a commit is never sent twice."""
    hub.fail("PUT", "/store/", status=status, times=100)
    with pytest.raises(RuntimeError) as error:
        commit(api, {"weights.bin": b"w"})
    assert error.value.__cause__.response.status_code == status
    tries = sum(request.status == status for request in hub.requests)
    assert (tries, hub.waits) == ((6, [1, 2, 4, 8, 8]) if status in (429, 500, 502, 503, 504) else (1, []))
    hub.faults.clear()
    hub.fail("POST", "/commit/", status=status, times=1)
    with pytest.raises(HfHubHTTPError):
        commit(api, {"weights.bin": b"w"})
    assert len(hub.commits(MODEL)) == 1
    commit(api, {"weights.bin": b"w"})
    assert len(hub.commits(MODEL)) == 2 and hub.uploaded_files == 1


def test_faults_are_used_up_in_their_order(hub: StandIn, api: HfApi):
    hub.fail("POST", "/preupload/", status=429, headers={"Retry-After": "7"})
    hub.fail("POST", "/preupload/", status=429, headers={"ratelimit": '"api";r=0;t=55'})
    hub.fail("POST", "/preupload/", status=503, times=2)
    hub.fail("GET", "/preupload/", status=500)
    commit(api, {"a.txt": b"a"})
    assert hub.waits == [8, 56, 4, 8]
    assert [request.status for request in hub.requests if "/preupload/" in request.path] == [429, 429, 503, 503, 200]


def test_what_the_hub_says_is_in_the_error(hub: StandIn, api: HfApi):
    hub.fail("POST", "/commit/", status=403, message="Private repository storage limit reached")
    with pytest.raises(HfHubHTTPError, match="Private repository storage limit reached"):
        commit(api, {"a.txt": b"a"})


def test_a_repository_that_is_being_created_is_asked_for_again(hub: StandIn):
    hub.fail("POST", "/api/repos/create", status=409, times=3)
    HfApi().create_repo(MODEL)
    assert [request.status for request in hub.requests] == [409, 409, 409, 200]


def test_an_interrupted_download_goes_on_where_it_broke(hub: StandIn, api: HfApi, monkeypatch: pytest.MonkeyPatch):
    """The client keeps whole pieces of ten megabytes alone, which are shorter here."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    commit(api, {"weights.bin": bytes_of(100_000)})
    hub.fail("GET", "/store/", cut_after=60_000)
    hub.requests.clear()
    assert Path(hf_hub_download(MODEL, "weights.bin")).read_bytes() == bytes_of(100_000)
    assert [request.headers.get("range") for request in hub.requests[1:]] == [None, "bytes=60000-"]
    assert hub.waits == [1]


def test_a_download_that_never_goes_on(hub: StandIn, api: HfApi):
    commit(api, {"weights.bin": bytes_of(1000)})
    hub.fail("GET", "/store/", cut_after=0, times=100)
    with pytest.raises(httpx2.RemoteProtocolError):
        hf_hub_download(MODEL, "weights.bin")


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: StandIn, api: HfApi):
    hub.fail("POST", "/commit/", lost=True)
    with pytest.raises(httpx2.TransportError):
        commit(api, {"a.txt": b"a"})
    assert hub.files(MODEL)["a.txt"] == b"a"
    commit(api, {"a.txt": b"a"})
    assert len(hub.commits(MODEL)) == 2


def test_a_commit_that_broke_off_is_not_made(hub: StandIn, api: HfApi):
    hub.fail("POST", "/commit/", cut_after=10)
    with pytest.raises(httpx2.TransportError):
        commit(api, {"a.txt": b"a"})
    assert len(hub.commits(MODEL)) == 1 and hub.requests[-1].status is None


def test_an_endpoint_that_is_missing_is_loud(hub: StandIn, capfd: pytest.CaptureFixture):
    assert ask(hub, "/api/papers/1234.5678").status_code == 404
    assert [request.path for request in hub.unknown] == ["/api/papers/1234.5678"]
    assert "no endpoint for GET /api/papers/1234.5678" in capfd.readouterr().err


# The libraries on top


def test_datasets(hub: StandIn):
    from datasets import Dataset, load_dataset

    card = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train-*.csv}
  - {split: test, path: small/test.csv}
- config_name: large
  data_files: large/*.csv
---
"""
    api = HfApi()
    api.create_repo("org/data", repo_type="dataset")
    csv = {
        "small/train-0.csv": "a\n1\n",
        "small/train-1.csv": "a\n2\n",
        "small/test.csv": "a\n3\n",
        "large/a.csv": "b\n4\n",
    }
    files = [CommitOperationAdd(name, text.encode()) for name, text in {"README.md": card, **csv}.items()]
    api.create_commit("org/data", files, commit_message="Data", repo_type="dataset")
    small = load_dataset("org/data", "small")
    assert {split: data["a"][:] for split, data in small.items()} == {"train": [1, 2], "test": [3]}
    assert load_dataset("org/data", "large", split="train")["b"][:] == [4]
    assert list(load_dataset("org/data", "small", split="train", streaming=True)) == [{"a": 1}, {"a": 2}]

    for value, name, split in [(1, "default", "train"), (2, "default", "test"), (3, "other", "train")]:
        Dataset.from_dict({"x": [value]}).push_to_hub("user/pushed", name, split=split, private=True)
    assert load_dataset("user/pushed", split="test")["x"][:] == [2]
    assert list(load_dataset("user/pushed", "other", split="train", streaming=True)) == [{"x": 3}]
    assert hub.repositories[-1] == ("user/pushed", "dataset", True) and hub.unknown == []


def test_diffusers_and_transformers(hub: StandIn, tmp_path: Path):
    from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict
    from transformers import CLIPTextModel, CLIPTokenizer

    from tests import tiny

    pipeline = tiny.sd_pipeline()
    pipeline.push_to_hub("org/pipeline")
    for loader in (DiffusionPipeline, AutoPipelineForText2Image):
        loaded = loader.from_pretrained("org/pipeline")
        assert type(loaded) is StableDiffusionPipeline
        assert tiny.max_difference(tiny.weights(pipeline.unet), tiny.weights(loaded.unet)) == 0
    encoder = CLIPTextModel.from_pretrained("org/pipeline", subfolder="text_encoder")
    assert tiny.max_difference(tiny.weights(pipeline.text_encoder), tiny.weights(encoder)) == 0
    assert CLIPTokenizer.from_pretrained("org/pipeline", subfolder="tokenizer")("cat") == pipeline.tokenizer("cat")

    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    HfApi().create_repo("user/lora", private=True)
    HfApi().upload_folder(repo_id="user/lora", folder_path=tmp_path)
    loaded.load_lora_weights("user/lora")
    assert loaded.get_list_adapters() == {"unet": ["default_0"]}
    assert hub.unknown == []


# The fixture


def test_another_process_is_pointed_by_its_environment(hub: StandIn, api: HfApi, tmp_path: Path):
    commit(api, {"weights.bin": bytes_of(1000)})
    program = (
        f"from huggingface_hub import *; print(whoami()['name']); print(hf_hub_download({MODEL!r}, 'weights.bin'))"
    )
    environment = hub.environment("hf_user", home=tmp_path)
    assert environment["PATH"] and "HF_TOKEN" not in hub.environment(home=tmp_path)
    name, path = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert name == "user" and Path(path).is_relative_to(tmp_path) and Path(path).read_bytes() == bytes_of(1000)


def test_no_client_keeps_the_genuine_hub(hub: StandIn):
    """Whatever a module copied of the settings is that of the stand-in; a new version of a client may keep more."""
    libraries = ("huggingface_hub", "datasets", "diffusers", "transformers", "evaluate", "peft", "trl")
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] in libraries]:
        for name, value in vars(module).items():
            where = f"{module.__name__}.{name}"
            if name.endswith("OFFLINE"):
                assert value in (False, None), where
            if name.endswith(("ENDPOINT", "URL_TEMPLATE")) and "DEFAULT" not in name and isinstance(value, str):
                assert "://huggingface.co" not in value, where
            if isinstance(value, HfApi):
                assert value.endpoint == hub.url, where


def test_all_is_taken_back(tmp_path: Path):
    with StandIn() as stand_in:
        modules = [vars(import_module(name)) for name in KEEPERS]
        names = settings(stand_in, tmp_path)

        def state() -> list[object]:
            kept = [module[name] for module in modules for name in names if name in module]
            return [*kept, hf_api.api.endpoint, get_token(), dict(os.environ)]

        before = state()
        with pytest.MonkeyPatch.context() as patch:
            point(stand_in, tmp_path, "hf_user", patch)
            assert hf_api.api.endpoint == constants.ENDPOINT == stand_in.url and get_token() == "hf_user"
            assert not constants.is_offline_mode()
            assert all(one != other for one, other in zip(state()[-3:], before[-3:]))
        assert state() == before
