"""Report of a run: figures as PNG and one self-contained HTML page."""

from .page import write_report
from .summary import matched_damage

__all__ = ["matched_damage", "write_report"]
