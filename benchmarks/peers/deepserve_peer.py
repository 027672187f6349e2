"""DeepServe: offline `LLM`, prefix caching off, everything else at its default."""

import torch

import deepserve
from deepserve import LLM, SamplingParams


class _Engine:
    version = deepserve.__version__

    def __init__(self, model: str, options: dict):
        self.settings = f"bf16, {torch.get_num_threads()} threads, torch {torch.__version__}, {options}"
        self._llm = LLM(model=model, dtype="bfloat16", max_num_seqs=64, enable_prefix_caching=False, **options)

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(output.outputs[0].token_ids) for output in self._llm.generate(asked, sampling, use_tqdm=False)]


def make(model: str, **options) -> _Engine:
    return _Engine(model, options)
