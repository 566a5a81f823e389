# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Faults on the way to the Hub: what is tried again, what is an error and when, what it says, and what is then on the Hub."""

import json
import logging
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, _commit_api, constants
from safetensors.torch import load
from transformers import TrainerCallback

from tests import tiny
from tests.hub.pointing import waiting
from tests.hub.test_trainer_pushes import SAVES, iapo
from trl_diffusion.hub import create_repository, push_files, pushing


TOKEN = "hf_user"


@pytest.fixture(autouse=True)
def no_sleep(hub, monkeypatch):
    monkeypatch.setattr("trl_diffusion.hub.time", waiting(hub.waits))


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "trl_diffusion")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("trl_diffusion")]


@pytest.fixture
def files(tmp_path) -> dict[str, Path | bytes]:
    """A small file, and two large ones."""
    found = {"README.md": b"---\nlicense: mit\n---\nnew"}
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(name.encode() * 100_000)
        found[name] = tmp_path / name
    return found


@pytest.fixture
def repository(hub) -> str:
    name = create_repository("made")
    push_files({"README.md": b"---\nlicense: mit\n---\nold"}, name, commit_message="old")
    return name


def push(files, repository: str, token: str | None = None, **settings) -> str:
    with pushing("It is saved in out.", token):
        return push_files(files, repository, commit_message="new", token=token, **settings)


def state(hub, repository: str) -> str:
    """Whether a repository is as before the push, or as after it, and nothing between."""
    found = hub.files(repository)
    is_new = [b"new" in found["README.md"], "a.safetensors" in found, "b.safetensors" in found]
    assert all(is_new) or not any(is_new)
    return "new" if all(is_new) else "old"


# ----- names and rights, before anything is pushed -----


@pytest.mark.parametrize(
    "name",
    [
        "a/b/c",
        "user/na me",
        "",
        "/",
        "user/",
        "/name",
        "-name",
        "name.",
        "a--b",
        "a..b",
        "x.git",
        "ü/model",
        "a" * 97,
        "https://hf.co/a",
    ],
)
def test_a_name_that_no_repository_can_have(hub, tmp_path, name):
    """It is refused when the trainer is made, before anything is loaded, and the Hub is not asked."""
    with pytest.raises(ValueError, match="is no name on the Hub"):
        create_repository(name)
    if name:
        with pytest.raises(ValueError, match="`hub_model_id` .* is no name on the Hub") as caught:
            iapo(tmp_path / "out", "no/such-model", push_to_hub=True, hub_model_id=name)
        assert "\n" not in str(caught.value)
    assert hub.requests == []


def test_a_folder_whose_name_no_repository_can_have(hub, tmp_path):
    """Without `hub_model_id` the folder's name is the repository's, and must be one."""
    with pytest.raises(
        ValueError, match="`hub_model_id` is missing, and the folder's name 'my run [(]2[)]' is no name"
    ):
        iapo(tmp_path / "my run (2)", "no/such-model", push_to_hub=True)


def test_who_may_not_push_is_told_before_anything_is_loaded(hub, tmp_path, monkeypatch):
    """A wrong token, one that may only read, another's repository, no token, offline mode: one line, with the way out, without the token."""
    hub.add_user("user", "hf_reading_only", role="read")
    hub.add_user("other", "hf_other_token")
    create_repository("user/there")

    def refusal(**settings) -> str:
        with pytest.raises(ValueError) as caught:
            iapo(tmp_path / "out", "no/such-model", push_to_hub=True, **settings)
        said = str(caught.value)
        assert "\n" not in said and "hf_" not in said.replace("hf auth login", "")
        return said

    assert "401" in (said := refusal(hub_token="hf_wrong_token")) and "settings/tokens" in said
    assert "403" in (said := refusal(hub_token="hf_reading_only", hub_model_id="user/new")) and "user/new" in said
    assert "403" in refusal(hub_token="hf_reading_only", hub_model_id="user/there")  # which can be read
    assert "403" in refusal(hub_model_id="other/name")
    assert "403" in refusal(hub_token="hf_other_token", hub_model_id="user/there", hub_revision="draft")
    assert "hf" not in refusal(hub_token="hf_with_a_line_break\n").lower().replace("hf auth", "").replace(
        "hf_token", ""
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal()
    monkeypatch.setattr("trl_diffusion.hub.get_token", lambda: None)
    assert "hf auth login" in refusal(hub_token=None)
    assert [repository.id for repository in hub.repositories] == ["user/there"]
    assert hub.waits == []


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"cut_after": 0}])
def test_a_hub_that_is_away_does_not_stop_a_training(hub, tmp_path, warnings, fault):
    """Where the repository cannot be created at the start, that is a warning, and the first push creates it."""
    hub.fail("POST", "/api/repos/create", times=5, **fault)
    trainer = iapo(tmp_path / "out", **SAVES, hub_strategy="every_save")
    assert hub.repositories == [] and any("cannot be created at present" in said for said in warnings())
    assert hub.waits == [1, 2, 4, 8]
    trainer.train()
    assert trainer.hub_model_id == "user/out"
    assert [commit.message for commit in hub.commits("user/out")][1] == "Training in progress, step 1"


# ----- statuses -----


@pytest.mark.parametrize("place", ["/validate-yaml", "/commit/"])
@pytest.mark.parametrize("status", [409, 412, 429, 500, 502, 503, 504])
def test_what_may_succeed_later_is_tried_again(hub, repository, files, warnings, status, place):
    """A Hub that is busy, and a commit that came in between, cost a second try, which is said."""
    hub.fail("POST", place, status=status)
    address = push(files, repository)
    assert state(hub, repository) == "new" and hub.waits == [1]
    assert address == f"{hub.url}/{repository}/commit/{hub.commits(repository)[-1].sha}"
    assert any(str(status) in said and "tried again in 1 seconds" in said for said in warnings())
    assert [commit.message for commit in hub.commits(repository)] == ["initial commit", "old", "new"]
    assert hub.uploaded_files == 2


@pytest.mark.parametrize("status", [401, 403])
def test_what_will_not_succeed_is_not_tried_again(hub, repository, files, status):
    """A token that may not write is an error at once; the commit is not made."""
    hub.fail("POST", "/commit/", status=status, times=1000)
    with pytest.raises(ValueError, match=rf"failed: {status} .* It is saved in out\. .*settings/tokens") as caught:
        push(files, repository)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert state(hub, repository) == "old" and hub.waits == []


@pytest.mark.parametrize("status", [409, 412, 429, 500, 503])
def test_the_number_of_tries_has_an_end(hub, repository, files, status):
    """Five tries, with waits of 1, 2, 4 and 8 seconds; then the error has the status, and the repository is as it was."""
    hub.fail("POST", "/commit/", status=status, times=1000)
    with pytest.raises(ValueError, match=rf"failed: {status} .*Push again"):
        push(files, repository)
    assert sum("/commit/" in request.path for request in hub.requests if request.status == status) == 5
    assert hub.waits == [1, 2, 4, 8] and state(hub, repository) == "old"
    hub.faults.clear()
    push(files, repository)
    assert state(hub, repository) == "new" and hub.uploaded_files == 2


def test_the_hub_says_how_long_to_wait(hub, repository, files):
    """Retry-After, in seconds or as a date, and RateLimit are heeded, up to five minutes; longer is an error that has the number."""
    for headers in (
        {"Retry-After": "7"},
        {"RateLimit": '"api";r=0;t=55'},
        {"Retry-After": "Mon, 01 Jan 2001 00:00:00 GMT"},
        {"Retry-After": "soon"},
    ):
        hub.fail("POST", "/commit/", status=429, headers=headers)
    push(files, repository)
    assert hub.waits == [7, 56, 0, 8]
    hub.waits.clear()
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "4000"})
    with pytest.raises(ValueError, match="429 .*4000 seconds"):
        push({"x": b"1"}, repository)
    assert hub.waits == []


@pytest.mark.parametrize("missing", ["repository", "branch"])
def test_what_is_not_there(hub, repository, files, missing):
    """A repository or a branch that is gone is an error at once, which names what to check."""
    where = {"repository": "user/gone"} if missing == "repository" else {"repository": repository, "revision": "gone"}
    with pytest.raises(ValueError, match="404 .*Check the names of the repository and of the branch"):
        push(files, **where)
    assert state(hub, repository) == "old"


def test_a_page_of_a_proxy_is_no_answer(hub, repository, files, monkeypatch):
    """An answer that is no JSON is tried again, and in the end said without its text."""
    tries = []

    def unreadable(*args, **kwargs):
        tries.append(1)
        json.loads("<html>")

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "_validate_yaml", unreadable)
        with pytest.raises(ValueError, match="the Hub's answer cannot be read. It is saved in out."):
            push(files, repository)
    assert len(tries) == 5 and state(hub, repository) == "old"


# ----- connections that break -----


@pytest.mark.parametrize("place", ["/store/.*", "/commit/", "/preupload/", "/info/lfs/objects/batch"])
def test_an_interrupted_push_leaves_the_repository_as_it_was(hub, repository, files, place):
    """A connection that breaks for good is an error; pushed again, the files that arrived before are not uploaded again."""
    if place == "/store/.*":  # of the second file
        push({"a.safetensors": files["a.safetensors"]}, create_repository("other"))
        place = (
            "/store/model/user/made/" + hub.contents["model", "user/other"].find("main").files["a.safetensors"].sha256
        )
        hub.uploaded_files = 0
    hub.fail("POST", place, cut_after=10, times=1000)
    hub.fail("PUT", place, cut_after=200_000, times=1000)
    with pytest.raises(ValueError, match="the Hub cannot be reached .* It is saved in out.") as caught:
        push(files, repository)
    assert "\n" not in str(caught.value) and state(hub, repository) == "old"
    arrived = hub.uploaded_files
    assert arrived == {"/commit/": 2}.get(place, 1 if "/store/" in place else 0)
    hub.faults.clear()
    push(files, repository)
    assert state(hub, repository) == "new" and hub.uploaded_files == 2
    assert [commit.message for commit in hub.commits(repository)] == ["initial commit", "old", "new"]


def test_a_commit_whose_answer_is_lost_is_made_once(hub, repository, files, monkeypatch):
    """The second try finds all files there, those to delete gone, and makes no second commit."""
    push({"stale.txt": b"stale", "folder/stale.txt": b"stale"}, repository)
    send, lost = _commit_api._send_commit, []

    def losing(*args, **kwargs):
        commit = send(*args, **kwargs)
        if not lost:
            lost.append(commit)
            raise httpx2.ReadError("the connection was reset")
        return commit

    monkeypatch.setattr(_commit_api, "_send_commit", losing)
    address = push(files, repository, delete=["stale.txt", "folder/"])
    assert address == lost[0].commit_url
    assert [commit.message for commit in hub.commits(repository)] == ["initial commit", "old", "new", "new"]
    assert hub.files(repository).keys() == {".gitattributes", *files}


def test_the_token_is_not_shown(hub, repository, files):
    """Not in the message, and not in the traceback's cause, although the client's own error of a token with a line break holds it."""
    token = "hf_secret_token_12345\n"
    with pytest.raises(ValueError, match="push to the Hub failed") as caught:
        push(files, repository, token=token)
    assert token.strip() not in str(caught.value) and caught.value.__cause__ is None
    assert state(hub, repository) == "old"


# ----- checkpoints -----


def messages(hub, repository: str = "user/out") -> list[str]:
    return [commit.message for commit in hub.commits(repository)][1:]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints", "end"])
def test_strategies(hub, tmp_path, strategy):
    """`hub_strategy` decides what each checkpoint pushes, in one commit that says which step it is."""
    trainer = iapo(tmp_path / "out", **SAVES, hub_strategy=strategy)
    trainer.train()
    steps = [] if strategy == "end" else ["Training in progress, step 1", "Training in progress, step 2"]
    assert messages(hub) == steps
    trainer.push_to_hub(tags=["done"])  # without a change there is no commit
    assert messages(hub) == [*steps, "End of training"]
    folders = {name.split("/")[0] for name in hub.files("user/out") if name.endswith("trainer_state.json")}
    kept = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert folders == kept.get(strategy, set())
    found = hub.files("user/out")
    for folder in folders:
        ours, theirs = (load(found[f"{where}pytorch_lora_weights.safetensors"]) for where in ("", f"{folder}/"))
        assert (tiny.max_difference(ours, theirs) == 0) == (folder != "checkpoint-1")


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_a_checkpoint_that_does_not_arrive_is_said_and_repeated(hub, tmp_path, warnings, strategy):
    """The training goes on; the failure is said when it happens and at the end, and the final push brings what is missing."""
    hub.fail("POST", "/commit/", status=403, times=2)
    trainer = iapo(tmp_path / "out", **SAVES, hub_strategy=strategy)
    trainer.train()
    assert trainer.state.global_step == 2 and messages(hub) == []
    said = warnings()
    assert sum("in the background failed: 403" in line for line in said) == 2
    assert any("2 pushes of checkpoints are missing" in line and "checkpoint-1: 403" in line for line in said)
    trainer.push_to_hub()
    assert messages(hub) == ["End of training"]
    steps = {
        name: json.loads(content)["global_step"]
        for name, content in hub.files("user/out").items()
        if name.endswith("trainer_state.json")
    }
    expected = {"checkpoint": {"last-checkpoint": 2}, "all_checkpoints": {"checkpoint-1": 1, "checkpoint-2": 2}}
    assert steps == {f"{name}/trainer_state.json": step for name, step in expected.get(strategy, {}).items()}


class Held(TrainerCallback):
    """Holds pushes until the training is at its end."""

    def __init__(self, monkeypatch):
        self.end = threading.Event()
        monkeypatch.setattr("trl_diffusion.trainer.publishing.push_files", self.push)

    def push(self, *args, **kwargs):
        assert self.end.wait(60)
        return push_files(*args, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self.end.set()


@pytest.mark.parametrize("always", [False, True])
def test_a_push_that_is_still_running(hub, tmp_path, warnings, monkeypatch, always):
    """The next checkpoints are left out, counted, said, and brought by the final push; with `hub_always_push` they wait for their turn.
    What is pushed is the checkpoint as it was, although it was deleted meanwhile."""
    held = Held(monkeypatch)
    settings = {**SAVES, "hub_strategy": "all_checkpoints", "save_total_limit": 1, "max_steps": 3}
    trainer = iapo(tmp_path / "out", **settings, hub_always_push=always)
    trainer.add_callback(held)
    trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    steps = (1, 2, 3) if always else (1,)
    assert messages(hub) == [f"Training in progress, step {step}" for step in steps]
    said = [line for line in warnings() if "2 pushes of checkpoints are missing" in line]
    assert len(said) == (0 if always else 1)
    trainer.push_to_hub()
    found = hub.files("user/out")
    states = {name: content for name, content in found.items() if name.endswith("trainer_state.json")}
    assert [json.loads(states[f"checkpoint-{step}/trainer_state.json"])["global_step"] for step in {*steps, 3}] == [
        *{*steps, 3}
    ]
    weights = {found[f"checkpoint-{step}/pytorch_lora_weights.safetensors"] for step in {*steps, 3}}
    assert len(weights) == len({*steps, 3})
    assert list((tmp_path / "out").glob(".push*")) == []


# ----- parameters -----


@pytest.mark.parametrize("given, expected", [(None, "user/out"), ("mine", "user/mine"), ("org/theirs", "org/theirs")])
def test_the_name_of_the_repository(hub, tmp_path, given, expected):
    """Without `hub_model_id` it is the folder's, of the token's user; with an organisation it is that one's."""
    trainer = iapo(tmp_path / "out", push_to_hub=True, hub_model_id=given)
    assert trainer.hub_model_id == expected  # created already
    assert [repository.id for repository in hub.repositories] == [expected]
    trainer.push_to_hub()
    assert f"comfyui/{expected.split('/')[1]}.safetensors" in hub.files(expected)


def test_private_and_branch(hub, tmp_path):
    """`hub_private_repo` and `hub_revision` are kept, and a branch that is not there is made at the start."""
    trainer = iapo(tmp_path / "out", **SAVES, hub_private_repo=True, hub_revision="draft", hub_strategy="every_save")
    assert [repository.private for repository in hub.repositories] == [True]
    trainer.train()
    trainer.push_to_hub(tags=["done"])
    assert hub.files("user/out").keys() == {".gitattributes"}
    branch = [commit.message for commit in hub.commits("user/out", revision="draft")][1:]
    assert branch == ["Training in progress, step 1", "Training in progress, step 2", "End of training"]


def test_arguments_of_a_push(hub, tmp_path):
    """`push_to_hub` takes what transformers' does: token, private, revision, message, and what goes into the card."""
    hub.add_user("other", "hf_other_token")
    trainer = iapo(tmp_path / "out")
    commit = trainer.push_to_hub(
        "First",
        token="hf_other_token",
        private=True,
        revision="draft",
        model_name="A name",
        dataset_name="user/data",
        tags=["shapes"],
    )
    (repository,) = hub.repositories
    assert (repository.id, repository.private) == ("other/out", True)
    found = hub.commits("other/out", revision="draft")[-1]
    assert (commit, found.message, found.author) == (commit.commit_url, "First", "other") and commit.oid == found.sha
    card = hub.files("other/out", revision="draft")["README.md"].decode()
    assert "# A name" in card and "user/data" in card and "shapes" in card
    later = trainer.push_to_hub("Second", blocking=False, token="hf_other_token", revision="draft")
    assert later.result() == f"{hub.url}/other/out/commit/{hub.commits('other/out', revision='draft')[-1].sha}"


def test_saving_pushes_as_that_of_transformers(hub, tmp_path):
    """`save_model` of a trainer that pushes does push, with its own message."""
    trainer = iapo(tmp_path / "out", push_to_hub=True)
    trainer.save_model()
    assert messages(hub) == ["Model save"]


def test_a_push_in_the_background_that_fails_is_said(hub, tmp_path, warnings):
    """With `blocking=False` the future has the error, and a warning says it to whoever does not ask it."""
    trainer = iapo(tmp_path / "out", push_to_hub=True)
    hub.fail("POST", "/commit/", status=403)
    later = trainer.push_to_hub(blocking=False)
    assert "403" in str(later.exception())
    assert any("in the background failed: 403" in line for line in warnings())
    hub.contents.clear()  # somebody has deleted the repository
    trainer.push_to_hub()
    assert messages(hub) == ["End of training"]


def test_what_a_failed_push_of_a_trainer_says(hub, tmp_path):
    """Where the model is, and a command that pushes its files, and not whatever lies beside them."""
    trainer = iapo(tmp_path / "my out", is_lora=False, push_to_hub=True, hub_model_id="mine")
    (tmp_path / "my out" / "notes.txt").parent.mkdir(exist_ok=True)
    (tmp_path / "my out" / "notes.txt").write_text("private")
    hub.fail("POST", "/commit/", status=403)
    with pytest.raises(ValueError, match="403") as caught:
        trainer.push_to_hub()
    said = str(caught.value)
    assert "\n" not in said and f"is saved in {tmp_path / 'my out'}" in said
    (command,) = [shlex.split(code) for code in said.split("`") if code.startswith("hf upload")]
    hf = Path(sys.executable).parent / command[0]
    environment = hub.environment("hf_user", tmp_path / "home")
    subprocess.run([hf, *command[1:]], env=environment, check=True, capture_output=True)
    by_hand = hub.files("user/mine")
    trainer.push_to_hub()
    assert hub.files("user/mine").keys() == by_hand.keys() and "unet/config.json" in by_hand


def test_a_lora_that_comfyui_has_no_names_for_is_pushed_without(hub, tmp_path, warnings):
    """A DoRA has no file for ComfyUI: that is said, and the rest is pushed."""
    trainer = iapo(tmp_path / "pytorch_lora_weights", peft=tiny.LoraConfig(r=4, use_dora=True))
    trainer.push_to_hub()
    assert {"pytorch_lora_weights.safetensors"} == {n for n in hub.files("user/pytorch_lora_weights") if "saf" in n}
    assert any("No file for ComfyUI is pushed" in line for line in warnings())


# ----- several processes -----

SCRIPT = """
import sys
from pathlib import Path
from tests.hub.test_trainer_pushes import SAVES, iapo

folder = Path(sys.argv[1])

def attempt(what, call):
    try:
        print(what, "passed", call() is not None, flush=True)
    except ValueError as error:
        print(what, "failed", "403" in str(error) or "401" in str(error), flush=True)

attempt("wrong", lambda: iapo(folder, "no/such-model", push_to_hub=True, hub_token="hf_wrong_token"))
trainer = iapo(folder, **SAVES, hub_strategy="checkpoint", per_device_train_batch_size=1)
trainer.train()
attempt("refused", lambda: trainer.push_to_hub(token="hf_reading_only"))
attempt("pushed", lambda: trainer.push_to_hub(tags=["done"]))
trainer.end()
"""


def test_one_of_two_processes_pushes(hub, tmp_path):
    """The main process alone asks the Hub, the other waits; where the main one fails, both raise and none hangs."""
    hub.add_user("user", "hf_reading_only", role="read")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = hub.environment("hf_user", tmp_path / "home") | world | {"PYTHONPATH": str(Path.cwd())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "out")],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    for rank, lines in enumerate(printed):
        for line in ("wrong failed True", "refused failed True", f"pushed passed {rank == 0}"):
            assert line in lines, lines
    assert messages(hub) == ["Training in progress, step 1", "Training in progress, step 2", "End of training"]
    names = {name for name in hub.files("user/out") if "rng_state" in name}
    assert names == {"last-checkpoint/rng_state_0.pth", "last-checkpoint/rng_state_1.pth"}
    # A later run with one process leaves no state of the other there
    trainer = iapo(tmp_path / "later" / "out", **SAVES, hub_strategy="checkpoint")
    trainer.train()
    assert {name for name in hub.files("user/out") if "rng_state" in name} == {"last-checkpoint/rng_state.pth"}
