"""An engine for a model between its training steps: made as large as a call needs, asleep until the next one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..sampling_params import SamplingParams
from .engine import Engine
from .limits import max_sequence_length_of
from .outputs import RequestOutput

MOST_ROWS = 256  # of a batch, if the caller does not say


class LiveEngine:
    """Continues prompts by the weights that a model has at the moment of each call.

    Between calls the engine sleeps: the model alone is in memory. A copy has the options and no engine, so that a model
    that holds this object can be copied and saved.

    Args:
        dtype: Compute in this dtype, by a copy of the weights that is in memory only during calls; `None` for the
            model itself. The kernels compute bfloat16, and trainers often keep weights in float32.
        options: Arguments of `Engine`. Without `max_batch_size` and `max_sequence_length` the engine is as large as its
            calls need: at most 256 sequences at the same time, and at most as many pages as fit.

    Attributes:
        most_rows: Sequences that run at the same time at most; a request has no more.
    """

    def __init__(self, *, dtype: torch.dtype | None = None, **options: Any) -> None:
        self.dtype, self.options = dtype, options
        self.most_rows: int = options.get("max_batch_size", MOST_ROWS)
        self._engine: Engine | None = None
        self._rows = self._length = 0
        self._model: Any = None  # what was copied
        self._copy: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(LiveEngine, dtype=self.dtype, **self.options), ()

    def generate(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        tokenizer: Any | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts of tokens.

        Args:
            model: An `NVLlamaForCausalLM`.
            prompts: The prompts.
            params: For each of them; `max_tokens` is a number.
            tokenizer: For parameters that name texts.

        Raises:
            ValueError: An option or a parameter is not possible, or there is too little memory.
            Exception: What has ended one of the requests, such as a FloatingPointError for logits that are not finite.
        """
        rows = sum(max(each.n, each.num_beams) for each in params)
        length = max(len(prompt) + (each.max_tokens or 0) for prompt, each in zip(prompts, params, strict=True))
        computing = model if self.dtype is None or self.dtype == model.dtype else self._converted(model)
        engine = self._engine_for(computing, tokenizer, rows, length)
        try:
            outputs = engine.generate(list(prompts), params)
        finally:
            if not engine.has_unfinished:
                engine.sleep()
            if computing is not model:
                for parameter in computing.parameters():
                    parameter.data = parameter.data.new_empty(0)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs

    def _engine_for(self, model: Any, tokenizer: Any | None, rows: int, length: int) -> Engine:
        rows = min(rows, self.most_rows)
        engine = self._engine
        fits = rows <= self._rows and length <= self._length
        if fits and engine is not None and engine.model is model and engine.tokenizer is tokenizer:
            return engine
        self._engine = engine = None  # its memory is free before the next engine takes its own
        self._rows, self._length = max(rows, self._rows), max(length, self._length)
        longest = min(self._length, max_sequence_length_of(model.config, None))
        sizes = {"max_batch_size": self._rows, "max_sequence_length": longest}
        self._engine = Engine(model, tokenizer, **{**sizes, **self.options})
        return self._engine

    def _converted(self, model: Any) -> Any:
        """Return a copy of a model with its present weights in another dtype."""
        if self._model is not model:
            weights = {id(each): nn.Parameter(each.detach().to(self.dtype), False) for each in model.parameters()}
            self._model, self._copy = model, copy.deepcopy(model, weights)
        else:
            for parameter, source in zip(self._copy.parameters(), model.parameters(), strict=True):
                parameter.data = source.detach().to(self.dtype)
        return self._copy
