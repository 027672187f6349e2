"""Command lines: those of other engines as people type them, every spelling of a switch, files, and what is refused."""

import shlex
import subprocess
import sys

import pytest

from deepserve.cli.flags import FlagParser, _as_toml, config_from_args, parse
from deepserve.config import Config, field_types, knobs, optional_of
from deepserve.errors import AskError
from deepserve.spellings import NO_EFFECT, REFUSED, config_of, flag


def config(line: str) -> Config:
    return config_from_args(shlex.split(line))


def changed(line: str) -> dict:
    return config(line).changed()


# Command lines of published recipes and benchmark scripts (their variables filled in), and what must come of them.
RECIPES = [
    (  # vLLM recipes, DeepSeek-R1, TP8 + EP
        "deepseek-ai/DeepSeek-R1-0528 --trust-remote-code --tensor-parallel-size 8 --enable-expert-parallel",
        {"model": "deepseek-ai/DeepSeek-R1-0528", "tensor_parallel_size": 8},
    ),
    (  # the same with tools and reasoning
        "deepseek-ai/DeepSeek-R1 --trust-remote-code -tp 8 -ep --enable-auto-tool-choice "
        "--tool-call-parser deepseek_v3 --reasoning-parser deepseek_r1",
        {"model": "deepseek-ai/DeepSeek-R1", "tensor_parallel_size": 8},
    ),
    (  # vLLM recipes, DeepSeek-R1 MXFP4 variant
        "m --trust-remote-code --tensor-parallel-size 8 --no-enable-expert-parallel --kv-cache-dtype fp8",
        {"model": "m", "tensor_parallel_size": 8, "kv_cache_dtype": "fp8"},
    ),
    (  # vLLM recipes, DeepSeek-V3.1
        "deepseek-ai/DeepSeek-V3.1 --enable-expert-parallel --tensor-parallel-size 8 --served-model-name ds31",
        {"model": "deepseek-ai/DeepSeek-V3.1", "tensor_parallel_size": 8, "served_model_name": ("ds31",)},
    ),
    (  # InferenceX, R1 on MI355X with ATOM
        "--model m --server-port 8888 -tp 8 --kv_cache_dtype fp8 --max-model-len 10240 "
        "--enable-expert-parallel --block-size 16",
        {
            "model": "m", "port": 8888, "tensor_parallel_size": 8, "kv_cache_dtype": "fp8", "max_model_len": 10240,
            "block_size": 16,
        },
    ),
    (  # InferenceX, V4 on B200 with vLLM
        "m --host 0.0.0.0 --port 8888 --trust-remote-code --kv-cache-dtype fp8 --block-size 256 "
        "--no-enable-prefix-caching --tensor-parallel-size 8 --data-parallel-size 1 --moe-backend deep_gemm_mega_moe "
        "--prefill-schedule-interval 4 "
        """--compilation-config '{"cudagraph_mode":"FULL_AND_PIECEWISE","custom_ops":["all"]}' """
        "--attention_config.use_fp4_indexer_cache=True --tokenizer-mode deepseek_v4 --tool-call-parser deepseek_v4 "
        "--enable-auto-tool-choice --reasoning-parser deepseek_v4 --max-cudagraph-capture-size 2048 "
        "--max-model-len 2048 --max-num-batched-tokens 8192",
        {
            "model": "m", "host": "0.0.0.0", "port": 8888, "kv_cache_dtype": "fp8", "block_size": 256,
            "enable_prefix_caching": False, "tensor_parallel_size": 8, "max_model_len": 2048,
            "max_num_batched_tokens": 8192, "cudagraph_mode": "FULL_AND_PIECEWISE", "max_cudagraph_capture_size": 2048,
        },
    ),
    (  # InferenceX, R1 on MI300X with SGLang, without the two flags that mean something else here
        "--model-path=m --host=0.0.0.0 --port=8888 --trust-remote-code --tensor-parallel-size=8 "
        "--cuda-graph-max-bs=128 --num-continuous-decode-steps=4 --max-prefill-tokens=131072 --kv-cache-dtype fp8_e4m3 "
        "--attention-backend aiter --disable-radix-cache --context-length 9416",
        {
            "model": "m", "host": "0.0.0.0", "port": 8888, "tensor_parallel_size": 8, "kv_cache_dtype": "fp8_e4m3",
            "enable_prefix_caching": False, "max_model_len": 9416,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), RECIPES)
def test_published_command_lines_parse(line, expected, capsys) -> None:
    expected = {name: value for name, value in expected.items() if value != getattr(Config(), name)}
    assert changed(line) == expected
    said = capsys.readouterr().err
    for name in NO_EFFECT:
        assert (f"accepted, no effect: {name} (" in said) == (f" {name} " in f"{line} ".replace("=", " ")
            or (name == "--enable-expert-parallel" and " -ep " in line)
            or (name == "--attention-config" and "--attention_config." in line))  # fmt: skip


@pytest.mark.parametrize(("line", "field", "said"), [
    ("m --mem-fraction-static 0.8", "--mem-fraction-static", "--gpu-memory-utilization"),
    ("m --chunked-prefill-size=8192", "--chunked-prefill-size", "--max-num-batched-tokens"),
    ("m -c 4096", "-c", "--max-model-len"), ("-m x", "-m", "--model"), ("m -ngl 99", "-ngl", "--device"),
    ("m --max-modle-len 5", "--max-modle-len", "--max-model-len"),
    ("m --tensor_paralel_size 5", "--tensor_paralel_size", "--tensor"),
    ("m --enforce-egaer", "--enforce-egaer", "--cudagraph-mode"), ("m --zzzzzzzz", "--zzzzzzzz", "--help"),
    ("m -pp 2", "--pipeline-parallel-size", "not built"), ("m -dp=8", "--data-parallel-size", "not built"),
    ("m -sc.method eagle", "speculative_config.method", "say mtp"), ("m -sc mtp", "--speculative-config", "JSON"),
    ("m --spec-method ngrm", "speculative_config.method", "mtp, ngram"),
    ("m --spec-tokens 9", "speculative_config.num_speculative_tokens", "1 to 8"),
    ("m -sc.num_speculative_tokens 1.5", "speculative_config.num_speculative_tokens", "1 to 8"),
    ("m -sc.prompt_lookup_max 3", "speculative_config.prompt_lookup_max", "means nothing to mtp"),
    ("m -sc.tokens 3", "speculative_config.tokens", "num_speculative_tokens"),
    ("""m -sc '{"method":"ngram","prompt_lookup_min":4,"prompt_lookup_max":3}'""", "speculative_conf", "above"),
    ("m --speculative-eagle-topk 4", "--speculative-eagle-topk", "tree"),
    ("m --speculative-num-draft-tokens 4", "--speculative-num-draft-tokens", "one less"),
    ("m --enable-dp-attention", "--enable-dp-attention", "not built"),
    ("m --port http", "", "integer"), ("m --max-model-len 8q", "", "8K"), ("m --dtype int8", "dtype", "bfloat16"),
    ("m --kernels '{x'", "--kernels", "JSON"), ("m --model n", "model", "twice"), ("m extra", "", "extra"),
    ("m --gpu-memory-utilization 2", "gpu_memory_utilization", "1.0"), ("m --port", "", "expected one argument"),
])  # fmt: skip
def test_what_is_wrong_is_refused(line, field, said) -> None:
    with pytest.raises(AskError) as caught:
        config(line)
    assert (caught.value.field or "").startswith(field)
    assert said in str(caught.value)


@pytest.mark.parametrize("value", ["1", "2", "x"])
def test_a_refused_flag_may_ask_for_nothing(value) -> None:
    if value == "1":
        assert changed("m --pipeline-parallel-size 1 --nnodes=1 -dcp 1") == {"model": "m"}
    else:
        with pytest.raises(AskError):
            config(f"m --pipeline-parallel-size {value}")


BOOLEANS = [name for name, kind in field_types().items() if optional_of(kind)[0] is bool]


@pytest.mark.parametrize("name", BOOLEANS)
def test_every_spelling_of_a_switch(name) -> None:
    own = flag(name)
    stem = own.removeprefix("--enable-").removeprefix("--disable-").removeprefix("--")
    positive = own != f"--disable-{stem}"
    for spelled, value in [(f"--enable-{stem}", True), (f"--disable-{stem}", False), (f"--no-enable-{stem}", False),
                           (f"--no-{stem}", False), (f"--{stem}", True), (f"--no-disable-{stem}", True)]:  # fmt: skip
        for text in (spelled, "--" + spelled[2:].replace("-", "_")):
            assert getattr(config(f"m {text}"), name) is (value if positive else not value), text


def test_integers_may_have_units() -> None:
    for text, value in [("8192", 8192), ("8k", 8000), ("8K", 8192), ("1.5k", 1500), ("1M", 2**20), ("2g", 2 * 10**9)]:
        assert config(f"m --kv-cache-memory-bytes {text}").kv_cache_memory_bytes == value
    assert config("m --kv-cache-memory-bytes 3GiB").kv_cache_memory_bytes == 3 * 2**30
    for text in ("auto", "-1"):
        assert config(f"m --max-model-len {text}").max_model_len is None


def test_lists_and_kernels() -> None:
    made = config("m --on a,b --on c --off=d --api-key k1 k2 --served-model-name x y --kernels.linear reference "
                  """--kernels '{"rope": "triton"}' --kernels add=reference""")  # fmt: skip
    assert made.on == ("a", "b", "c")
    assert made.off == ("d",)
    assert made.api_key == ("k1", "k2")
    assert made.served_model_name == ("x", "y")
    assert made.kernels == {"linear": "reference", "rope": "triton", "add": "reference"}


MTP2 = {"method": "mtp", "num_speculative_tokens": 2}


@pytest.mark.parametrize(("line", "asked"), [
    ("""--speculative-config '{"method": "mtp", "num_speculative_tokens": 2}'""", MTP2),
    ("""-sc='{"num_speculative_tokens":2,"method":"deepseek_mtp"}'""", MTP2),
    ("--speculative-config.method mtp --speculative_config.num_speculative_tokens=2", MTP2),
    ("--spec-method mtp --spec-tokens 2", MTP2), ("--method mtp --num-speculative-tokens 2", MTP2),
    ("--speculative-algorithm NEXTN --speculative-num-steps 2 --speculative-eagle-topk 1", MTP2), ("-sc '{}'", None),
    ("--spec-method ngram", {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2,
                             "prompt_lookup_max": 5}),
    ("""-sc '{"method": "ngram", "prompt_lookup_max": 1}'""", {"method": "ngram", "num_speculative_tokens": 4,
                                                               "prompt_lookup_min": 1, "prompt_lookup_max": 1}),
])  # fmt: skip
def test_speculation_in_every_spelling(line, asked) -> None:
    assert config(f"m {line}").speculative_config == asked


def test_speculation_through_the_keyword_door() -> None:
    for fields in ({"speculative_config": MTP2}, {"spec_method": "mtp", "num_speculative_tokens": 2},
                   {"speculative_config": {"method": "mtp"}, "spec_tokens": 2}):  # fmt: skip
        assert config_of(model="m", **fields)[0].speculative_config == MTP2
    assert config_of(model="m", speculative_config=None, spec_method=None)[0].speculative_config is None


GRAPHS = {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": (1, 2, 4), "max_cudagraph_capture_size": 4}
EAGER = {"cudagraph_mode": "NONE"}


@pytest.mark.parametrize(("line", "asked"), [
    ("--cudagraph-mode piecewise --cudagraph-capture-sizes 1 2 4 --max-cudagraph-capture-size 4", GRAPHS),
    ("""--compilation-config '{"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4],
        "max_cudagraph_capture_size": 4}'""", GRAPHS),
    ("-cc.cudagraph_mode=PIECEWISE -cc.cudagraph_capture_sizes=[1,2,4] -cc.max_cudagraph_capture_size 4", GRAPHS),
    ("--compilation_config.cudagraph_mode Full --cudagraph_capture_sizes 8", {
        "cudagraph_mode": "FULL", "cudagraph_capture_sizes": (8,)}),
    ("-cc '{}'", {}), ("-cc 3 -O2", {}), ("--no-enforce-eager", {}), ("--enforce-eager", EAGER),
    ("--enforce_eager", EAGER), ("--no-cuda-graphs", EAGER), ("--disable-cuda-graph", EAGER),
    ("""-cc '{"use_cudagraph": false}'""", EAGER), ("-cc.full_cuda_graph=true", {"cudagraph_mode": "FULL"}),
    ("--cuda-graphs", {"cudagraph_mode": "FULL_AND_PIECEWISE"}),
])  # fmt: skip
def test_graphs_in_every_spelling(line, asked, tmp_path) -> None:
    assert changed(f"m {line}") == {"model": "m", **asked}
    made = config(f"m {line}")
    (tmp_path / "printed.toml").write_text(_as_toml(made))
    assert config(f"--config {tmp_path / 'printed.toml'}") == made


@pytest.mark.parametrize(("fields", "asked"), [
    ({"compilation_config": {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4],
                             "max_cudagraph_capture_size": 4}}, GRAPHS),
    ({"compilation_config": 3}, {}), ({"compilation_config": None}, {}), ({"enforce_eager": True}, EAGER),
    ({"enforce_eager": False}, {}), ({"cuda_graphs": False}, EAGER), ({"cuda_graphs": None}, {}),
    ({"cuda_graphs": True}, {"cudagraph_mode": "FULL_AND_PIECEWISE"}), ({"disable_cuda_graph": True}, EAGER),
    ({"enforce_eager": True, "compilation_config": {"cudagraph_mode": "NONE", "level": 0}}, EAGER),
    ({"cudagraph_mode": "piecewise", "cudagraph_capture_sizes": [1, 2, 4], "max_cudagraph_capture_size": 4}, GRAPHS),
])  # fmt: skip
def test_graphs_through_the_keyword_door(fields, asked) -> None:
    assert config_of(model="m", **fields)[0].changed() == {"model": "m", **asked}


@pytest.mark.parametrize(("line", "field", "said"), [
    ("--cudagraph-mode HALF", "cudagraph_mode", "one of NONE, PIECEWISE, FULL,"),
    ("--cudagraph-capture-sizes 0 2", "cudagraph_capture_sizes", "at least 1"),
    ("--cudagraph-capture-sizes x", "", "no integer"), ("--enforce-eager=1", "--enforce-eager", "takes no value"),
    ("-cc '{x'", "compilation_config", "JSON"), ("-cc.cudagraph_mod FULL", "compilation_config", "cudagraph_mode"),
    ("-cc.cudagraph_capture_sizes=many", "cudagraph_capture_sizes", "expected integers"),
])  # fmt: skip
def test_graphs_that_nobody_knows_are_refused(line, field, said) -> None:
    with pytest.raises(AskError) as caught:
        config(f"m {line}")
    assert (caught.value.field or "").startswith(field) and said in str(caught.value)


def test_what_a_compilation_config_says_to_a_compiler_is_told_to_have_no_effect(capsys) -> None:
    config("""m -cc '{"custom_ops": ["all"], "pass_config": {"fuse": 1}}' -cc.inductor_compile_config.x=1""")
    said = capsys.readouterr().err.splitlines()
    names = ("custom_ops", "pass_config", "inductor_compile_config.x")
    assert said == [f"accepted, no effect: compilation_config.{name} (there is no compiler)" for name in names]
    with pytest.raises(AskError, match="say it once"):
        config_of(model="m", enforce_eager=True, compilation_config={"cudagraph_mode": "FULL"})


TOML = 'model = "m"\nmax-model-len = 4096\nenable_prefix_caching = false\non = ["a"]\ntrust-remote-code = true\n'
YAML = "model: m\nmax-model-len: 4096\nno-enable-prefix-caching: true\non: [a]\ntrust_remote_code: true\n"
JSON = '{"model": "m", "max_model_len": 4096, "enable-prefix-caching": false, "on": ["a"], "trust-remote-code": true}'


@pytest.mark.parametrize(("suffix", "text"), [(".toml", TOML), (".yaml", YAML), (".json", JSON)])
def test_a_file_is_a_command_line(tmp_path, suffix, text) -> None:
    file = tmp_path / f"recipe{suffix}"
    file.write_text(text)
    made = config(f"--config {file} --max-model-len 8K")
    assert made.changed() == {"model": "m", "max_model_len": 8192, "enable_prefix_caching": False, "on": ("a",)}
    assert config(f"n --config {file}").model == "n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("a.toml", "x = ", "a.toml"), ("a.yaml", "a: [", "a.yaml"), ("a.yaml", "- 1", "by name"),
     ("a.toml", "pport = 1", "port"), ("none.toml", None, "cannot be read")],
)  # fmt: skip
def test_a_wrong_file_is_refused(tmp_path, name, text, said) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(AskError, match=said):
        config(f"m --config {tmp_path / name}")


def test_print_config_prints_what_config_reads(tmp_path, capsys) -> None:
    line = "m --api-key a 'b \"c' --kernels.linear reference --max-model-len 5 --off x,y -tp 2 --spec-tokens 3"
    with pytest.raises(SystemExit) as caught:
        config(line + " --print-config")
    assert caught.value.code == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    assert config(f"--config {tmp_path / 'printed.toml'}") == config(line)


def test_a_verb_has_flags_of_its_own() -> None:
    parser = FlagParser(prog="deepserve x")
    parser.add_argument("--input-len", type=int, default=3)
    made, names = parse(["m", "--input_len", "9", "--seed", "4"], parser)
    assert (made.seed, names.input_len) == (4, 9)


def test_help_shows_ours_and_hides_the_foreign(capsys) -> None:
    with pytest.raises(SystemExit):
        config("--help")
    text = capsys.readouterr().out
    assert all(flag(name) in text for name in knobs() if name != "model")
    assert not any(f"{name} " in text for name in (*NO_EFFECT, *REFUSED))


def test_the_verb_prints_errors_and_ends_with_2() -> None:
    command = [sys.executable, "-m", "deepserve.cli.main", "plan"]
    done = subprocess.run([*command, "no-such-model"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr
