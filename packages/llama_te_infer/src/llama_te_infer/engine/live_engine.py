"""An engine for a model between its training steps: made as large as a call needs, asleep until the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        options: Arguments of `Engine`. Without `max_batch_size` and `max_sequence_length` the engine is as large as its
            calls need: at most 256 sequences at the same time, and at most as many pages as fit.

    Attributes:
        most_rows: Sequences that run at the same time at most; a request has no more.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.most_rows: int = options.get("max_batch_size", MOST_ROWS)
        self._engine: Engine | None = None
        self._rows = self._length = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _with_options, (self.options,)

    def generate(
        self, model: Any, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """Continue prompts of tokens.

        Args:
            model: An `NVLlamaForCausalLM`.
            prompts: The prompts.
            params: For each of them; `max_tokens` is a number.

        Raises:
            ValueError: An option or a parameter is not possible, or there is too little memory.
            Exception: What has ended one of the requests, such as a FloatingPointError for logits that are not finite.
        """
        rows = sum(max(each.n, each.num_beams) for each in params)
        length = max(len(prompt) + (each.max_tokens or 0) for prompt, each in zip(prompts, params, strict=True))
        engine = self._engine_for(model, rows, length)
        try:
            outputs = engine.generate(list(prompts), params)
        finally:
            if not engine.has_unfinished:
                engine.sleep()
        for output in outputs:
            if output.error is not None:
                raise output.error
        return outputs

    def _engine_for(self, model: Any, rows: int, length: int) -> Engine:
        rows = min(rows, self.most_rows)
        engine = self._engine
        if engine is not None and engine.model is model and rows <= self._rows and length <= self._length:
            return engine
        self._engine = engine = None  # its memory is free before the next engine takes its own
        self._rows, self._length = max(rows, self._rows), max(length, self._length)
        longest = min(self._length, max_sequence_length_of(model.config, None))
        self._engine = Engine(model, **{"max_batch_size": self._rows, "max_sequence_length": longest, **self.options})
        return self._engine


def _with_options(options: dict[str, Any]) -> LiveEngine:
    return LiveEngine(**options)
