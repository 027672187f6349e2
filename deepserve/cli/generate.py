"""`deepserve generate MODEL -p TEXT`: continue texts offline. The texts go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from deepserve.cli.flags import FlagParser, parse
from deepserve.errors import AskError

_SAMPLING = "n temperature top_p top_k min_p repetition_penalty min_tokens logprobs stop ignore_eos".split()


def run(argv: list[str]) -> int:
    """Continue every prompt and print the continuations."""
    config, asked = parse(argv, _parser())
    prompts = _prompts(asked)
    if not config.model:
        raise AskError("is missing", field="model", hint="give the directory of a checkpoint")
    from deepserve import LLM, SamplingParams, log

    log.setup(config.log_level)
    given = {name: value for name in (*_SAMPLING, "max_tokens") if (value := getattr(asked, name)) is not None}
    SamplingParams(**given)  # refused, if at all, before the model is loaded
    llm = LLM(**config.changed())
    sampling = SamplingParams(**{**llm.plan.default_sampling, **given})
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=len(prompts) > 1)
    seconds = time.perf_counter() - start
    for output in outputs:
        for choice in output.outputs:
            print(_json_line(output, choice) if asked.json else choice.text, flush=True)
    count = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def _json_line(output: Any, choice: Any) -> str:
    fields = {"prompt": output.prompt, "index": choice.index, "text": choice.text, "token_ids": list(choice.token_ids)}
    return json.dumps({**fields, "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason})


def _prompts(asked: argparse.Namespace) -> list[str]:
    prompts = list(asked.prompt or ())
    for name in asked.prompt_file or ():
        try:
            prompts.append(sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise AskError(f"{name} cannot be read: {error}", field="prompt_file") from None
    if not prompts:
        raise AskError("is missing", field="prompt", hint='-p "Once upon a time", or --prompt-file FILE')
    return prompts


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(prog="deepserve generate", description="Continue texts with the offline engine.")
    what = parser.add_argument_group("what to generate (else the checkpoint's generation_config.json, else vLLM's)")
    what.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="once or several times")
    what.add_argument("--prompt-file", action="append", metavar="FILE", help="- is stdin")
    what.add_argument("--max-tokens", type=int, default=128, metavar="N", help="at most so many (default: 128)")
    what.add_argument("-n", type=int, metavar="N", help="continuations of each prompt")
    for name in ("temperature", "top-p", "min-p", "repetition-penalty"):
        what.add_argument(f"--{name}", type=float, metavar="X")
    for name in ("top-k", "min-tokens", "logprobs"):
        what.add_argument(f"--{name}", type=int, metavar="N")
    what.add_argument("--stop", action="append", metavar="TEXT", help="end before this text")
    what.add_argument("--ignore-eos", action="store_true", default=None, help="go on after the end-of-text token")
    what.add_argument("--json", action="store_true", help="one JSON object a line, with token ids")
    return parser
