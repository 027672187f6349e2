"""The tokenizer's edges: bos and eos, limits, bad words, chat templates as transformers renders them."""

import json
from pathlib import Path

import pytest
import transformers

from deepserve.errors import AskError
from deepserve.tokenizer.encode import Tokenizer
from tests.tiny import write_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": "Hi {{ 7 * 7 }} & {% raw %}"},
    {"role": "assistant", "content": "  Hello there "},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def _settings(folder: Path, **changes) -> Tokenizer:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return Tokenizer.from_directory(folder)


def test_encodes_as_transformers_does(folder: Path) -> None:
    ours, theirs = Tokenizer.from_directory(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("the quick brown fox", "", "naïve 日本 🙂\n\n", "<|user|>hi<eos>"):
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_token_id, ours.eos_token_id, ours.vocab_size) == (0, 1, len(theirs))
    assert ours.special_ids == {0, 1, 2, 3, 4}
    assert not ours.knows(ours.vocab_size + 5)


def test_adds_bos_and_eos_where_the_settings_say_so(folder: Path) -> None:
    plain = Tokenizer.from_directory(folder).encode("hi")
    both = _settings(folder, add_bos_token=True, add_eos_token=True)
    assert both.encode("hi") == [0, *plain, 1]
    assert both.encode("hi", add_special_tokens=False) == plain
    from tokenizers.processors import TemplateProcessing

    backend = both.backend
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    assert Tokenizer(backend, {"bos_token": "<bos>"}).encode("hi") == [0, *plain]
    assert Tokenizer(backend, {"bos_token": "<bos>", "add_bos_token": True}).encode("hi") == [0, *plain]
    assert Tokenizer(backend, {"bos_token": "<bos>", "add_bos_token": False}).encode("hi") == plain


def test_refuses_what_cannot_fit_and_what_is_no_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_directory(folder)
    assert len(tokenizer.encode("x" * 9, max_tokens=9)) <= 9
    with pytest.raises(AskError, match="has 10 tokens, at most 9 fit") as caught:
        tokenizer.encode("q" * 10, max_tokens=9)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(AskError, match="1000000 characters"):
        tokenizer.encode("q" * 1_000_000, max_tokens=9)
    with pytest.raises(AskError, match="not valid Unicode"):
        tokenizer.encode("\ud800")


def test_bad_words_at_the_start_and_after_a_space(folder: Path) -> None:
    tokenizer = Tokenizer.from_directory(folder)
    start, later = (tokenizer.encode(text, add_special_tokens=False) for text in ("the", " the"))
    assert tokenizer.encode_bad_words(["the"]) == [start, later]
    assert tokenizer.encode_bad_words([" the", "the"]) == [later, start]


@pytest.mark.parametrize("missing", ["tokenizer.json", "broken", "not an object"])
def test_broken_folders_are_refused(folder: Path, missing: str) -> None:
    if missing == "tokenizer.json":
        (folder / missing).unlink()
    elif missing == "broken":
        (folder / "tokenizer.json").write_text("{")
    else:
        (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(AskError):
        Tokenizer.from_directory(folder)


TEMPLATES = {
    "tools": "{{ bos_token }}{% for m in messages %}\n"
    "  {% if loop.first %}{% continue %}{% endif %}{{ m.content | trim }}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{{ tools | tojson(indent=2) }}{% endif %}",
    "generation": "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% set x = 1 %}\n{% endfor %}x",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ strftime_now('%Y') }}{{ thinking }}{{ messages[-1].content.split('l')[0] }}",
}  # fmt: skip


@pytest.mark.parametrize("name", [None, *TEMPLATES])
def test_templates_render_as_in_transformers(folder: Path, name: str | None) -> None:
    if name:
        (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    ours, theirs = Tokenizer.from_directory(folder), transformers.AutoTokenizer.from_pretrained(folder)
    tools = [{"type": "function", "function": {"name": "<f>", "description": "é", "parameters": {}}}]
    for extra in ({}, {"tools": tools}, {"thinking": True}):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **extra)
        assert ours.render_chat(MESSAGES, **extra) == expected


def test_a_list_of_templates_has_one_for_tools(folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    tokenizer = _settings(folder, chat_template=named)
    assert tokenizer.render_chat(MESSAGES) == "plain"
    assert tokenizer.render_chat(MESSAGES, tools=[{}]) == "with tools"


def test_the_last_message_can_be_continued(folder: Path) -> None:
    ours, theirs = Tokenizer.from_directory(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = ours.render_chat(MESSAGES, add_generation_prompt=False, continue_final_message=True)
    assert text == theirs.apply_chat_template(MESSAGES, tokenize=False, continue_final_message=True)
    assert text.endswith("  Hello there ")
    with pytest.raises(AskError, match="continue_final_message"):
        ours.render_chat(MESSAGES, continue_final_message=True)
    with pytest.raises(AskError, match="no text to continue"):
        ours.render_chat([{"role": "user", "content": None}], False, True)


@pytest.mark.parametrize(
    "template, problem",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "immutable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[9].content.x }}", "undefined|has no"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for %}", "broken"),
    ],
)
def test_a_template_that_refuses_is_an_ask_error(folder: Path, template: str, problem: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(AskError, match=problem):
        Tokenizer.from_directory(folder).render_chat(MESSAGES)


@pytest.mark.parametrize("messages", [[], [7], [{"content": "x"}], [{"role": 1}]])
def test_messages_have_roles(folder: Path, messages: list) -> None:
    with pytest.raises(AskError, match="each with a role"):
        Tokenizer.from_directory(folder).render_chat(messages)


def test_without_a_template_messages_are_refused(folder: Path) -> None:
    with pytest.raises(AskError, match="no chat template"):
        _settings(folder, chat_template=None).render_chat(MESSAGES)
