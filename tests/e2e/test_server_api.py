"""The API as clients use it: the official openai client, and raw HTTP where the bytes matter."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from deepserve.metrics import ENGINE_METRICS, HTTP_METRICS, REQUEST_METRICS
from tests.e2e.server import Server, eventually, serving
from tests.tiny import VOCAB_SIZE, write_checkpoint

NAME = "tiny"
CONTEXT = 640
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    with serving(write_checkpoint("llama", folder / "model"), folder, "--served-model-name", NAME, "other") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME, "other"]
    assert client.models.retrieve("other").max_model_len == CONTEXT
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert caught.value.code == "model_not_found"


def test_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=NAME, prompt="the quick", max_tokens=6, temperature=0)
    (choice,) = reply.choices
    assert choice.finish_reason in ("length", "stop")
    assert reply.usage.completion_tokens == 6 or choice.finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.id.startswith("cmpl-") and reply.object == "text_completion"


def test_a_stream_says_what_the_whole_reply_says(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "prompt": "the lazy dog", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=8, temperature=0)
    assert reply.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=8, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == reply.choices[0].message.content
    assert chunks[-1].usage == reply.usage or chunks[-1].usage.completion_tokens == reply.usage.completion_tokens


def test_n_and_seed(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "prompt": "the", "max_tokens": 10, "n": 3, "seed": 5, "temperature": 1.0}
    one, two = client.completions.create(**asked), client.completions.create(**asked)
    texts = [choice.text for choice in one.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    assert texts == [choice.text for choice in two.choices] and len(set(texts)) > 1
    chunks = client.completions.create(**asked, stream=True)
    streamed = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [streamed[index] for index in range(3)] == texts


def test_several_prompts_of_every_form(server: Server, client: openai.OpenAI) -> None:
    ids = [server.http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in ("the fox", "a dog")]
    texts = client.completions.create(model=NAME, prompt=["the fox", "a dog"], max_tokens=5, temperature=0)
    lists = client.completions.create(model=NAME, prompt=ids, max_tokens=5, temperature=0)
    alone = client.completions.create(model=NAME, prompt=ids[1], max_tokens=5, temperature=0)
    assert [choice.text for choice in texts.choices] == [choice.text for choice in lists.choices]
    assert texts.choices[1].text == alone.choices[0].text
    assert texts.usage.prompt_tokens == sum(map(len, ids))


def test_stop(client: openai.OpenAI) -> None:
    asked = {"model": NAME, "prompt": "the", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[5:7]
    reply = client.completions.create(**asked, stop=[stop]).choices[0]
    assert reply.text == text[: text.index(stop)] and reply.finish_reason == "stop" and reply.stop_reason == stop
    extra = {"include_stop_str_in_output": True}
    kept = client.completions.create(**asked, stop=stop, extra_body=extra).choices[0].text
    assert kept == text[: text.index(stop)] + stop
    chunks = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == reply.text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    asked = {
        "model": NAME,
        "messages": MESSAGES,
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(whole) == 4
    for token in whole:
        values = [top.logprob for top in token.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert token.logprob == values[0] <= 0  # greedy: the chosen one is the best
        assert token.bytes is not None
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in whole])


def test_loglikelihood_as_evaluators_ask_for_it(server: Server) -> None:
    """echo with logprobs and max_tokens 0 scores the prompt; with 1 it also has one generated token."""
    ids = [7, 8, 9, 10]
    asked = {"prompt": ids, "echo": True, "logprobs": 1, "temperature": 0}
    scored = server.http.post("/v1/completions", json={**asked, "max_tokens": 0}).json()["choices"][0]
    table = scored["logprobs"]
    assert len(table["tokens"]) == len(table["token_logprobs"]) == len(ids)
    assert table["token_logprobs"][0] is None and all(value <= 0 for value in table["token_logprobs"][1:])
    assert table["text_offset"] == [sum(map(len, table["tokens"][:i])) for i in range(len(ids))]
    longer = server.http.post("/v1/completions", json={**asked, "max_tokens": 1}).json()["choices"][0]
    assert longer["text"].startswith(scored["text"])
    assert longer["logprobs"]["token_logprobs"][:-1] == pytest.approx([None, *table["token_logprobs"][1:]], nan_ok=True)
    assert len(longer["logprobs"]["tokens"]) == len(ids) + 1
    # The value of a token as a prompt's continuation is its value where it was generated.
    generated = server.http.post(
        "/v1/completions",
        json={"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "return_token_ids": True},
    ).json()["choices"][0]
    again = {**asked, "prompt": ids + generated["token_ids"], "max_tokens": 0}
    table = server.http.post("/v1/completions", json=again).json()["choices"][0]["logprobs"]
    assert table["token_logprobs"][-1] == pytest.approx(generated["logprobs"]["token_logprobs"][0], abs=1e-3)


def test_token_ids_and_prompt_logprobs(server: Server) -> None:
    asked = {"prompt": [7, 8, 9], "max_tokens": 3, "temperature": 0, "return_token_ids": True, "prompt_logprobs": 2}
    choice = server.http.post("/v1/completions", json=asked).json()["choices"][0]
    assert choice["prompt_token_ids"] == [7, 8, 9] and len(choice["token_ids"]) == 3
    assert choice["prompt_logprobs"][0] is None and {"8", "9"} <= set().union(*choice["prompt_logprobs"][1:])
    as_ids = {**asked, "prompt_logprobs": None, "logprobs": 0, "return_tokens_as_token_ids": True}
    tokens = server.http.post("/v1/completions", json=as_ids).json()["choices"][0]["logprobs"]["tokens"]
    assert tokens == [f"token_id:{token}" for token in choice["token_ids"]]


def test_constraints_on_tokens(server: Server) -> None:
    asked = {"prompt": [7, 8, 9], "max_tokens": 8, "temperature": 1, "ignore_eos": True, "return_token_ids": True}

    def tokens(**more: object) -> list[int]:
        return server.http.post("/v1/completions", json={**asked, **more}).json()["choices"][0]["token_ids"]

    assert set(tokens(allowed_token_ids=[20, 21])) <= {20, 21}
    assert tokens(logit_bias={"33": 100}) == [33] * 8
    assert tokens(logit_bias={"33": 100}, stop_token_ids=[33], min_tokens=0) == [33]
    assert 33 not in tokens(logit_bias={"33": -100})


def test_tokenize_and_back(server: Server) -> None:
    text = "the quick brown fox; naïve 🦊"
    reply = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"]) and reply["max_model_len"] == CONTEXT
    assert server.http.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": text}
    chat = server.http.post("/tokenize", json={"messages": MESSAGES}).json()
    usage = server.http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1}).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]


def test_continuing_the_last_message(server: Server) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "the lazy"}]
    asked = {"messages": messages, "continue_final_message": True, "max_tokens": 4, "temperature": 0}
    plain = server.http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    echoed = server.http.post("/v1/chat/completions", json={**asked, "echo": True}).json()
    assert echoed["choices"][0]["message"]["content"] == "the lazy" + plain


def test_template_arguments_are_read_or_refused(server: Server) -> None:
    asked = {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"thinking": True}}
    error = server.http.post("/v1/chat/completions", json=asked).json()["error"]
    assert error["param"] == "chat_template_kwargs.thinking" and "bos_token" in error["hint"]
    asked["chat_template_kwargs"] = {"bos_token": "the quick"}
    longer = server.http.post("/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"]
    plain = server.http.post("/tokenize", json={"messages": MESSAGES}).json()["count"]
    assert longer > plain


def test_cached_tokens_are_told(server: Server) -> None:
    asked = {"prompt": list(range(50, 114)), "max_tokens": 1}
    server.http.post("/v1/completions", json=asked)
    usage = server.http.post("/v1/completions", json=asked).json()["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_cache_hit_tokens"] < 64
    salted = server.http.post("/v1/completions", json={**asked, "cache_salt": "mine"}).json()["usage"]
    assert salted["prompt_cache_hit_tokens"] == 0
    assert eventually(server.blocks_are_free, 5)
    assert server.http.post("/reset_prefix_cache").status_code == 200
    assert server.http.post("/v1/completions", json=asked).json()["usage"]["prompt_cache_hit_tokens"] == 0


def test_the_bytes_of_a_stream(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True,
            "stream_options": {"continuous_usage_stats": True}}  # fmt: skip
    with server.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = reply.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert len({event["id"] for event in events}) == 1 and events[0]["id"].startswith("chatcmpl-")
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 3


def test_server_info_has_the_plan_and_no_secret(server: Server) -> None:
    info = server.http.get("/server_info").json()
    assert (
        info["plan"]["architecture"]["vocab_size"] == VOCAB_SIZE
        and info["plan"]["hash"][:8] in info["system_fingerprint"]
    )
    assert {phase["phase"] for phase in info["startup"]} >= {"weights", "warm-up"}
    assert server.http.get("/version").json()["version"]
    assert set(server.http.get("/openapi.json").json()["paths"]) >= {"/v1/completions", "/v1/models/{id}", "/metrics"}


def test_the_metrics_have_vllms_names_and_buckets(server: Server) -> None:
    server.witness()
    text = server.http.get("/metrics").text
    kinds = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE")}
    for metric in (*ENGINE_METRICS.values(), *REQUEST_METRICS.values(), *HTTP_METRICS.values()):
        for name in (metric.name, *metric.aliases):
            found = name if metric.kind != "counter" else f"{name}_total"
            assert kinds.get(found) == metric.kind, found
            edges = [float(edge) for edge in re.findall(rf'^{re.escape(name)}_bucket{{.*le="([^"]+)"', text, re.M)]
            assert set(edges) >= set(metric.buckets), name
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert server.metric(f"vllm:{name}_count", model_name=NAME, engine="0") > 0
    assert server.metric("vllm:generation_tokens_total") > 0 and server.metric("vllm:iteration_tokens_total_count") > 0
    assert server.metric("vllm:cache_config_info", block_size="16") == 1
    assert server.metric("http_requests_total", handler="/v1/completions", status="2xx", method="POST") > 0


def test_a_prompt_with_many_neighbours_gives_the_same_tokens(server: Server) -> None:
    alone = server.witness()
    asked = {"prompt": [30, 31], "max_tokens": 30, "temperature": 1, "n": 4}
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.http.post, "/v1/completions", json=asked) for _ in range(6)]
        witnesses = [pool.submit(server.witness) for _ in range(6)]
        assert [future.result() for future in witnesses] == [alone] * 6
        assert {future.result().status_code for future in others} == {200}


def test_start_up_says_what_people_look_for(server: Server) -> None:
    log = Path(server.log).read_text()
    wanted = [
        "non-default args:", "Available KV cache memory: ", "GPU KV cache size: ", "weights took", "warm-up took",
        f"Maximum concurrency for {CONTEXT} tokens per request: ", "Application startup complete",
    ]  # fmt: skip
    assert [text for text in wanted if text not in log] == []
