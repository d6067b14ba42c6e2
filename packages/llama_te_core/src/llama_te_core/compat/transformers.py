"""Names of transformers that its documentation does not promise. Checked against transformers 5.17.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


@functools.cache
def cache_field() -> str:
    """Return the name of the key/value cache as an argument and in outputs.

    transformers renames it: `past_key_values` up to 5.2x, `cache` after that.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def mark_as_given(cache: Any) -> None:
    """Mark a cache as the caller's, so that `generate` returns it."""
    cache._is_user_defined = True


def prefill(cls: type, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the `_prefill` of transformers' `GenerationMixin`, as `super()._prefill` would in the class `cls`."""
    mixin: Any = super(cls, model)
    return mixin._prefill(*args, **kwargs)


def gradient_checkpointing_function(model: Any) -> Callable[..., Any]:
    """Return the function that `gradient_checkpointing_enable` has set, with the user's arguments bound."""
    function: Callable[..., Any] = model._gradient_checkpointing_func
    return function


def attention_implementation(config: Any) -> str | None:
    """Return the attention implementation that a configuration asks for."""
    name: str | None = config._attn_implementation
    return name


def rope_functions() -> dict[str, Callable[..., Any]]:
    """Return the functions that compute rotary frequencies, by `rope_type`; "default" is not among them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    functions: dict[str, Callable[..., Any]] = ROPE_INIT_FUNCTIONS
    return functions


def rope_parameter_names() -> set[str]:
    """Return the names that `rope_parameters` may have."""
    from transformers.modeling_rope_utils import RopeParameters

    return set(RopeParameters.__annotations__)


def add_causal_model(model_type: str, class_name: str) -> None:
    """Tell Trainer that a class is a causal language model.

    Trainer shifts the labels of these classes where it computes the loss itself, as it does for label smoothing.
    """
    names: dict[str, str] = importlib.import_module(
        "transformers.models.auto.modeling_auto"
    ).MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    names[model_type] = class_name


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Run an action once a module is there: now, or right after its import.

    Args:
        name: The module. It must not be under import now.
        action: May import other modules, and this one.
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _ImportObserver(name, action))


class _ImportObserver(MetaPathFinder):
    """Finds one module as Python does, and runs an action after the module is executed."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name = name
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the one module that this object observes."""
        if fullname != self._name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._action()

        # Not by a loader of our own: inspect and pickle ask the loader for the source and more.
        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def list_decoder(tokenizer: Any) -> Callable[..., str]:
    """Return what decodes a list of token ids as `tokenizer.decode` does.

    transformers' own `decode` first looks for arrays and tensors, which takes longer than decoding.
    """
    from transformers import PreTrainedTokenizerBase

    decode = tokenizer.decode
    is_own = getattr(decode, "__func__", None) is PreTrainedTokenizerBase.decode  # and not a subclass's
    return tokenizer._decode if is_own else decode


def import_for_tokenizers() -> None:
    """Import transformers without torch: a process that needs tokenizers alone starts sooner and takes less memory.

    transformers has no models in this process then, and logs errors alone. Nothing happens if torch or transformers has
    been imported before.
    """
    if not {"torch", "transformers"}.isdisjoint(sys.modules):
        return
    variable, before = "TRANSFORMERS_VERBOSITY", os.environ.get("TRANSFORMERS_VERBOSITY")
    os.environ[variable] = "error"  # it would warn that there is no torch
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
    finally:
        del sys.modules["torch"]
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


@contextlib.contextmanager
def progress_bars_on_terminals_only() -> Iterator[None]:
    """Within this context, transformers shows no progress bars where standard error is no terminal.

    transformers draws them into log files too. The setting is the whole library's; it is as before afterwards.
    """
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
