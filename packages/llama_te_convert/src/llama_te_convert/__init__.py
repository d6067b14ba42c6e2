"""Conversion between Hugging Face Llama checkpoints and the Transformer Engine layout of llama_te_core.

Modules import each other in this direction only, and `|` separates modules that do not import each other:

    cli | core_hooks -> in_memory | loading | on_disk | adapter | option_types | progress
        -> targets | verify -> sources -> configs -> layout -> errors | version

- `cli`: the command. `option_types`, `progress`: its option values and its progress bar.
- `core_hooks`: the conversion that `llama_te_core` finds through an entry point.
- `in_memory`, `loading`, `on_disk`, `adapter`: the conversions of models, of checkpoints that are read into memory, of
  checkpoints on disk, and of LoRA adapters.
- `targets`: writers of checkpoints. `verify`: inspection and comparison of checkpoints.
- `sources`: readers of checkpoints, one module for each file format.
- `configs`: the architectures, and their configurations in each layout.
- `layout`: the rules between the two tensor layouts: names, shapes and rows.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import version

if TYPE_CHECKING:
    from .adapter import convert_adapter
    from .errors import CheckpointError
    from .in_memory import convert_llama_hf_to_te, convert_llama_te_to_hf
    from .on_disk import Report, convert_checkpoint
    from .targets.standalone import export_te_checkpoint

__version__ = version.VERSION

# Imported on first use: importing transformers' models takes seconds, and the command does without them.
_MODULES = {
    "CheckpointError": "errors",
    "Report": "on_disk",
    "convert_adapter": "adapter",
    "convert_checkpoint": "on_disk",
    "convert_llama_hf_to_te": "in_memory",
    "convert_llama_te_to_hf": "in_memory",
    "export_te_checkpoint": "targets.standalone",
}
__all__ = [
    "CheckpointError",
    "Report",
    "convert_adapter",
    "convert_checkpoint",
    "convert_llama_hf_to_te",
    "convert_llama_te_to_hf",
    "export_te_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
