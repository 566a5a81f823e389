# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""`trl-diffusion model-card`: a card is made again from what lies beside it, in a folder and on the Hub, and no work is lost."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard

from tests import tiny
from tests.evaluation.loras import save_lora
from tests.evaluation.test_card import BASE, iapo, model_facts, record, summary_of
from tests.hub.conftest import hub  # noqa: F401
from trl_diffusion import InstanceDPOConfig, InstanceDPOTrainer
from trl_diffusion.cards.facts import Sample, read_evaluation_facts, read_model_facts, write_facts
from trl_diffusion.cards.model import model_card
from trl_diffusion.cli.main import main
from trl_diffusion.evaluation.models import resolve_model
from trl_diffusion.evaluation.prompts import load_prompts
from trl_diffusion.evaluation.protocols import load_protocol
from trl_diffusion.evaluation.run import evaluate_models
from trl_diffusion.metrics.scorer import Scorer, open_image
from trl_diffusion.revisions import digest_of_file


TOKEN = "hf_user"


def write_model(folder: Path, **changed) -> Path:
    """What a trainer leaves in a folder, and what its user does."""
    facts = model_facts(w_neg=0.0, beta=2000)
    facts.model_id, facts.teaser = folder.name, "images/teaser.png"
    facts.samples = [Sample("a cat", "images/0.png", "images/0-base.png")]
    for name, value in changed.items():
        setattr(facts, name, value)
    (folder / "images").mkdir(parents=True)
    for name in ("teaser", "0", "0-base", "of-the-user"):
        tiny.image(0).save(folder / "images" / f"{name}.png")
    (folder / "notes.txt").write_text("mine")
    write_facts(facts, folder / "training.json")
    (folder / "README.md").write_text(str(model_card(facts)))
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "out")


def write_evaluation(folder: Path, models: dict[str, dict] | None = None) -> str:
    models = models or {
        "base": BASE,
        "dpo": record("dpo", iapo(1)),
        "mine": record("out", iapo(), path="out"),
    }
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary_of(models)))
    return str(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- In a folder ----


def test_an_evaluation_is_put_into_a_card(model, tmp_path, capsys):
    """README.md has it and evaluation.json keeps it; nothing else changes; again, without naming it, it stays as it is."""
    before = contents(model)
    assert main(["model-card", str(model), "--evaluation", write_evaluation(tmp_path / "evaluation")]) == 0
    assert capsys.readouterr().out == f"Wrote README.md and evaluation.json in {model}.\n"
    after = contents(model)
    assert {name for name in after if after[name] != before.get(name)} == {"README.md", "evaluation.json"}
    facts = read_evaluation_facts(model / "evaluation.json")
    assert (facts.model, facts.arm, facts.arm_differences) == ("mine", "dpo", {})
    assert "dpo was trained with `w_neg=1`" in after["README.md"].decode()
    assert str(tmp_path) not in "".join(
        each.decode() for name, each in after.items() if "." in name[-6:] and "png" not in name
    )
    assert main(["model-card", "--model", str(model)]) == 0
    assert contents(model) == after


def test_a_card_that_was_edited_is_kept(model, tmp_path, capsys):
    """Until it is said that it may go: a sentence of the user's, a card of another origin, one without facts."""
    flags = ["model-card", str(model), "--evaluation", write_evaluation(tmp_path / "evaluation")]
    for text in ((model / "README.md").read_text() + "\nMy own words.\n", "# Mine", ""):
        (model / "README.md").write_text(text)
        before = contents(model)
        assert main(flags) == 2
        assert "somebody has edited it" in capsys.readouterr().err and contents(model) == before
    assert main([*flags, "--overwrite"]) == 0
    assert main(flags) == 0
    (model / "README.md").unlink()
    assert main(flags) == 0 and (model / "README.md").exists()


def test_a_card_of_an_earlier_evaluation_or_none_is_no_edited_one(model, tmp_path):
    """A trainer that writes its card again leaves the evaluation.json of before beside it."""
    flags = ["model-card", str(model), "--evaluation", write_evaluation(tmp_path / "evaluation")]
    assert main(flags) == 0
    (model / "README.md").write_text(str(model_card(read_model_facts(model / "training.json"))))
    assert main(flags) == 0


@pytest.mark.parametrize(
    "models, flags, message",
    [
        ({"a": BASE, "b": record("b")}, [], "names no .*out: pass `--model_name_in_evaluation`, one of a, b."),
        (
            {"a": record("x", path="out"), "b": record("y", path="out", negative_lora="user/n")}, [],
            "has a and b, which are both of .*out: pass `--model_name_in_evaluation`, one of a, b.",
        ),
        ({"a": BASE}, ["--model_name_in_evaluation", "z"], "has no model 'z'; it has a"),
        ({"a": record("a", path="out")}, ["--arm", "z"], "has no model 'z'; it has a"),
    ],
)  # fmt: skip
def test_which_model_it_is(model, tmp_path, capsys, models, flags, message):
    """A name that cannot be told, or that is not there, is asked for, with those that there are."""
    before, evaluation = contents(model), write_evaluation(tmp_path / "evaluation", models)
    assert main(["model-card", str(model), "--evaluation", evaluation, *flags]) == 2
    assert re.search(message, capsys.readouterr().err) and contents(model) == before


def test_a_model_that_is_named(model, tmp_path):
    """By the flags; by the Hub id of its training."""
    models = {"a": record("x", path="out"), "b": record("y", path="out", negative_lora="user/n")}
    evaluation = write_evaluation(tmp_path / "evaluation", models)
    flags = ["--evaluation", evaluation, "--model_name_in_evaluation", "b", "--arm", "a"]
    assert main(["model-card", str(model), *flags]) == 0
    facts = read_evaluation_facts(model / "evaluation.json")
    assert (facts.model, facts.arm, facts.needed_arm, facts.arm_differences) == ("b", "a", "w_neg=1", None)
    other = write_model(tmp_path / "other", model_id="user/x")
    assert main(["model-card", str(other), "--evaluation", write_evaluation(tmp_path / "e", {"a": record("x")})]) == 0
    assert read_evaluation_facts(other / "evaluation.json").model == "a"


def test_other_weights_than_those_that_were_evaluated(model, tmp_path, capsys, caplog):
    """An evaluation of the weights of before a training is refused, unless the user names it; the same weights pass."""
    save_lora(tiny.sd_pipeline(), model)
    digest = digest_of_file(model / "pytorch_lora_weights.safetensors")
    flags = ["model-card", str(model), "--evaluation"]
    evaluation = write_evaluation(tmp_path / "now", {"mine": record("m", path="out", revision=digest)})
    assert main([*flags, evaluation]) == 0
    evaluation = write_evaluation(tmp_path / "before", {"mine": record("m", path="out", revision="sha256:other")})
    before = contents(model)
    assert main([*flags, evaluation]) == 2
    assert "was sampled with other weights than" in capsys.readouterr().err and contents(model) == before
    assert main([*flags, evaluation, "--model_name_in_evaluation", "mine"]) == 0
    assert "was sampled with other weights than" in caplog.text


def test_a_pipeline_with_other_weights(model, tmp_path, capsys):
    """What was fine-tuned whole is compared by all of its files."""
    tiny.sd_pipeline().save_pretrained(model)
    revision = resolve_model("m", str(model)).revision
    flags = ["model-card", str(model), "--evaluation"]
    assert (
        main([*flags, write_evaluation(tmp_path / "now", {"mine": record("m", path="out", revision=revision)})]) == 0
    )
    tiny.sd_pipeline(seed=1).save_pretrained(model)
    assert main([*flags, str(tmp_path / "now")]) == 2
    assert "was sampled with other weights than" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["model-card"], "Name a model"),
        (["model-card", "out", "--arm", "x"], "are names in an evaluation"),
        (["model-card", "out", "--model_name_in_evaluation", "x"], "are names in an evaluation"),
        (["model-card", "out", "--private"], "pass `--push_to_hub`"),
        (["model-card", "out", "--evaluation", "images"], "holds no summary.json"),
        (["model-card", "images"], "has no training.json"),
        (
            ["model-card", "no/such/folder"],
            "'no/such/folder' is no folder, and the Hub gives no training.json of that name",
        ),
        (["model-card", "user/name"], "'user/name' is no folder, and the Hub gives no training.json of that name"),
    ],
)
def test_mistakes(model, monkeypatch, capsys, flags, message):
    """Each is one line, with the way out."""
    monkeypatch.chdir(model.parent)
    (model.parent / "images").mkdir()
    assert main(flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("file", ["training.json", "evaluation.json", "summary.json"])
@pytest.mark.parametrize("content", ["[]", "{}", "no", '{"name": 1}', "null"])
def test_files_of_something_else(model, tmp_path, capsys, file, content):
    """They are named, and nothing is written."""
    evaluation = write_evaluation(tmp_path / "evaluation")
    (Path(evaluation) if file == "summary.json" else model).joinpath(file).write_text(content)
    before = contents(model)
    assert main(["model-card", str(model), "--evaluation", evaluation]) == 2
    error = capsys.readouterr().err
    assert file in error and "Traceback" not in error and contents(model) == before


@pytest.mark.parametrize(
    "name", ["notes.txt", "../secret.png", "images/../notes.txt", "/etc/passwd", "images", "images\\..\\x"]
)
def test_only_pictures_are_taken_for_pictures(model, capsys, name):
    """Facts that somebody else wrote cannot name another file of the machine."""
    facts = read_model_facts(model / "training.json")
    facts.teaser = name
    write_facts(facts, model / "training.json")
    assert main(["model-card", str(model), "--overwrite"]) == 2
    assert "which is not in images/" in capsys.readouterr().err


def test_pictures_that_are_not_there(model, capsys):
    """A missing one is named, and a link out of the folder is none."""
    (model / "images" / "teaser.png").unlink()
    assert main(["model-card", str(model)]) == 2
    assert "names the picture images/teaser.png, which is not there" in capsys.readouterr().err
    (model.parent / "secret.png").write_bytes(b"secret")
    (model / "images" / "teaser.png").symlink_to(model.parent / "secret.png")
    assert main(["model-card", str(model)]) == 2
    assert "is a link out of the folder" in capsys.readouterr().err


# ---- On the Hub ----

PUSHED = {"README.md", "evaluation.json", "images/teaser.png", "images/0.png", "images/0-base.png"}


def test_a_folder_is_pushed(hub, model, tmp_path, capsys):  # noqa: F811
    """
    To a new repository, whose name the card's code then loads, in one commit: the card, the evaluation, the facts with their new
    name, the card's own pictures, and nothing else that lies in the folder. Again, only what the card is made of.
    """
    evaluation = write_evaluation(tmp_path / "evaluation")
    assert (
        main(["model-card", str(model), "--evaluation", evaluation, "--push_to_hub", "user/aligned", "--private"]) == 0
    )
    files = hub.files("user/aligned")
    assert set(files) - {".gitattributes"} == PUSHED | {"training.json"}
    assert all((model / name).read_bytes() == files[name] for name in PUSHED | {"training.json"})
    assert b'load_lora_weights("user/aligned"' in files["README.md"] and b"what the mask adds" in files["README.md"]
    assert HfApi().model_info("user/aligned").private
    assert len(hub.commits("user/aligned")) == 2  # the first one is the repository's own
    assert "Pushed README.md and evaluation.json and training.json to user/aligned" in capsys.readouterr().out
    evaluation = write_evaluation(tmp_path / "evaluation", {"b": record("x", path="out"), "c": record("c")})
    assert main(["model-card", str(model), "--evaluation", evaluation, "--push_to_hub"]) == 0
    assert b"what the mask adds was not measured" in hub.files("user/aligned")["README.md"]
    assert "Pushed README.md and evaluation.json to user/aligned" in capsys.readouterr().out


def pushed_model(tmp_path: Path, branch: str | None = None) -> None:
    """A repository as a trainer leaves it."""
    folder, api = write_model(tmp_path / "trained", model_id="user/aligned"), HfApi()
    api.create_repo("user/aligned")
    if branch:
        api.create_branch("user/aligned", branch=branch)
    api.upload_folder(repo_id="user/aligned", folder_path=folder, revision=branch, ignore_patterns=["notes.txt"])


def test_a_card_of_the_hub(hub, tmp_path, capsys, monkeypatch):  # noqa: F811
    """It is written again there without a folder of the machine; without the push, into a new folder, to look at it."""
    pushed_model(tmp_path)
    evaluation = write_evaluation(tmp_path / "evaluation", {"base": BASE, "mine": record("aligned")})
    monkeypatch.chdir(tmp_path)
    before = hub.files("user/aligned")
    assert main(["model-card", "user/aligned", "--evaluation", evaluation]) == 0
    assert set(contents(tmp_path / "aligned")) == PUSHED | {"training.json"} and hub.files("user/aligned") == before
    assert main(["model-card", "user/aligned", "--evaluation", evaluation]) == 2
    assert "which exists: move it away" in capsys.readouterr().err
    assert main(["model-card", "user/aligned", "--evaluation", evaluation, "--output_dir", "elsewhere"]) == 0
    assert contents(tmp_path / "elsewhere") == contents(tmp_path / "aligned")
    assert main(["model-card", "user/aligned", "--evaluation", evaluation, "--push_to_hub"]) == 0
    after = hub.files("user/aligned")
    assert {name for name in after if after[name] != before.get(name)} == {"README.md", "evaluation.json"}
    assert after["README.md"] == (tmp_path / "aligned" / "README.md").read_bytes()
    assert main(["model-card", "user/aligned", "--push_to_hub"]) == 0
    assert hub.files("user/aligned") == after


def test_a_card_that_was_edited_on_the_hub(hub, model, tmp_path, capsys):  # noqa: F811
    """Neither from there nor from a folder is it written over, unless the user says so."""
    pushed_model(tmp_path)
    HfApi().upload_file(repo_id="user/aligned", path_in_repo="README.md", path_or_fileobj=b"# My own words")
    before = hub.files("user/aligned")
    for source in ("user/aligned", str(model)):
        flags = ["model-card", source, "--push_to_hub", "user/aligned"]
        assert main(flags) == 2
        assert "The README.md of user/aligned is not what" in capsys.readouterr().err
        assert hub.files("user/aligned") == before
    assert main([*flags, "--overwrite"]) == 0
    assert b'load_lora_weights("user/aligned"' in hub.files("user/aligned")["README.md"]


def test_a_branch(hub, tmp_path, capsys):  # noqa: F811
    """The one that is named is read and written; main stays as it is."""
    pushed_model(tmp_path, "trial")
    before = hub.files("user/aligned")
    evaluation = write_evaluation(tmp_path / "evaluation", {"base": BASE, "mine": record("aligned")})
    flags = ["model-card", "user/aligned", "--evaluation", evaluation, "--push_to_hub"]
    assert main(flags) == 2 and "has no training.json" in capsys.readouterr().err
    assert main([*flags, "--hub_revision", "trial"]) == 0
    assert "evaluation.json" in hub.files("user/aligned", revision="trial") and hub.files("user/aligned") == before


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_push_that_fails(hub, model, tmp_path, capsys, status):  # noqa: F811
    """It says what is safe and never the token; the folder has the card, and the same command pushes it later."""
    evaluation = write_evaluation(tmp_path / "evaluation")
    hub.fail("POST", r"/api/models/user/aligned/commit/.*", status=status, times=100)
    flags = [
        "model-card",
        str(model),
        "--evaluation",
        evaluation,
        "--push_to_hub",
        "user/aligned",
        "--hub_token",
        TOKEN,
    ]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert f"The card is saved in {model}." in error and TOKEN not in error and "Traceback" not in error
    assert (model / "evaluation.json").exists()
    hub.faults.clear()
    assert main(flags) == 0 and set(hub.files("user/aligned")) >= PUSHED


@pytest.mark.parametrize("token", ["hf_secret\nsecret", "hf_sécretsecret", "hf_secretsecret"])
def test_a_token_that_is_none(hub, model, tmp_path, capsys, token):  # noqa: F811
    """Neither where a model is read nor where it is pushed to is it shown; the line break behind a token is no part of it."""
    pushed_model(tmp_path)
    for source in ("user/aligned", str(model)):
        flags = ["model-card", source, "--push_to_hub", "user/other", "--hub_token"]
        assert main([*flags, token]) == 2
        error = capsys.readouterr().err
        assert "secret" not in error and "sécret" not in error and "Traceback" not in error and "error: " in error
        assert main([*flags, f"{TOKEN}\n"]) == 0


def test_an_answer_that_does_not_come(hub, tmp_path, capsys):  # noqa: F811
    """A file that the Hub fails to give is not taken for one that is not there: the evaluation would be lost from the card."""
    pushed_model(tmp_path)
    evaluation = write_evaluation(tmp_path / "evaluation", {"base": BASE, "mine": record("aligned")})
    assert main(["model-card", "user/aligned", "--evaluation", evaluation, "--push_to_hub"]) == 0
    before = hub.files("user/aligned")
    hub.fail("HEAD", r".*/evaluation.json", status=500, times=100)
    assert main(["model-card", "user/aligned", "--push_to_hub", "--overwrite"]) == 2
    assert hub.files("user/aligned") == before and "evaluation.json" in capsys.readouterr().err


def test_push_to_hub_in_a_file(hub, model, tmp_path):  # noqa: F811
    """`push_to_hub: true` means the model's own repository, and `false` none."""
    for value, expected in (("false", 0), ("true", 1)):
        (tmp_path / "card.yaml").write_text(f"model: {model}\npush_to_hub: {value}\n")
        assert main(["model-card", "--config", str(tmp_path / "card.yaml")]) == 0
        assert [repository.id for repository in hub.repositories] == ["user/out"] * expected


# ---- From a training to its card ----


class Brightness(Scorer):
    """Mean value of the pixels of an image."""

    name = "brightness"

    def prepare(self, image):
        return np.asarray(open_image(image), dtype=np.float64).mean()

    def score_batch(self, prepared, prompts):
        return list(prepared)


def test_training_evaluation_card(tmp_path):
    """
    IAPO trained with `w_neg` 0 and 1, else alike, evaluated and put into the card: the arm is found and of the same recipe, the base is
    there, the figures are those of the summary, and no path of the machine is in anything. With another learning rate, that is said.
    """
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    for name, settings in (
        ("iapo", {"w_neg": 0.0}),
        ("dpo", {"w_neg": 1.0, "logging_steps": 2}),
        ("faster", {"w_neg": 1.0, "learning_rate": 1e-2}),
    ):
        args = InstanceDPOConfig(str(tmp_path / name), resolution=32, **tiny.FAST | {"max_steps": 2} | settings)
        trainer = InstanceDPOTrainer(
            str(tmp_path / "base"), args=args, train_dataset=tiny.pairs(4), peft_config=tiny.lora()
        )
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()

    def evaluate(*names: str) -> None:
        specs = [resolve_model(name, str(tmp_path / name), str(tmp_path / "base")) for name in names]
        protocol = load_protocol(None, num_inference_steps=1, guidance_scale=1.0, height=32, width=32)
        scorers, folder = {"brightness": Brightness}, tmp_path / "evaluation"
        evaluate_models(specs, load_prompts(prompts), protocol, scorers, folder, disable_tqdm=True)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na cat\na blue square")
    evaluate("base", "dpo", "iapo")
    flags = ["model-card", str(tmp_path / "iapo"), "--evaluation", str(tmp_path / "evaluation")]
    assert main(flags) == 0
    facts = read_evaluation_facts(tmp_path / "iapo" / "evaluation.json")
    assert (facts.model, facts.arm, facts.arm_differences, facts.base) == ("iapo", "dpo", {}, "base")
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert facts.scores["dpo"]["brightness"].value == summary["scores"]["dpo"]["brightness"]["mean"]
    card = ModelCard.load(tmp_path / "iapo" / "README.md")
    assert "with otherwise the same recipe as this model" in card.text
    assert "only its number of rows was compared" in card.text
    (value,) = [result.metric_value for result in card.data.eval_results if result.metric_type == "brightness"]
    assert value == pytest.approx(summary["scores"]["iapo"]["brightness"]["mean"], rel=1e-5)
    for file in ("README.md", "evaluation.json", "training.json"):
        assert str(tmp_path) not in (tmp_path / "iapo" / file).read_text()
    assert str(tmp_path) not in json.dumps(summary)

    evaluate("base", "faster", "iapo")
    assert main(flags) == 0
    facts = read_evaluation_facts(tmp_path / "iapo" / "evaluation.json")
    assert (facts.arm, facts.arm_differences) == ("faster", {"learning_rate": [0.01, 0.001]})
    assert "`learning_rate`: `0.01`, here `0.001`" in (tmp_path / "iapo" / "README.md").read_text()


def test_an_evaluation_of_earlier_weights_is_not_kept(model, tmp_path, capsys):
    """A model that was trained again has no evaluation until it is evaluated again."""
    save_lora(tiny.sd_pipeline(), model)
    digest = digest_of_file(model / "pytorch_lora_weights.safetensors")
    evaluation = write_evaluation(tmp_path / "evaluation", {"mine": record("m", path="out", revision=digest)})
    assert main(["model-card", str(model), "--evaluation", evaluation]) == 0
    assert main(["model-card", str(model)]) == 0
    save_lora(tiny.sd_pipeline(), model, seed=1)
    assert main(["model-card", str(model)]) == 2
    assert "evaluation.json of" in capsys.readouterr().err
