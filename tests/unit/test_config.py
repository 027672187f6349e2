"""Config: types and ranges, its round trip through JSON, and the keyword door with other engines' spellings."""

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepserve.config import Config, field_types, knobs
from deepserve.errors import AskError
from deepserve.spellings import NO_EFFECT, REFUSED, SAME, SIMILAR, config_of, flag, suggestion


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", "8000"), ("port", 70000), ("port", True), ("dtype", "int8"), ("max_model_len", 0),
        ("max_model_len", 1.5), ("gpu_memory_utilization", 1.2), ("gpu_memory_utilization", "0.9"),
        ("gpu_memory_utilization", float("nan")),
        ("on", [1]), ("on", ""), ("kernels", {"linear": 1}), ("kernels", "linear"), ("enable_prefix_caching", 1),
        ("seed", -1), ("seed", None), ("scheduling_policy", "lifo"), ("model", None), ("max_logprobs", 21),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(field, value) -> None:
    with pytest.raises(AskError) as caught:
        Config(**{field: value})
    assert caught.value.field == field


def test_values_settle_into_their_types() -> None:
    config = Config(served_model_name="m", on=["a"], gpu_memory_utilization=1, max_model_len=-1, max_num_seqs="auto")
    assert config.served_model_name == ("m",)
    assert config.on == ("a",)
    assert isinstance(config.gpu_memory_utilization, float)
    assert config.max_model_len is None
    assert config.max_num_seqs is None


def test_a_config_survives_json() -> None:
    config = Config(model="m", api_key=("a", "b"), kernels={"linear": "reference"}, max_model_len=5, off=("x",))
    assert Config(**json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.changed()) == {"model", "api_key", "kernels", "max_model_len", "off"}


def test_every_field_says_what_it_means() -> None:
    assert list(knobs()) == [field.name for field in dataclasses.fields(Config)]
    assert all(len(knob.help) > 10 for knob in knobs().values())


@given(
    st.sampled_from(sorted(field_types())), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
)
def test_any_value_is_taken_or_refused_by_name(field, value) -> None:
    try:
        config = Config(**{field: value})
    except AskError as error:
        assert error.field == field
    else:
        assert Config(**json.loads(json.dumps(config.to_dict()))) == config


def test_the_keyword_door_knows_other_spellings() -> None:
    config, lines = config_of(
        model="m",
        tp_size=1,
        context_length=64,
        trust_remote_code=True,
        pipeline_parallel_size=1,
        speculative_config=None,
    )
    assert (config.max_model_len, config.tensor_parallel_size) == (64, 1)
    assert lines == ["accepted, no effect: trust_remote_code (code that comes with a checkpoint is never run)"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("pipeline_parallel_size", 2, "not built"), ("speculative_draft_model_path", "m", "no second"),
        ("enable_lora", True, "adapters"), ("max_modl_len", 5, "max_model_len"),
        ("mem_fraction_static", 0.8, "gpu_memory"), ("zzzz", 1, "not an option"),
    ],
)  # fmt: skip
def test_the_keyword_door_refuses(name, value, said) -> None:
    with pytest.raises(AskError, match=said) as caught:
        config_of(model="m", **{name: value})
    assert caught.value.field == name


def test_the_tables_of_spellings_do_not_overlap() -> None:
    own = {flag(name) for name in knobs()} | {other for knob in knobs().values() for other in knob.flags}
    tables = [set(NO_EFFECT), set(REFUSED), set(SAME), set(SIMILAR), own]
    for index, table in enumerate(tables):
        for other in tables[index + 1 :]:
            assert not table & other, table & other
    known = own | set(NO_EFFECT) | set(REFUSED) | {"--no-" + name[2:] for name in own}
    known.add("--compilation-config")
    assert {re.split("[.=]", same)[0] for same in SAME.values()} <= known
    assert suggestion("--chunked-prefil-size", own) == f"did you mean {SIMILAR['--chunked-prefill-size']}?"
