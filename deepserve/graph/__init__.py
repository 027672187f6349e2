"""A model as one straight line of ops: traced, rewritten with fused ops, bound to kernels."""
