"""`deepserve plan MODEL`: what would run, why, what it costs in memory, what was refused. Needs no GPU, no weights."""

from __future__ import annotations

import dataclasses
import json
import sys

from deepserve.cli.flags import FlagParser, parse
from deepserve.facts import gather_facts
from deepserve.hardware import TABLE, parse_hardware
from deepserve.plan import make_plan
from deepserve.plan.text import render

EXAMPLES = """examples:
  deepserve plan ./DeepSeek-V2-Lite
  deepserve plan deepseek-v3 --hardware mi300x:8
  deepserve plan ./config.json --hardware h200:8 --max-model-len 32K --json"""


def run(argv: list[str]) -> int:
    """Print the plan; 0 if one exists, whether or not this machine could serve it. AskError where none does."""
    parser = FlagParser(prog="deepserve plan", description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "--hardware", "--gpus", metavar="NAME[:COUNT]", help=f"plan for {', '.join(TABLE)} or cpu, not for this machine"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--verbose", "-v", action="store_true", help="a line with its reason for every op")
    parser.add_argument(
        "--graph", action="store_true", help="trace the model and show what the fusions do (needs torch)"
    )
    config, names = parse(argv, parser)
    hardware = parse_hardware(names.hardware) if names.hardware else None
    if (
        hardware is not None and config.tensor_parallel_size == 1
    ):  # all of them share the model unless -tp says otherwise
        config = dataclasses.replace(config, tensor_parallel_size=hardware.count)
    plan = make_plan(config, gather_facts(config, hardware))
    print(json.dumps(plan.to_dict(), indent=2) if names.json else render(plan, names.verbose))
    if names.graph:
        from deepserve.graph.outline import outline

        print("\n" + outline(plan), file=sys.stderr if names.json else sys.stdout)
    return 0
