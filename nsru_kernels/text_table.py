"""Tables in plain text."""

from collections.abc import Iterable, Sequence


def align_columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with two spaces between columns: the first column to the left, others to the right.

    Examples:
        >>> print("\\n".join(align_columns([("layer", "rank"), ("q_proj", "8")])))
        layer   rank
        q_proj     8
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
