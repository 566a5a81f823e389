# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from trl_diffusion.metrics.weights import fetch_file, load_tensors, local_file, read_tensors


COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache with one repository at two commits."""
    repository = tmp_path / "models--someone--scorer"
    for commit in (COMMIT, OTHER):
        for name in ("weights.pt", "deep/er/weights.pt"):
            file = repository / "snapshots" / commit / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{commit} {name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "refs" / "next").write_text(OTHER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return repository


class TestFiles:
    @pytest.mark.parametrize("name", ["weights.pt", "deep/er/weights.pt"])
    @pytest.mark.parametrize("revision, commit", [(None, COMMIT), ("next", OTHER), (OTHER, OTHER)])
    def test_a_file_comes_with_its_commit(self, hub, name, revision, commit):
        """The file is that of the branch or commit, also in folders, and its commit is returned."""
        path, resolved = fetch_file("someone/scorer", name, revision)
        assert resolved == commit and path.read_text() == f"{commit} {name}"

    @pytest.mark.parametrize(
        "repo_id, name",
        [("someone/scorer", "other.pt"), ("nobody/scorer", "weights.pt"), ("someone/scorer", "deep/w.pt")],
    )
    def test_a_file_that_is_not_there(self, hub, repo_id, name):
        """Without network, the error is one line with the file, the repository and the command that downloads it."""
        with pytest.raises(ValueError, match=f"weights {name} of https://huggingface.co/{repo_id} are not") as caught:
            fetch_file(repo_id, name)
        assert f"`hf download {repo_id} {name}`" in str(caught.value) and "\n" not in str(caught.value)

    def test_a_file_of_ones_own(self, tmp_path):
        """Its hash depends only on its content."""
        digests = []
        for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
            (tmp_path / name).write_text(content)
            path, digest = local_file(str(tmp_path / name))
            assert path == tmp_path / name and digest.startswith("sha256:")
            digests.append(digest)
        assert digests[0] == digests[1] != digests[2]

    def test_a_file_of_ones_own_that_is_not_there(self, tmp_path):
        """A missing file and a folder raise a ValueError with the path."""
        for path in (tmp_path / "missing.pt", tmp_path):
            with pytest.raises(ValueError, match=f"no file of weights at {path}"):
                local_file(path)


TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


class TestReading:
    @pytest.mark.parametrize("kind", ["safetensors", "pt", "nested", "ordered"])
    def test_tensors(self, tmp_path, kind):
        """Safetensors and PyTorch files give the same tensors, nested under `state_dict` or not."""
        path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}"
        if kind == "safetensors":
            save_file(TENSORS, path)
        else:
            torch.save({"pt": TENSORS, "nested": {"state_dict": TENSORS}, "ordered": OrderedDict(TENSORS)}[kind], path)
        read = read_tensors(path)
        assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)

    @pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
    @pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 half a file"])
    def test_what_is_no_weights(self, tmp_path, name, content):
        """An invalid file raises a one-line ValueError with the path."""
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} cannot be read as weights") as caught:
            read_tensors(path)
        assert "\n" not in str(caught.value)

    def test_a_tensor_is_no_state_dict(self, tmp_path):
        """A file without a state dict raises a ValueError with the path."""
        torch.save(torch.ones(2), tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=f"{tmp_path / 'weights.pt'} contains no state dict"):
            read_tensors(tmp_path / "weights.pt")

    def test_nothing_but_tensors_is_read(self, tmp_path):
        """A pickle that calls a function is refused, and the function is not called."""

        class Trap:
            def __reduce__(self):
                return Path.touch, (tmp_path / "sprung",)

        torch.save({"weight": Trap()}, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="cannot be read as weights"):
            read_tensors(tmp_path / "weights.pt")
        assert not (tmp_path / "sprung").exists()


class TestLoading:
    def test_all_tensors_are_loaded(self):
        """The module gets the values of the tensors in its own data type."""
        module = torch.nn.Linear(3, 2)
        load_tensors(module, {name: tensor.half() for name, tensor in TENSORS.items()}, "file.pt")
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, TENSORS[name])

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"bias": None}, "it lacks bias."),
            ({"bias": None, "weight": None}, "it lacks bias, weight."),
            ({"gain": torch.ones(2)}, "it has the unexpected tensors gain."),
            ({"bias": torch.ones(3)}, "it has other shapes for bias."),
            ({"bias": torch.ones(2, 1)}, "it has other shapes for bias."),
            (
                {f"{index}": torch.ones(1) for index in range(8)},
                "it has the unexpected tensors 0, 1, 2, 3, 4 and 3 more.",
            ),
        ],
    )
    def test_tensors_that_do_not_fit(self, changes, message):
        """Missing, unexpected and misshapen tensors are named with the file, and nothing is loaded."""
        module = torch.nn.Linear(3, 2)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        tensors = {name: tensor for name, tensor in (TENSORS | changes).items() if tensor is not None}
        with pytest.raises(ValueError) as caught:
            load_tensors(module, tensors, "file.pt")
        assert str(caught.value) == f"file.pt does not fit the model of this metric: {message}"
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
