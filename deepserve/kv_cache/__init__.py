"""Block accounting and prefix cache (no torch), and the tensors they account for (tensors.py)."""
