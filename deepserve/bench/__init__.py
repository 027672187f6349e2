"""Measuring: load against a server (serve), and the offline engine (throughput, latency). Measures are defined once."""
