"""Embeddings and classes of prompts: one thread runs the model over several prompts at a time, packed without padding.

Shapes: N prompts of a pass, T tokens of all of them, E hidden size, C classes.

Importing this module does not import torch.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..sampling_params import SamplingParams
from .client import ENDING, DrainingError, EngineClient, Mailbox, step_failed
from .control import Control, ControlState
from .statistics import Counters, EngineStats
from .tokenization import tokens_of_pair

if TYPE_CHECKING:
    import torch


class PoolingEngine(EngineClient):
    """Computes one vector for each prompt, from the hidden state of its last token.

    Args:
        model: An `NVLlamaModel` or an `NVLlamaForSequenceClassification`, in evaluation mode.
        tokenizer: Its tokenizer.
        max_sequence_length: Most tokens of a prompt; the model's limit by default.
        max_batch_tokens: Most tokens of a pass. A longer prompt has a pass of its own.
        max_requests: Most requests that run and wait at a time; `None` for any number.

    Attributes:
        model: The model.
        classes: The number of classes; `None` if the vectors are embeddings.
        sampling_defaults: None: it samples nothing.
    """

    sampling_defaults: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_sequence_length: int | None = None,
        max_batch_tokens: int = 2048,
        max_requests: int | None = None,
    ) -> None:
        limit = model.config.max_position_embeddings
        if max_sequence_length is not None and max_sequence_length > limit:
            raise ValueError(f"max_sequence_length={max_sequence_length} is not possible: the model has {limit}.")
        super().__init__(tokenizer, max_sequence_length or limit, max_requests)
        self.model = model
        self.classes: int | None = model.config.num_labels if hasattr(model, "score") else None
        self._max_batch_tokens = max_batch_tokens
        self._wake = threading.Condition()
        self._waiting: deque[_Prompt] = deque()
        self._is_closing = self._has_ended = False
        self._counters = Counters()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        """Describe what it computes."""
        what = f"{self.model.config.hidden_size} numbers" if self.classes is None else f"{self.classes} classes"
        return f"PoolingEngine({what} a prompt, {self.max_sequence_length} tokens)"

    @property
    def description(self) -> str:
        """What it computes, for people."""
        return repr(self)

    @property
    def is_alive(self) -> bool:
        """Whether requests can run: not after `close`, and not after the GPU has failed."""
        return not self._has_ended

    def stats(self) -> EngineStats:
        """Return the load: requests, prompts that wait, tokens read. There is no cache: the one page stays unused."""
        return EngineStats(
            num_requests_running=self.num_requests,
            num_requests_waiting=len(self._waiting),
            num_pages_used=0,
            total_num_pages=1,
            page_size=self.max_sequence_length,
            prefix_caching=False,
            kv_cache_dtype="auto",
            counters=self._counters,
        )

    async def tokenize_pair(self, first: str, second: str) -> list[int]:
        """Return the tokens of a pair of texts, as the tokenizer joins them.

        Raises:
            ValueError: A text is too long.
        """
        return await self._in_tokenizer_thread(
            lambda: tokens_of_pair(first, second, self._tokenizer, self.max_sequence_length)
        )

    async def pool(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """Return the vectors of prompts. If the waiting task is cancelled, the prompts that wait are dropped.

        Args:
            prompts: Tokens.

        Returns:
            float32 [N, E] or [N, C] on the CPU: the final hidden states of the last tokens, or the classes' logits.

        Raises:
            ValueError: A prompt is empty or too long, or has tokens that the model does not know.
            QueueFullError: There are `max_requests` requests.
            DrainingError: `drain` or `close` has been called.
            EngineFailedError: The pass failed, or no pass can run any more.
        """
        import torch

        for index, prompt in enumerate(prompts):
            self._check(prompt, f"input[{index}]" if len(prompts) > 1 else "input")
        self._accept()
        try:
            loop = asyncio.get_running_loop()
            waiting = [_Prompt(prompt, loop) for prompt in prompts]
            with self._wake:
                if self._has_ended or self._is_closing:
                    raise DrainingError(ENDING)
                self._waiting += waiting
                self._wake.notify()
            try:
                return torch.stack(await asyncio.gather(*(each.vector for each in waiting)))
            finally:
                for each in waiting:
                    each.vector.cancel()
        finally:
            self._release(1)

    def _check(self, prompt: list[int], name: str) -> None:
        if not 0 < len(prompt) <= self.max_sequence_length:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, but max_sequence_length={self.max_sequence_length}: give at least "
                "one token, and no more than that."
            )
        size = self.model.config.vocab_size
        wrong = [token for token in prompt if not 0 <= token < size]
        if wrong:
            raise ValueError(f"{name} has the token {wrong[0]}, but the model knows 0 to {size - 1}.")

    def close(self) -> None:
        """Drop what waits, and end the thread. Blocks until a pass in progress is done."""
        self._is_draining = True
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join()
        self._tokenizing.shutdown()

    async def _submit(self, mailbox: Mailbox, tokens: list[int], params: SamplingParams | None) -> None:
        self._release(1)
        raise ValueError("This model writes no text: it computes embeddings or classes. See /v1/embeddings and /score.")

    def _cancel(self, mailbox: Mailbox) -> None:
        """Do nothing: no request that writes text was accepted."""

    async def _cancel_all(self) -> None:
        with self._wake:
            self._drop_waiting(DrainingError(ENDING))

    async def _control(self, control: Control) -> None:
        self._control_state = ControlState()
        raise ValueError("this model writes no text: its engine does not pause, sleep or take weights.")

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        import torch

        from .loop import has_lost_device

        device = self.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        while not self._has_ended:
            with self._wake:
                while not (self._waiting or self._is_closing):
                    self._wake.wait()
                if self._is_closing:
                    self._has_ended = True
                    self._drop_waiting(DrainingError(ENDING))
                    return
                batch = self._next_batch()
            if not batch:
                continue
            try:
                vectors = self._pass(batch)
            except Exception as error:
                self.failure = error
                for each in batch:
                    each.fail(step_failed(error))
                if has_lost_device(device):
                    with self._wake:
                        self._has_ended = True
                        self._drop_waiting(step_failed(error))
            else:
                self.failure = None
                for each, vector in zip(batch, vectors, strict=True):
                    each.give(vector)

    def _next_batch(self) -> list[_Prompt]:
        """Take prompts from the queue, as many as fit into a pass. Nobody waits for a cancelled one."""
        batch: list[_Prompt] = []
        tokens = 0
        while self._waiting:
            prompt = self._waiting[0]
            if prompt.vector.cancelled():
                self._waiting.popleft()
                continue
            tokens += len(prompt.tokens)
            if batch and tokens > self._max_batch_tokens:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _pass(self, batch: Sequence[_Prompt]) -> torch.Tensor:
        """Return the vectors of prompts, float32 on the CPU."""
        import torch

        device = self.model.device
        lengths = [len(each.tokens) for each in batch]
        ids_T = torch.tensor([token for each in batch for token in each.tokens], device=device)
        starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
        with torch.inference_mode():
            packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
            outputs = self.model(input_ids=ids_T[None], use_cache=False, **packed, **longest)
            if self.classes is None:
                vectors = outputs.last_hidden_state[0, starts[1:] - 1]
            else:
                vectors = outputs.logits
            # The answer is due, so this waits for the device.
            result: torch.Tensor = vectors.float().cpu()
        self._counters.prompt_tokens += sum(lengths)
        return result

    def _drop_waiting(self, error: Exception) -> None:
        while self._waiting:
            self._waiting.popleft().fail(error)


class _Prompt:
    """A prompt in the queue."""

    def __init__(self, tokens: list[int], loop: asyncio.AbstractEventLoop) -> None:
        self.tokens, self._loop = tokens, loop
        self.vector: asyncio.Future[Any] = loop.create_future()

    def give(self, vector: torch.Tensor) -> None:
        self._settle(lambda: self.vector.set_result(vector))

    def fail(self, error: Exception) -> None:
        self._settle(lambda: self.vector.set_exception(error))

    def _settle(self, settle: Any) -> None:
        def in_loop() -> None:
            if not self.vector.done():
                settle()

        with suppress(RuntimeError):  # the event loop has ended, and with it the waiting task
            self._loop.call_soon_threadsafe(in_loop)
