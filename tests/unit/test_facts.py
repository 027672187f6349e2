"""What the facts say of a directory: its parts, broken files by name, names without a directory."""

import pytest

from deepserve.config import Config
from deepserve.errors import AskError
from deepserve.facts import find_model, gather_facts, read_checkpoint
from deepserve.hardware import parse_hardware
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint("llama", tmp_path_factory.mktemp("facts") / "llama", dtype="bfloat16", shard_size="60KB")


def test_a_checkpoint_has_weights_and_a_tokenizer(checkpoint) -> None:
    found = read_checkpoint(checkpoint)
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
