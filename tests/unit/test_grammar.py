"""Grammars against what they mean: random walks over legal tokens of real tokenizers, checked by re and jsonschema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepserve.errors import AskError
from deepserve.sampling.edits import keep_legal
from deepserve.sampling.grammar import MAX_COMPILED, Grammars, bits
from deepserve.sampling.vocabulary import Vocabulary
from deepserve.sampling_params import SamplingParams
from deepserve.structured_outputs import Before, StructuredOutputsParams, lark_text
from tests.grammar_walk import EOS, Model
from tests.house.size import ROOT
from tests.tiny import write_tokenizer

DEMO = ROOT / "deepserve/demo"


@pytest.fixture(scope="module", params=["demo", "tiny"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """8,192 tokens of English; 300 tokens, mostly single bytes, in a vocabulary that is larger than the tokenizer's."""
    if request.param == "demo":
        return Model(DEMO, 8192)
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Model(folder, 320)


LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": -7, "maximum": 120},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "string", "maxLength": 5},
        {"type": "string", "pattern": "^[a-c]{1,3}é?$"},
        {"type": "string", "format": "date"},
        {"enum": ["cat", "dög", "日本", 7, None, ["x"]]},
        {"const": {"a b": '\n"'}},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=2).map(lambda several: {"anyOf": several}),
        st.dictionaries(st.sampled_from(["a", "b", "ключ", 'q"']), inner, max_size=3).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:1],
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=5,
)


@given(schema=SCHEMAS, seed=st.integers(0, 2**32), tight=st.booleans())
@settings(max_examples=80)
def test_json_is_valid_by_its_schema(model: Model, schema: dict[str, Any], seed: int, tight: bool) -> None:
    tokens = model.walk(StructuredOutputsParams(json=schema, disable_any_whitespace=tight), seed, 3000)
    assert tokens[-1] == EOS
    text = model.text(tokens)
    jsonschema.validate(json.loads(text), schema)
    if tight:
        assert len(re.sub(r'"(\\.|[^"\\])*"', "", text).split()) <= 1


PATTERNS = [
    "ab?c*d{0,3}", "[0-9]{3}-[0-9]{4}", "(yes|no|может быть)", r"[^\x00-\x7f]{1,3}", "日本?(語|人){1,2}", "", "x{5,9}",
    r"(a|ab)(c|bcd)(d*){2}", "🦊{2}|é{1,2}x", r"[a-z.]{1,8}@[a-z]{2,5}\.(com|org)", r"\n\t?\\", "(?i)seattle",
    r"\p{Lu}\p{Ll}{0,4}",
]  # fmt: skip


@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_a_text_matches_its_regex(model: Model, pattern: str, seed: int) -> None:
    tokens = model.walk(StructuredOutputsParams(regex=pattern), seed, 3000)
    text = model.text(tokens)
    if tokens[-1] == EOS and "\\p" not in pattern:
        assert re.fullmatch(pattern, text), text
    assert tokens[-1] == EOS or "*" in pattern


@given(choice=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4), seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_a_choice_is_one_of_the_texts(model: Model, choice: list[str], seed: int) -> None:
    assert model.text(model.walk(StructuredOutputsParams(choice=choice), seed)) in choice


def test_every_choice_can_be_made(model: Model) -> None:
    choice = ["a", "ab", "b c", 'd"\n', "é"]
    asked = StructuredOutputsParams(choice=choice)
    assert {model.text(model.walk(asked, seed)) for seed in range(200)} == set(choice)


@pytest.mark.parametrize("grammar", ['start: "(" start ")" | "x"', 'root ::= "(" root ")" | "x"'], ids=["lark", "gbnf"])
def test_a_grammar_in_either_language(model: Model, grammar: str) -> None:
    for seed in range(8):
        text = model.text(model.walk(StructuredOutputsParams(grammar=grammar), seed))
        assert re.fullmatch(r"\(*x\)*", text) and text.count("(") == text.count(")")


def test_an_object_of_any_kind(model: Model) -> None:
    tokens = model.walk(StructuredOutputsParams(json_object=True), 3, 40)
    assert model.text(tokens[:1]).startswith("{")


@given(data=st.data(), seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_drafts_have_the_masks_of_the_tokens_that_they_guess(model: Model, data: st.DataObject, seed: int) -> None:
    asked = StructuredOutputsParams(json={"enum": ["ab", "abc", 12, "日"]})
    params = SamplingParams(structured_outputs=asked, min_tokens=data.draw(st.sampled_from([0, 3, 9])), max_tokens=20)
    walked = (model.walk(asked, seed) + [EOS] * 3)[:12]
    start = data.draw(st.integers(0, len(walked) - 3))
    drafts = walked[start : start + 3]
    if wrong := data.draw(st.sampled_from([None, 0, 1, 2])):
        drafts[wrong] = data.draw(st.integers(0, model.vocab_size - 1))
    ahead = model.grammars.constrain(params, walked[:start])
    found = model.legal(ahead, drafts)
    step = model.grammars.constrain(params, walked[:start])
    for index, legal in enumerate(found):
        assert legal.tolist() == model.legal(step)[0].tolist()
        if index == len(drafts) or drafts[index] not in legal:
            break
        step.accept([drafts[index]])
    assert model.legal(ahead)[0].tolist() == found[0].tolist()  # it stayed where it was


def test_a_text_of_several_requests_at_once(model: Model) -> None:
    asked = [StructuredOutputsParams(regex=pattern) for pattern in ("a+", "b", "[ab]")]
    three = [model.grammars.constrain(SamplingParams(structured_outputs=one), []) for one in asked]
    masks = model.grammars.masks([(three[0], 4, []), (three[1], 1, []), (three[2], 2, [])], 5)
    for constraint, row in zip(three, (4, 1, 2)):
        assert (masks[row] == model.grammars.masks([(constraint, 0, [])], 1)[0]).all()
    assert (masks[[0, 3]] == -1).all()


def test_the_end_waits_for_min_tokens_only_where_something_else_is_legal(model: Model) -> None:
    stars = StructuredOutputsParams(regex="a*")
    for seed in range(5):
        tokens = model.walk(stars, seed, min_tokens=6)
        assert EOS not in tokens[:5] and (len(tokens) > 6 or tokens[-1] == EOS or len(tokens) == 6)
    assert model.walk(StructuredOutputsParams(regex="b"), 0, min_tokens=4)[1:] == [EOS] * 3


@pytest.mark.parametrize("mark", [False, True], ids=["text", "token"])
def test_reasoning_goes_before_the_answer(model: Model, mark: bool) -> None:
    added = next(text for text, token in model.vocabulary.marks.items() if token > EOS)
    end, encode = added if mark else "</think>", model.vocabulary.encode
    closing = [model.vocabulary.marks[end]] if mark else encode(end)

    def after(tokens: list[int], **before: Any) -> list[int]:
        asked = StructuredOutputsParams(choice=["x", "yz"], before=Before(end, **before))
        constraint = model.grammars.constrain(SamplingParams(structured_outputs=asked), tokens)
        return model.legal(constraint)[0].tolist()

    alone = StructuredOutputsParams(choice=["x", "yz"])
    answer = model.legal(model.grammars.constrain(SamplingParams(structured_outputs=alone), []))[0].tolist()
    assert after(encode("Hm: x </thin") + closing) == answer
    assert EOS not in after([]) and set(after([])) > set(answer)
    with pytest.raises(AskError, match="outside the grammar"):
        after(closing + encode("no"))
    newline = encode("\n")
    assert after(closing + newline * 2, newlines=True) == answer
    assert set(after(closing, newlines=True)) > set(answer)
    assert set(answer) < set(after([], opening="<think>"))
    assert after(encode("<think> ?") + closing, opening="<think>") == answer
    assert after(encode("x"), opening="<think>") == after(closing + encode("x")) == [EOS]


@pytest.mark.parametrize("form", [{"choice": ["ab"]}, {"regex": "ab"}, {"grammar": 'start: "ab"'}], ids=str)
def test_something_else_may_stand_instead(model: Model, form: dict[str, Any]) -> None:
    asked = StructuredOutputsParams(**form, instead='start: "<" /[0-9]/ ">"')
    assert {model.text(model.walk(asked, seed))[0] for seed in range(20)} == {"a", "<"}
    asked = StructuredOutputsParams(**form, before=Before("."))
    assert model.text(model.walk(asked, 0, 4000)).endswith(".ab")


def test_something_else_may_stand_instead_after_a_reasoning(model: Model) -> None:
    asked = StructuredOutputsParams(json={"const": 1}, instead='start: "<>"', before=Before("."))
    assert re.search(r"\.(1|<>)$", model.text(model.walk(asked, 0, 4000)))


def test_marks_are_no_text(model: Model) -> None:
    free = model.grammars.constrain(SamplingParams(structured_outputs=StructuredOutputsParams(regex="(?s:.*)")), [])
    legal = set(model.legal(free)[0].tolist())
    assert not legal & (set(model.vocabulary.marks.values()) - {EOS})
    assert legal >= {model.vocabulary.encode(text)[0] for text in "a<\n"}


def test_lark_for_a_text_with_marks() -> None:
    assert lark_text('a<x>"b<xy>', {"<x>": 5, "<xy>": 6, "<": 7}) == r'"a" <[5]> "\"b" <[6]>'
    assert lark_text("", {}) == '""'


@given(st.text(max_size=30))
@settings(max_examples=100)
def test_the_bytes_of_tokens_are_the_text(model: Model, text: str) -> None:
    tokens = model.vocabulary.encode(text)
    assert b"".join(model.vocabulary.tokens[token] for token in tokens) == text.encode()


def test_the_bytes_of_byte_fallback_tokens(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "▁a": 1, "b▁c": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    replace, fuse = tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse()
    tokenizer.decoder = tokenizers.decoders.Sequence([replace, tokenizers.decoders.ByteFallback(), fuse])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Vocabulary.read(str(tmp_path), 300).tokens[1:5] == [b" a", b"b c", b"\x00", b"\x01"]
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(AskError, match="decoders are: Fuse"):
        Vocabulary.read(str(tmp_path), 300)
    with pytest.raises(AskError, match="has none"):
        Vocabulary.read(None, 300)


@given(st.sets(st.integers(0, 320), max_size=40), st.integers(321, 330))
def test_masks_keep_what_they_name(legal: set[int], vocab_size: int) -> None:
    mask = torch.from_numpy(bits(legal, vocab_size))
    logits = torch.randn(2, vocab_size)
    kept = keep_legal(logits, torch.stack([mask, torch.full_like(mask, -1)]))
    assert kept[0].isfinite().nonzero().flatten().tolist() == sorted(legal)
    assert (kept[1] == logits[1]).all() and (kept[0][list(legal)] == logits[0][list(legal)]).all()


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "structured_outputs", "asks for nothing"),
    ({"json": {}, "regex": "a"}, "structured_outputs", "json and regex"),
    ({"json": '{"a"'}, "structured_outputs.json", "not valid JSON"),
    ({"json": [1]}, "structured_outputs.json", "no JSON schema"),
    ({"json": "[" * 5000}, "structured_outputs.json", "not valid|nested deeper"),
    ({"json": {"const": float("nan")}}, "structured_outputs.json", "not valid JSON"),
    ({"json": {"const": "\ud800"}}, "structured_outputs.json", "Unicode"),
    ({"json": {"enum": ["x" * 200_000]}}, "structured_outputs.json", "at most 131,072"),
    ({"json": {"type": "nope"}}, "structured_outputs.json", "nope"),
    ({"json": {"not": {}}}, "structured_outputs.json", "not"),
    ({"json": {"$ref": "#"}}, "structured_outputs.json", "nothing can match"),
    ({"json": {"$ref": "file:///etc/passwd"}}, "structured_outputs.json", "retriev"),
    ({"regex": 5}, "structured_outputs.regex", "expected text"),
    ({"regex": "(?=a)"}, "structured_outputs.regex", "look-around"),
    ({"regex": "(a" * 300}, "structured_outputs.regex", "regex"),
    ({"choice": []}, "structured_outputs.choice", "at least one"),
    ({"choice": ["a"] * 5000}, "structured_outputs.choice", "at most"),
    ({"grammar": "start: ("}, "structured_outputs.grammar", "Expected"),
    ({"grammar": "a b"}, "structured_outputs.grammar", "neither Lark nor GBNF"),
    ({"grammar": "start: " + "(" * 9000}, "structured_outputs.grammar", "nested|neither"),
    ({"json_object": 1}, "structured_outputs.json_object", "true or false"),
]  # fmt: skip


@pytest.mark.parametrize("fields, field, why", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_asked_is_refused_by_name(model: Model, fields: dict[str, Any], field: str, why: str) -> None:
    with pytest.raises(AskError, match=why) as refused:
        model.grammars.check(StructuredOutputsParams(**fields))
    assert refused.value.field == field
    assert len(str(refused.value)) < 600


def test_closing_every_object_that_does_not_say_otherwise() -> None:
    schema = {"properties": {"a": {"properties": {}}, "b": {"properties": {}, "additionalProperties": True}}}
    closed = json.loads(StructuredOutputsParams(json=schema, disable_additional_properties=True).json)  # type: ignore[arg-type]
    assert closed["additionalProperties"] is closed["properties"]["a"]["additionalProperties"] is False
    assert closed["properties"]["b"]["additionalProperties"] is True


def test_few_compiled_grammars_are_kept(model: Model) -> None:
    asked = [StructuredOutputsParams(regex=f"a{{{count}}}") for count in range(1, MAX_COMPILED + 3)]
    for one in asked:
        model.grammars.check(one)
    assert [model.grammars.has(one) for one in asked[:3]] == [False, False, True]
    again = model.grammars.constrain(SamplingParams(structured_outputs=asked[0]), [])
    assert model.legal(again)[0].tolist()


def test_without_the_library_the_hint_says_how_to_get_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(AskError, match="pip install"):
        Grammars(str(DEMO), 8192, [EOS]).check(StructuredOutputsParams(regex="a"))
