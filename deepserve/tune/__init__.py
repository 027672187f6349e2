"""The search of tuned tables: which tile beats a launcher's heuristic, for which shape, on which GPU."""
