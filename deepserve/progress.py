"""One progress bar with tokens a second, where tqdm is installed."""

from __future__ import annotations

import time
from importlib import import_module, util

from deepserve.outputs import RequestOutput


class Progress:
    """Counts finished prompts; shows input and output tokens a second and the share of the prompts that was cached."""

    def __init__(self, num_prompts: int):
        self.bar = None
        if util.find_spec("tqdm"):
            self.bar = import_module("tqdm").tqdm(total=num_prompts, desc="Processed prompts", dynamic_ncols=True)
        self.start = time.perf_counter()
        self.num_in = self.num_out = self.num_cached = 0

    def add(self, output: RequestOutput) -> None:
        """One more prompt has all its answers."""
        self.num_in += len(output.prompt_token_ids)
        self.num_out += sum(len(answer.token_ids) for answer in output.outputs)
        self.num_cached += output.num_cached_tokens
        if self.bar is not None:
            seconds = max(time.perf_counter() - self.start, 1e-9)
            rates = f"in: {self.num_in / seconds:.1f} tok/s, out: {self.num_out / seconds:.1f} tok/s"
            self.bar.set_postfix_str(f"{rates}, cached: {100 * self.num_cached / max(self.num_in, 1):.0f} %")
            self.bar.update()

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar is not None:
            self.bar.close()
