"""Which requests run in a step and how many of their tokens: plain Python on counts, no torch."""
