"""A slow conversion, in a module that other processes can import."""

from __future__ import annotations

import time
from pathlib import Path

from llama_te_convert import convert_checkpoint


def convert_slowly(source: Path, folder: Path, max_shard_bytes: int) -> None:
    """Convert to the Transformer Engine layout, and spend most of the time while files are written."""
    convert_checkpoint(
        str(source), folder, to_te=True, max_shard_bytes=max_shard_bytes, progress=lambda done, total: time.sleep(0.003)
    )
