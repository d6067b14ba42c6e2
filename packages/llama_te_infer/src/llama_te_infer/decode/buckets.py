"""The numbers of rows for which a step is captured: a batch runs in the graph of the next larger bucket."""

from __future__ import annotations

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


def bucket_of(rows: int, most: int) -> int:
    """Return the number of rows to compute for a batch of `rows` rows, at most `most`."""
    return min(next(size for size in (*BUCKETS, rows) if size >= rows), most)
