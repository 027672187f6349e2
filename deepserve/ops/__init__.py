"""One room an op: spec.py defines it (reference), other files speed it up. See op.py for what an op is."""
