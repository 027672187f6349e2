"""llama.cpp: the low-level API of llama-cpp-python, because the high-level one decodes one sequence at a time.

All prompts go in as one batch (llama.cpp cuts it into micro-batches), then all sequences decode one token a step.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from gguf_file import write_gguf

ROWS = 2048  # of one batch: 32 x 64
CONTEXT = 4096  # rows of KV cache over all sequences: 32 x 128, or one of 1,088


class _Engine:
    version = llama_cpp.__version__

    def __init__(self, path: Path, options: dict):
        threads = os.cpu_count()
        self.settings = f"BF16 GGUF, {threads} threads, {options}"
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_load_model_from_file(str(path).encode(), model_params)
        if not self._model:
            raise SystemExit(f"llama.cpp could not load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, ROWS, 512, 32
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        for name, value in options.items():
            setattr(params, name, value)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(ROWS, 0, 1)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        rows = [(token, at, index) for index, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
        ends = [sum(map(len, prompts[: index + 1])) - 1 for index in range(len(prompts))]
        outputs = [[token] for token in self._decode(rows, ends)]
        for step in range(max_tokens - 1):
            rows = [(out[-1], len(prompts[index]) + step, index) for index, out in enumerate(outputs)]
            for out, token in zip(outputs, self._decode(rows, range(len(rows))), strict=True):
                out.append(token)
        return outputs

    def _decode(self, rows: list[tuple[int, int, int]], wanted: Sequence[int]) -> list[int]:
        """Run one batch of (token, position, sequence) and return the greedy token of each wanted row."""
        if len(rows) > ROWS:
            raise SystemExit(f"a batch of {len(rows)} rows; this file makes room for {ROWS}")
        batch = self._batch
        sampled = set(wanted)
        batch.n_tokens = len(rows)
        for index, (token, position, sequence) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = index in sampled
        if llama_cpp.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        return [int(np.argmax(self._logits(index))) for index in wanted]

    def _logits(self, index: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self._vocab,))


def make(model: str, max_model_len: int, **options) -> _Engine:
    path = Path(__file__).parents[2] / ".scratch/checkpoints" / f"{Path(model).name}-bf16.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    newest = max(shard.stat().st_mtime for shard in Path(model).glob("*.safetensors"))
    if not path.exists() or path.stat().st_mtime < newest:
        write_gguf(Path(model), path)
    return _Engine(path, options)
