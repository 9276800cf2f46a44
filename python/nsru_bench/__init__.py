"""Stands for ``benchmarks/`` where a checkout is on the path and nothing is installed."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
