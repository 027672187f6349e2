"""From what was asked and what is true to what is done: `make_plan(config, facts) -> Plan`. Pure, and without torch."""

from deepserve.plan.make import make_plan
from deepserve.plan.plan import Blocker, Choice, Plan

__all__ = ["make_plan", "Plan", "Choice", "Blocker"]
