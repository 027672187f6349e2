"""What is measured, by vLLM's names, labels and buckets, so that dashboards made for vLLM show data; what vLLM does not
measure is called deepserve:*. No torch.

Times are in seconds. Every metric has the labels model_name and engine, then its own.
"""

from __future__ import annotations

from dataclasses import dataclass

_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_LENGTHS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: name without the ending that Prometheus adds, kind, sentence, and names it also goes by."""

    name: str
    kind: str  # gauge, counter or histogram
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    aliases: tuple[str, ...] = ()


# Read from the engine's last snapshot (messages.EngineStats) whenever somebody asks.
ENGINE_METRICS = {
    "num_running": Metric("vllm:num_requests_running", "gauge", "Requests in the running batch."),
    "num_waiting": Metric("vllm:num_requests_waiting", "gauge", "Requests that wait to be scheduled."),
    "kv_cache_usage": Metric(
        "vllm:kv_cache_usage_perc", "gauge", "Share of the KV cache in use, 0 to 1.",
        aliases=("vllm:gpu_cache_usage_perc",),
    ),
    "num_prefix_queries": Metric("vllm:prefix_cache_queries", "counter", "Prompt tokens looked up in that cache."),
    "num_prefix_hits": Metric("vllm:prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache."),
    "num_preemptions": Metric("vllm:num_preemptions", "counter", "Requests that lost their blocks and recompute."),
    "drafts.num_drafts": Metric("vllm:spec_decode_num_drafts", "counter", "Rows of guessed tokens that were verified."),
    "drafts.num_draft_tokens": Metric("vllm:spec_decode_num_draft_tokens", "counter", "Guessed tokens in them."),
    "drafts.num_accepted_tokens": Metric("vllm:spec_decode_num_accepted_tokens", "counter", "Those that were right."),
    "drafts.num_accepted_by_position": Metric(
        "vllm:spec_decode_num_accepted_tokens_per_pos", "counter", "The same by position in their row, from 0.",
        ("position",),
    ),
    "num_compiled_kernels": Metric(
        "deepserve:kernels_compiled_while_serving", "counter", "Triton kernels that a step had to wait for."
    ),
}  # fmt: skip

# Counted and observed as tokens and requests go by.
REQUEST_METRICS = {
    "prompt_tokens": Metric("vllm:prompt_tokens", "counter", "Prompt tokens of requests that have begun to answer."),
    "cached_tokens": Metric("vllm:prompt_tokens_cached", "counter", "Those of them found in the prefix cache."),
    "generation_tokens": Metric("vllm:generation_tokens", "counter", "Generated tokens."),
    "success": Metric("vllm:request_success", "counter", "Requests that have ended.", ("finished_reason",)),
    "step_tokens": Metric("vllm:iteration_tokens_total", "histogram", "Tokens in a step.", (), _STEP_TOKENS),
    "ttft": Metric("vllm:time_to_first_token_seconds", "histogram", "Arrival to first token.", (), _TTFT_S),
    "itl": Metric(
        "vllm:inter_token_latency_seconds", "histogram", "Token to token.", (), _ITL_S,
        ("vllm:time_per_output_token_seconds",),
    ),
    "tpot": Metric(
        "vllm:request_time_per_output_token_seconds", "histogram", "First to last token, a token.", (), _ITL_S
    ),
    "e2e": Metric("vllm:e2e_request_latency_seconds", "histogram", "Arrival to last token.", (), _REQUEST_S),
    "queue": Metric("vllm:request_queue_time_seconds", "histogram", "Arrival to first step.", (), _REQUEST_S),
    "prefill": Metric("vllm:request_prefill_time_seconds", "histogram", "First step to first token.", (), _REQUEST_S),
    "decode": Metric("vllm:request_decode_time_seconds", "histogram", "First to last token.", (), _REQUEST_S),
    "inference": Metric("vllm:request_inference_time_seconds", "histogram", "First step to last one.", (), _REQUEST_S),
    "prompt_length": Metric("vllm:request_prompt_tokens", "histogram", "Prompt tokens of a request.", (), _LENGTHS),
    "output_length": Metric("vllm:request_generation_tokens", "histogram", "Tokens it generated.", (), _LENGTHS),
    "params_n": Metric("vllm:request_params_n", "histogram", "The n of a request.", (), (1, 2, 5, 10, 20)),
    "params_max_tokens": Metric("vllm:request_params_max_tokens", "histogram", "Its max_tokens.", (), _LENGTHS),
}  # fmt: skip

# What the HTTP layer counts. No label says which model.
HTTP_METRICS = {
    "http_requests": Metric(
        "http_requests", "counter", "Requests by route, method and class of status.", ("handler", "status", "method")
    ),
    "http_seconds": Metric(
        "http_request_duration_seconds", "histogram", "Seconds to the end of a response.", ("handler", "method"),
        (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0),
    ),
}  # fmt: skip
