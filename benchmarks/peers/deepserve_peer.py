"""DeepServe: offline `LLM`, prefix caching off, everything else at its default."""

import itertools
import statistics
import time

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

    def probe(self, prompts: list[list[int]], max_tokens: int) -> float:
        """Milliseconds of a step that are not its forward: median over the steps in which every request decodes."""
        engine, runner, seconds, marks = self._llm.engine, self._llm.engine.executor._runner, [0.0], []
        step, forward, logits = engine.step, runner.forward, runner.logits

        def timed(function):
            def call(*args):
                start = time.perf_counter()
                result = function(*args)
                seconds[0] += time.perf_counter() - start
                return result

            return call

        def marked():
            output = step()
            if output.stats.num_scheduled_tokens == len(prompts):
                marks.append((time.perf_counter(), seconds[0]))
            return output

        engine.step, runner.forward, runner.logits = marked, timed(forward), timed(logits)
        try:
            self.generate(prompts, max_tokens)
        finally:
            engine.step, runner.forward, runner.logits = step, forward, logits
        pairs = itertools.pairwise(marks)
        return 1e3 * statistics.median((wall1 - wall0) - (busy1 - busy0) for (wall0, busy0), (wall1, busy1) in pairs)


def make(model: str, **options) -> _Engine:
    return _Engine(model, options)
