"""An object whose pickle runs code when it is loaded."""

import os
from pathlib import Path


class Malicious:
    """Makes a folder when it is unpickled.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
