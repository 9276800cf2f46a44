"""Benchmarks; ``bench.py`` is the entry, ``nsru bench`` runs it."""
