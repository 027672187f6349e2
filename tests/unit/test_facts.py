"""What the facts say of a directory: sizes from headers, broken files by name, names without a directory."""

import json
import struct

import pytest

from deepserve.config import Config
from deepserve.errors import AskError
from deepserve.facts import find_model, gather_facts, read_checkpoint
from deepserve.hardware import parse_hardware
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint("llama", tmp_path_factory.mktemp("facts") / "llama", dtype="bfloat16", shard_size="60KB")


def write_safetensors(path, header, payload=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


def test_a_checkpoint_is_measured_by_its_headers(checkpoint) -> None:
    found = read_checkpoint(checkpoint)
    files = list(checkpoint.glob("*.safetensors"))
    assert found.num_files == len(files) > 1
    assert set(found.tensor_bytes) == {"BF16"}
    assert 0 < found.num_bytes < sum(file.stat().st_size for file in files)
    assert found.has_tokenizer
    assert found.has_weights


def test_a_config_alone_is_enough(checkpoint, tmp_path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    for model in (tmp_path, tmp_path / "config.json"):
        facts = gather_facts(Config(model=str(model)), parse_hardware("h100"))
        assert facts.architecture == find_model(str(checkpoint))[1]
        assert not facts.checkpoint.has_weights
        assert facts.hypothetical


def test_a_known_name_needs_nothing_on_the_disk() -> None:
    path, architecture = find_model("deepseek-ai/DeepSeek-R1-0528")
    assert path is None
    assert architecture.num_layers == 61


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x05", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{x",
        struct.pack("<Q", 2) + b"{}" + b"more",
    ],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path, content) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(AskError, match=r"model\.safetensors is broken"):
        read_checkpoint(tmp_path)


def test_a_truncated_file_is_named(checkpoint, tmp_path) -> None:
    whole = next(checkpoint.glob("*.safetensors")).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-10])
    with pytest.raises(AskError, match=r"cut\.safetensors is broken"):
        read_checkpoint(tmp_path)


def test_the_header_must_make_sense(tmp_path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"w": {"dtype": "F32", "data_offsets": [0]}})
    with pytest.raises(AskError, match="broken"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{", "\x00"])
def test_a_broken_generation_config_is_refused(tmp_path, text) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(AskError):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("model", ["", "no/such-model", "/no/such/directory"])
def test_what_is_no_model_is_refused(model) -> None:
    with pytest.raises(AskError) as caught:
        find_model(model)
    assert caught.value.field == "model"


def test_a_tokenizer_elsewhere_must_be_one(checkpoint, tmp_path) -> None:
    with pytest.raises(AskError) as caught:
        gather_facts(Config(model=str(checkpoint), tokenizer=str(tmp_path)))
    assert caught.value.field == "tokenizer"
