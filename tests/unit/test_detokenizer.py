"""Incremental decoding: whole characters, the same text as one decode, stop strings wherever the tokens end."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from deepserve.errors import AskError
from deepserve.messages import RequestDelta, TokenLogprobs
from deepserve.sampling_params import SamplingParams
from deepserve.tokenizer.decode import BROKEN, WINDOW, SequenceDecoder, StopFinder, TextStream
from deepserve.tokenizer.encode import Tokenizer as Encoder

CORPUS = ["the quick brown fox, the end. Don't stop now — it's naïve café 日本語 🙂🙃 and more text", "a b  c\n\nd"] * 3
TEXTS = st.text(
    alphabet=st.one_of(
        st.sampled_from(" abcdefgh.,'\n"), st.sampled_from("éß—日本語🙂🙃👨‍👩‍👧\u0301"), st.characters(codec="utf-8")
    ),
    max_size=40,
)


def _byte_level() -> Encoder:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<think>", special=False)])
    return Encoder(backend, {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}})


def _byte_fallback() -> Encoder:
    """As Llama 2 and Mixtral: ▁ for spaces, one put in front, <0xXX> for what is not in the vocabulary."""
    vocab = {"<unk>": 0, "<bos>": 1, "<eos>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ["▁", *"abcdefghijklmnopqrstuvwxyz.,'", "▁t", "he", "▁the"]:
        vocab[token] = len(vocab)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<bos>", "<eos>"])
    return Encoder(backend, {"bos_token": "<bos>", "eos_token": "<eos>"})


def _metaspace() -> Encoder:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<eos>"], show_progress=False)
    )
    return Encoder(backend, {"eos_token": "<eos>"})


TOKENIZERS = {"byte_level": _byte_level(), "byte_fallback": _byte_fallback(), "metaspace": _metaspace()}


def _stream(tokenizer: Encoder, ids: list[int], context: list[int] = (), skip: bool = True) -> list[str]:
    stream = TextStream(tokenizer, context, skip)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS)
def test_encoded_text_comes_back_whole_and_never_broken(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = _stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    if BROKEN not in text and name != "metaspace":
        assert not any(BROKEN in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=200)
def test_any_ids_read_as_one_decode(name: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    token = st.integers(0, tokenizer.vocab_size + 3)  # models pad their vocabularies
    ids = data.draw(st.lists(token, max_size=60))
    assert "".join(_stream(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(prompt=TEXTS, text=TEXTS)
def test_text_continues_the_prompt(name: str, prompt: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    context = tokenizer.encode("the end " + prompt, add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole, before = tokenizer.decode(context + ids, True), tokenizer.decode(context, True)
    if whole.startswith(before) and not before.endswith(BROKEN):
        assert "".join(_stream(tokenizer, ids, context)) == whole[len(before) :]


def test_a_space_after_the_prompt_is_kept() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [tokenizer.backend.token_to_id("▁the")]
    assert _stream(tokenizer, ids)[0] == "the"
    assert _stream(tokenizer, ids, context=tokenizer.encode("a"))[0] == " the"


def test_the_window_stays_small_over_endless_broken_bytes() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    alone = tokenizer.backend.token_to_id("Ģ")  # byte 0x80: never a character
    stream = TextStream(tokenizer)
    text = ""
    for _ in range(500):
        text += stream.push(alone)
        assert len(stream.window) <= 2 * WINDOW
    assert text + stream.flush() == BROKEN * 500


PIECES = st.lists(st.text("ab ", max_size=3), max_size=30)


def _first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return min(ends) if ends else None


STOPS = st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=4)
CUTS = st.lists(st.integers(1, 40), max_size=6)


@given(pieces=PIECES, stops=STOPS, included=st.booleans())
@settings(max_examples=400)
def test_stops_are_found_however_the_text_is_cut(pieces: list[str], stops: list[str], included: bool) -> None:
    finder, got, hit = StopFinder(stops, included), "", None
    for piece in pieces:
        passed, hit = finder.push(piece)
        got += passed
        if hit:
            break
    expected = _first_stop("".join(pieces), stops)
    if expected is None:
        assert hit is None
        assert got + finder.held == "".join(pieces)
        assert any(stop.startswith(finder.held) and stop != finder.held for stop in stops)
    else:
        end, start, stop = expected
        assert (got, hit) == ("".join(pieces)[: end if included else start], stop)


def _decode(ids: list[int], sampling: SamplingParams, cuts: list[int], finish: str = "length") -> list:
    tokenizer = TOKENIZERS["byte_level"]
    decoder = SequenceDecoder(tokenizer, [], sampling)
    bounds = [0, *sorted(cut for cut in cuts if 0 < cut < len(ids)), len(ids)]
    deltas = []
    for start, end in itertools.pairwise(bounds):
        logprobs = [TokenLogprobs([token], [-1.0], [1]) for token in ids[start:end]]
        last = finish if end == len(ids) else None
        deltas.append(decoder.push(RequestDelta("r", ids[start:end], logprobs, finish_reason=last)))
    return deltas


@given(text=TEXTS.filter(bool), cuts=CUTS, stop=st.text("abc é", min_size=1, max_size=3))
@settings(max_examples=200)
def test_deltas_say_the_same_however_they_are_cut(text: str, cuts: list[int], stop: str) -> None:
    ids = TOKENIZERS["byte_level"].encode(text, add_special_tokens=False)
    sampling = SamplingParams(stop=[stop], max_tokens=100)
    one, many = _decode(ids, sampling, []), _decode(ids, sampling, cuts)
    assert "".join(delta.text for delta in many) == one[0].text == text.split(stop)[0]
    assert [token for delta in many for token in delta.token_ids] == one[0].token_ids
    assert [delta.finish_reason for delta in many if delta.finish_reason] == ["stop" if stop in text else "length"]
    assert sum(len(delta.logprobs) for delta in many) == len(one[0].token_ids)


def test_stop_strings_end_the_text_and_name_themselves() -> None:
    ids = TOKENIZERS["byte_level"].encode("one two END three", add_special_tokens=False)
    (delta,) = _decode(ids, SamplingParams(stop=["END"]), [])
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("one two ", "stop", "END")
    (delta,) = _decode(ids, SamplingParams(stop=["END"], include_stop_str_in_output=True), [])
    assert delta.text == "one two END"
    (delta,) = _decode(ids, SamplingParams(stop=["one"], max_tokens=99, min_tokens=len(ids)), [])
    assert (delta.text, delta.finish_reason) == ("one two END three", "length")


def test_a_stop_token_is_no_text_unless_it_was_asked_for() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [*tokenizer.encode("bye", add_special_tokens=False), tokenizer.encode("!", add_special_tokens=False)[0]]
    assert _decode(ids, SamplingParams(), [], finish="stop")[0].text == "bye"
    assert _decode(ids, SamplingParams(include_stop_str_in_output=True), [], finish="stop")[0].text == "bye!"
    ids[-1] = tokenizer.eos_token_id
    shown = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False)
    assert _decode(ids, shown, [], finish="stop")[0].text == "bye<eos>"


def test_without_text_there_are_no_stop_strings() -> None:
    with pytest.raises(AskError, match="stop strings need text"):
        SequenceDecoder(TOKENIZERS["byte_level"], [], SamplingParams(stop=["x"], detokenize=False))
    decoder = SequenceDecoder(None, [], SamplingParams(detokenize=False))
    assert decoder.push(RequestDelta("r", [5, 6], finish_reason="length")).token_ids == [5, 6]
