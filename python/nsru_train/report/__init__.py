"""Report of a run: pictures as PNG and one self-contained HTML page."""

from .html import write_report
from .summary import matched_damage

__all__ = ["matched_damage", "write_report"]
