"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("llama-te-convert")
except PackageNotFoundError:  # used from a source folder
    VERSION = "0+unknown"
