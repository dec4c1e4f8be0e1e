from __future__ import annotations

import pickle

import pytest
import torch

from pydqn._util.files import atomic_write
from pydqn._util.weights import load_weights, save_weights


def test_weights_and_metadata_come_back(tmp_path):
    weights = {"a": torch.randn(3, 4, 8, 8).to(memory_format=torch.channels_last), "b": torch.tensor(2.0)}
    save_weights(tmp_path / "w.safetensors", weights, {"steps": 3})
    loaded, metadata = load_weights(tmp_path / "w.safetensors")
    assert metadata == {"steps": 3}
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize(
    "content", [b"", b"x" * 100, b"\xff" * 200, pickle.dumps({"a": 1}), (1 << 60).to_bytes(8, "little")]
)
def test_what_is_not_weights_is_refused(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        load_weights(path)


def test_foreign_weights_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="saved by pydqn"):
        load_weights(tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_file_before(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic_write(path) as file:
            file.write(b"half of the n")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
