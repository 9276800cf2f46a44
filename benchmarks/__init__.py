"""Benchmarks, importable as ``nsru_bench``; ``bench.py`` is the entry."""
