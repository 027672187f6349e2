"""The command line: bad input ends with status 2 and one clear error; the load generator and the offline verbs."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.server import Server, free_port, serving
from tests.tiny import write_checkpoint


def deepserve(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "deepserve.cli.main", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, input=stdin)


def refusal(*argv: str) -> str:
    """What a command that must be refused says: status 2, one error with a hint or a field, and no stack."""
    result = deepserve(*argv)
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr and "error: " in result.stderr, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint("llama", tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(model, tmp_path_factory.mktemp("log"), "--served-model-name", "tiny") as server:
        yield server


@pytest.fixture
def broken(model, tmp_path):
    """A copy of the checkpoint to break."""
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_verbs() -> None:
    assert "serve" in deepserve("--help").stdout and deepserve().returncode == 0
    assert "serve" in refusal("serv")
    for verb in ("serve", "generate", "chat", "doctor", "bench", "plan"):
        result = deepserve(verb, "--help")
        assert result.returncode == 0 and "usage: deepserve" in result.stdout, verb
    for kind in ("serve", "throughput", "latency"):
        assert "usage: deepserve bench" in deepserve("bench", kind, "--help").stdout


def test_help_comes_without_torch_and_without_the_server() -> None:
    code = (
        "import sys\nfor name in ('torch', 'starlette', 'uvicorn', 'zmq'): sys.modules[name] = None\n"
        "from deepserve.cli.main import main\nsys.exit(main(['{}', '--help']))"
    )
    for verb in ("serve", "chat", "generate", "bench", "doctor"):
        result = subprocess.run([sys.executable, "-c", code.format(verb)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_a_model_that_is_none(tmp_path) -> None:
    assert "model" in refusal("serve")
    assert "no-such-model" in refusal("serve", str(tmp_path / "no-such-model"))
    assert "config.json" in refusal("serve", str(tmp_path))


def test_broken_json(broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": ')
    assert "config.json" in refusal("serve", str(broken))


def test_a_broken_tokenizer(broken: Path) -> None:
    (broken / "tokenizer.json").write_text('{"model": ')
    assert "tokenizer.json" in refusal("serve", str(broken))


def test_a_truncated_shard(broken: Path) -> None:
    shard = broken / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert "model.safetensors" in refusal("serve", str(broken), "--port", str(free_port()))


def test_a_pickle_checkpoint(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert "pickled" in refusal("serve", str(broken), "--port", str(free_port()))


def test_a_missing_tensor(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    assert "model.layers.1.mlp.down_proj" in refusal("serve", str(broken), "--port", str(free_port()))


def test_a_port_in_use_is_told_before_loading(model) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        said = refusal("serve", str(model), "--port", str(port))
    assert f"127.0.0.1:{port}" in said and "--port" in said and "weights" not in said


def test_impossible_flags(model) -> None:
    assert "--max-num-seqs" in refusal("serve", str(model), "--max-num-seq", "4")
    assert "max_num_seqs" in refusal("serve", str(model), "--max-num-seqs", "0")
    assert "port" in refusal("serve", str(model), "--port", "70000")
    assert "host" in refusal("serve", str(model), "--host", "256.0.0.1")
    assert "error: host: " in refusal("serve", str(model), "--host", "192.0.2.1", "--port", str(free_port()))
    assert "model: is missing" in refusal("generate", "-p", "x")
    assert "weights" not in refusal("generate", str(model), "-p", "x", "--temperature", "-1")  # said before loading
    assert "max_model_len" in refusal("serve", str(model), "--max-model-len", "1000000")


def test_generate(model) -> None:
    result = deepserve("generate", str(model), "-p", "the quick", "--max-tokens", "4", "--temperature", "0", "--json")
    assert result.returncode == 0, result.stderr
    reply = json.loads(result.stdout)
    assert reply["prompt"] == "the quick" and len(reply["token_ids"]) <= 4
    assert "prompt" in refusal("generate", str(model))
    assert "temperature" in refusal("generate", str(model), "-p", "a", "--temperature", "-1")


def test_chat_with_a_running_server(server: Server) -> None:
    result = deepserve("chat", "--url", server.url, "-q", "a dog", "--max-tokens", "5", "--stats")
    assert result.returncode == 0 and "TTFT" in result.stderr, result.stderr
    talk = deepserve("chat", "--url", server.url + "/v1", "--max-tokens", "3", stdin="a dog\n/reset\nthe fox\n/exit\n")
    assert talk.returncode == 0 and talk.stdout.count("> ") == 4
    assert "url" in refusal("chat", "--url", f"http://127.0.0.1:{free_port()}", "-q", "a")
    assert "model" in refusal("chat")


def test_chat_with_a_server_of_its_own(model) -> None:
    result = deepserve("chat", str(model), "-q", "a dog", "--max-tokens", "5")
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


def test_doctor(model) -> None:
    report = json.loads(deepserve("doctor", str(model), "--json").stdout)
    assert report["packages"]["torch"] and report["plan"]["hash"] and report["cpu"]["cores"] > 0
    sick = deepserve("doctor", "no-such-model")
    assert sick.returncode == 1 and "no-such-model" in sick.stdout


RUN_KEYS = (
    "date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency "
    "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput "
    "output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests prefix_cache_hit_rate "
    "merge_factor "
    "server_fingerprint plan realised_lengths input_lens output_lens ttfts itls latencies start_times queue_times "
    "generated_texts errors"
).split()


def test_bench_serve_has_vllms_keys_and_layout(server: Server, tmp_path) -> None:
    result = deepserve(
        "bench", "serve", "--base-url", server.url, "--num-prompts", "12", "--random-input-len", "20",
        "--random-output-len", "8", "--max-concurrency", "4", "--ignore-eos", "--goodput", "ttft:60000",
        "--metric-percentiles", "50,99", "--save-result", "--save-detailed", "--result-dir", str(tmp_path),
        "--metadata", "commit=abc", "--label", "x",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr + result.stdout
    lines = result.stdout.splitlines()
    assert lines[0] == " Serving Benchmark Result ".center(50, "=")
    assert f"{'Successful requests:':<40} {12:<10}" in lines
    for title in ("Time to First Token", "Time per Output Token (excl. 1st token)", "Inter-token Latency"):
        assert title.center(50, "-") in lines
    (file,) = tmp_path.glob("x-infqps-concurrency4-tiny-*.json")
    saved = json.loads(file.read_text())
    assert set(RUN_KEYS) <= set(saved)
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert {f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p50", "p99")} <= set(saved)
        assert saved[f"mean_{name}_ms"] > 0 and math.isfinite(saved[f"p99_{name}_ms"])
    assert saved["input_lens"] == [20] * 12 and saved["output_lens"] == [8] * 12
    assert saved["total_output_tokens"] == 96 and saved["request_rate"] == "inf" and saved["commit"] == "abc"
    assert saved["server_fingerprint"].startswith("deepserve-") and 0 < saved["merge_factor"] <= 8
    assert saved["request_goodput"] == pytest.approx(saved["request_throughput"])
    assert saved["max_concurrent_requests"] <= 4 and saved["prefix_cache_hit_rate"] < 0.05


def test_bench_serve_with_a_rate_a_chat_and_files(server: Server, tmp_path) -> None:
    custom = tmp_path / "prompts.jsonl"
    custom.write_text('{"prompt": "the quick brown fox", "output_tokens": 4}\n{"prompt": "a dog"}\n')
    share = tmp_path / "share.json"
    turns = [{"value": "the quick brown fox jumps"}, {"value": "over the lazy dog again"}]
    share.write_text(json.dumps([{"conversations": turns}]))
    common = ("bench", "serve", "--base-url", server.url, "--num-prompts", "5", "--num-warmups", "1")
    for more in (
        ("--dataset-name", "custom", "--dataset-path", str(custom), "--request-rate", "50", "--burstiness", "0.5"),
        ("--dataset-name", "sharegpt", "--dataset-path", str(share)),
        ("--backend", "openai-chat", "--random-input-len", "9", "--random-output-len", "4", "--length-dist", "low:0.5"),
    ):
        result = deepserve(*common, *more, "--append-result", "--result-filename", str(tmp_path / "all.jsonl"))
        assert result.returncode == 0, result.stderr + result.stdout
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [row["completed"] for row in rows] == [5, 5, 5] and rows[0]["request_rate"] == 50
    assert "errors" not in rows[0] and len({row["seed"] for row in rows}) == 3
    assert "dataset_path" in refusal(*common, "--dataset-name", "custom", "--dataset-path", "none")
    assert "no model list" in refusal("bench", "serve", "--port", str(free_port()))


def test_bench_offline(model, tmp_path) -> None:
    file = tmp_path / "throughput.json"
    lengths = ("--input-len", "16", "--output-len", "4", "--output-json", str(file))
    result = deepserve("bench", "throughput", str(model), "--num-prompts", "6", *lengths)
    assert result.returncode == 0 and result.stdout.startswith("Throughput: "), result.stderr
    saved = json.loads(file.read_text())
    assert saved["total_num_tokens"] == 6 * 20 and saved["num_requests"] == 6
    result = deepserve(
        "bench", "latency", str(model), "--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "1", *lengths
    )
    saved = json.loads(file.read_text())
    assert (
        result.returncode == 0
        and len(saved["latencies"]) == 3
        and set(saved["percentiles"]) == set("10 25 50 75 90 99".split())
    )
