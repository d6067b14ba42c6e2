"""An engine that continues many prompts at the same time: requests join and leave the running batch at any step.

    engine = Engine(model, tokenizer)
    for output in engine.generate(["The sky is blue because", "Two and two"], SamplingParams(temperature=0)):
        print(output.outputs[0].text)

The host is one step behind the device: it launches a step, and while that step runs, it reads the tokens of the step
before. So the host learns one step late that a sequence has ended, and drops the token that the sequence got since.
"""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from llama_te_core.layers.kv_cache import computing_dtype

from ..decode.backend import DecodeBackend, check_implementation, has_own_forward, select_backend
from ..decode.fused import FusedDecode
from ..decode.layers import LayersDecode, padded_multiple
from ..kv_cache.engine_cache import EngineCache
from ..runner.model_runner import ModelRunner
from ..runner.results import BeamResult, Pending, StepResult
from ..runner.sequence import Request
from ..runner.sequence import Sequence as Text
from ..runner.stopping import FinishReason
from ..sampling_params import SamplingParams
from .limits import check_model, eos_token_ids_of, fitting_pages, max_sequence_length_of, model_kind
from .model_watch import ModelWatch
from .outputs import RequestOutput, TokenEvent, TokenLogprobs
from .request_state import RequestState
from .scheduler import Scheduler

Prompt = str | Sequence[int]

SECONDS_BEFORE_PROGRESS = 2.0


@functools.cache
def _warn_of_unused_hooks() -> None:
    warnings.warn(
        "The engine calls the model's decoder and its head, so hooks on the NVLlamaForCausalLM itself and its replaced "
        "forward do not run: register them on model.model or model.lm_head.",
        stacklevel=2,
    )


class Engine:
    """Continues prompts. One thread uses an engine: other threads of a server pass their requests to it.

    Args:
        model: An `NVLlamaForCausalLM` in evaluation mode.
        tokenizer: A tokenizer of transformers, for prompts, texts and stop strings; prompts of tokens need none.
        max_batch_size: Sequences that run at the same time; each beam is one.
        max_sequence_length: Most tokens of a sequence, prompt included; the configuration's
            `max_position_embeddings` by default.
        page_size: Tokens of a page of the cache.
        total_num_pages: Pages of the cache. By default as many as `max_batch_size` sequences of
            `max_sequence_length` need, at most as many as fit 85 % of the GPU's free memory, or 2 GiB on a CPU.
        prefill_budget: Most tokens of prompts that a step reads.
        prefix_caching: Whether prompts with the prefix of an earlier text reuse its keys and values.
        decode_implementation: How decoding steps are computed, as in `InferenceParams`: "layers", by the layers of the
            model; "fused", by kernels, replayed from a CUDA graph; "auto", on a GPU by the kernels, or with one warning
            by the layers if the kernels cannot compute the model.

    The model may change between requests: the engine looks at it once after each `submit`. It then decides again how
    to compute decoding steps, captures new CUDA graphs where weights have moved, and forgets all cached prefixes if
    weights, hooks or adapters have changed. Running requests continue with the changed model. `ModelWatch` says
    which changes the engine sees; call `reset_prefix_cache` after others, such as `parameter.data.mul_(...)`. Under
    `torch.autocast` the cache has the dtype of autocast.

    Raises:
        ValueError: An argument is out of its range, or the model is in training mode. `step`, `generate` and `stream`
            raise it too, if the model has changed; no request has advanced then.
        RuntimeError: decode_implementation="fused", and the kernels cannot compute the model. Raised by `step`,
            `generate` and `stream` likewise, also for a model with another dtype, device or vocabulary.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        max_batch_size: int = 32,
        max_sequence_length: int | None = None,
        page_size: int = 64,
        total_num_pages: int | None = None,
        prefill_budget: int = 2048,
        prefix_caching: bool = True,
        decode_implementation: str = "auto",
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("max_sequence_length", 1 if max_sequence_length is None else max_sequence_length),
            ("page_size", page_size),
            ("total_num_pages", 1 if total_num_pages is None else total_num_pages),
            ("prefill_budget", prefill_budget),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not possible: give an integer of at least 1.")
        check_implementation(decode_implementation)
        check_model(model)
        self.model, self.tokenizer = model, tokenizer
        self.decode_implementation = decode_implementation
        self.max_sequence_length = max_sequence_length_of(model.config, max_sequence_length)
        self.eos_token_ids = eos_token_ids_of(model, tokenizer)
        if total_num_pages is None:
            wanted = max_batch_size * -(-self.max_sequence_length // page_size)
            total_num_pages = max(1, min(wanted, fitting_pages(model, page_size)))
        # The model keeps this table. It is made here, outside inference mode, so that the model can be trained later.
        model.model.rotary_angles(self.max_sequence_length, model.device)
        multiple = padded_multiple(model)
        self._rows = -(-max_batch_size // multiple) * multiple
        self._cache = EngineCache(
            model,
            rows=self._rows,
            max_sequence_length=self.max_sequence_length,
            total_num_pages=total_num_pages,
            page_size=page_size,
        )
        self._make_scheduler = functools.partial(
            Scheduler, max_batch_size, total_num_pages, page_size, prefill_budget, prefix_caching
        )
        self._kind = model_kind(model)
        self._watch = ModelWatch(model) if prefix_caching else None
        self._submitted = 0
        self._outputs: dict[int, RequestOutput] = {}  # not fetched yet
        self._layers = LayersDecode(model, self._cache)
        self._fused: FusedDecode | None = None
        self._decode = self._select_backend()
        self._start_over()

    def __repr__(self) -> str:
        pool = self.scheduler.blocks.pool
        return (
            f"Engine({self.scheduler.max_rows} rows of {self.max_sequence_length} tokens, {pool.total_num_pages} pages "
            f"of {pool.page_size}: {len(self.scheduler.rows)} sequences run, {len(self.scheduler.waiting)} requests "
            f"wait)"
        )

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, on_token: Callable[[TokenEvent], None] | None = None
    ) -> int:
        """Put a request in the queue.

        Args:
            prompt: Text, or tokens.
            params: How to continue it.
            on_token: Called, during `step`, with each token of each completion; with the tokens of beams at the end.
                If it raises, the request ends with the tokens it has; its output has the exception.

        Returns:
            The request's id.

        Raises:
            ValueError: The request does not fit the engine or the model.
        """
        params = SamplingParams() if params is None else params
        tokens = self._tokens(prompt)
        self._check(tokens, params)
        # From torch's generator, so that torch.manual_seed makes all requests repeatable.
        seed = int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
        request = Request(self._submitted, tokens, params, seed, self.eos_token_ids)
        self.scheduler.submit(request)
        self._submitted += 1
        self._requests[request.id] = RequestState(request, self.tokenizer, on_token)
        self._backend_is_current = False
        return request.id

    def cancel(self, request_id: int) -> bool:
        """End a request; its output has the tokens written so far. Callbacks may call this.

        Returns:
            Whether the request was in progress: `False` for an unknown id and for a finished request.
        """
        state = self._requests.get(request_id)
        if state is None:
            return False
        self._end(state)
        return True

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, so that the next prompts are computed from their beginnings.

        Needed only after a change of the weights that `ModelWatch` cannot see. Running requests keep their pages.
        """
        self.scheduler.blocks.forget_prefixes()

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has something to do, or to return."""
        return bool(self._requests or self._outputs)

    def step(self) -> list[RequestOutput]:
        """Compute one step, and return the requests that have finished.

        An error in the step itself, such as too little memory, ends all requests without outputs. The engine is empty
        then and can be used again.
        """
        self._advance()
        outputs, self._outputs = list(self._outputs.values()), {}
        return outputs

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue prompts, and return when all are done.

        Shows a progress bar on a terminal when it takes longer.

        Args:
            prompts: Texts, or lists of tokens.
            params: For all of them, or for each.

        Returns:
            The outputs, in the order of the prompts.

        Raises:
            ValueError: A request does not fit; none has been started then.
        """
        ids = self._submit_all(prompts, params, None)
        missing = set(ids)
        outputs: dict[int, RequestOutput] = {}
        try:
            with tqdm(total=len(ids), unit="prompt", disable=None, delay=SECONDS_BEFORE_PROGRESS) as progress:
                while missing:
                    self._advance()
                    done = [request_id for request_id in self._outputs if request_id in missing]
                    outputs |= {request_id: self._outputs.pop(request_id) for request_id in done}
                    missing.difference_update(done)
                    progress.update(len(done))
        finally:
            self._forget(missing)
        return [outputs[request_id] for request_id in ids]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[TokenEvent]:
        """Continue one prompt or several, and yield tokens as they arrive. Leaving the loop cancels the rest.

        Args:
            prompts: One text or list of tokens, or several.
            params: For all of them, or for each.

        Raises:
            ValueError: A request does not fit; none has been started then.
        """
        one = isinstance(prompts, str) or not isinstance(next(iter(prompts), None), str | Sequence)
        events: deque[TokenEvent] = deque()
        each: Any = [prompts] if one else prompts
        ids = self._submit_all(each, params, events.append)
        return self._events(set(ids), events)

    # --- submitting ---------------------------------------------------------------------------------------------------

    def _submit_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        on_token: Callable[[TokenEvent], None] | None,
    ) -> list[int]:
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r} is one text: give a list of prompts.")
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params has {len(each)} entries for {len(prompts)} prompts: give one for each, or one.")
        ids: list[int] = []
        try:
            for prompt, its_params in zip(prompts, each, strict=True):
                ids.append(self.submit(prompt, its_params, on_token))
        except BaseException:
            self._forget(ids)
            raise
        return ids

    def _tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ValueError("prompt is a text, but the engine has no tokenizer: give it one, or give tokens.")
        return list(self.tokenizer(prompt)["input_ids"])

    def _check(self, tokens: list[int], params: SamplingParams) -> None:
        vocab_size = self.model.lm_head.out_features
        if not tokens:
            raise ValueError("prompt has no tokens: give at least one, such as the BOS token.")
        for name, ids in (("prompt", tokens), ("stop_token_ids", params.stop_token_ids)):
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(
                    f"{name} has the tokens {min(ids)} to {max(ids)}, but the model knows 0 to {vocab_size - 1}: use "
                    "the model's own tokenizer."
                )
        if len(tokens) + params.max_tokens > self.max_sequence_length:
            raise ValueError(
                f"prompt has {len(tokens)} tokens and max_tokens={params.max_tokens}, but max_sequence_length="
                f"{self.max_sequence_length}: shorten one of them, or make an engine for longer sequences."
            )
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop={params.stop!r} needs text, but the engine has no tokenizer: give it one, or use stop_token_ids."
            )

    def _forget(self, ids: Sequence[int] | set[int]) -> None:
        """Cancel requests, and drop their outputs."""
        for request_id in ids:
            self.cancel(request_id)
            self._outputs.pop(request_id, None)

    def _events(self, ids: set[int], events: deque[TokenEvent]) -> Iterator[TokenEvent]:
        try:
            while events or any(request_id in self._requests for request_id in ids):
                if not events:
                    self._advance()
                while events:
                    yield events.popleft()
        finally:
            self._forget(ids)

    # --- stepping -----------------------------------------------------------------------------------------------------

    def _start_over(self) -> None:
        """Forget all requests, and the content of the cache."""
        self.scheduler = self._make_scheduler()
        self._runner = ModelRunner(self.model, self._cache, self._decode)
        self._requests: dict[int, RequestState] = {}  # in progress
        self._pending: Pending | None = None
        self._is_stepping = False

    def _select_backend(self) -> DecodeBackend:
        if has_own_forward(self.model, self.model):
            _warn_of_unused_hooks()
        self._fused, _ = select_backend(self.model, self._cache, self._rows, self.decode_implementation, self._fused)
        self._backend_is_current = True
        return self._layers if self._fused is None else self._fused

    def _follow_model(self) -> None:
        """Adapt to changes of the model since the last request."""
        check_model(self.model)
        kind = model_kind(self.model)
        if kind != self._kind:
            raise RuntimeError(
                f"the model has changed from {self._kind} to {kind} since this engine was made for it: make a new "
                "engine."
            )
        if self._watch is not None and self._watch.has_changed():
            self.scheduler.blocks.forget_prefixes()
        if not self._fits_autocast():
            self._cache.convert(computing_dtype(self.model.get_input_embeddings().weight))
            self.scheduler.blocks.forget_prefixes()
        self._decode = self._runner.decode = self._select_backend()

    def _fits_autocast(self) -> bool:
        """Return whether the cache has the dtype that the layers compute in, which autocast changes."""
        return self._cache.dtype == computing_dtype(self.model.get_input_embeddings().weight)

    @torch.inference_mode()
    def _advance(self) -> None:
        """Launch a step, and read the results of the step before."""
        if self._is_stepping:
            raise RuntimeError("a callback has called step, generate or stream: it may call submit and cancel only.")
        previous = self._decode  # its graph may still run: it stays until the step before has been read
        has_adapters = self._watch is not None and self._watch.has_adapters
        if not self._backend_is_current or has_adapters or not self._fits_autocast():
            self._follow_model()
        self._is_stepping = True
        try:
            plan = self.scheduler.plan()
            for request in dict.fromkeys(s.request for s in plan.beginning if s.request.has_beams):
                self._requests[request.id].begin_search()
            launched = None if plan.is_empty else self._runner.launch(plan)
            if self._watch is not None and self._watch.has_adapters:
                self._watch.accept()
            pending, self._pending = self._pending, launched
            if pending is not None:
                self._read(pending.result())
        except BaseException:
            # Interrupted, or out of memory: the state of the step is unknown, so no request can continue.
            self._fused, self._backend_is_current = None, False
            self._start_over()
            raise
        del previous
        self._is_stepping = False
        if not self._requests:
            self._pending = None  # no request needs its results

    def _read(self, result: StepResult) -> None:
        for request, position, logprobs in result.prompt_logprobs:
            if request.id in self._requests:
                self._requests[request.id].add_prompt_logprobs(position, logprobs)
        for i, (sequence, token) in enumerate(result.tokens):
            wanted = sequence.request.params.logprobs
            here = None
            if wanted is not None:
                assert result.logprobs is not None
                here = TokenLogprobs(result.logprobs[i], () if result.top is None else tuple(result.top[i][:wanted]))
            self._append(sequence, token, here)
        for beams in result.beams:
            self._follow(beams)

    def _append(self, sequence: Text, token: int, logprobs: TokenLogprobs | None = None) -> None:
        """Append a token to a sequence; it may be the last one."""
        state = self._requests.get(sequence.request.id)
        if state is None or sequence.finish_reason is not None:
            return  # it ended while this step was running, or a callback has just ended it
        state.add_token(sequence, token, logprobs)
        if sequence.finish_reason is not None:
            self.scheduler.remove([sequence])
        self._call_back(state, sequence, token, logprobs)
        if sequence.finish_reason is not None and state.request.is_finished:
            self._end(state)

    def _follow(self, beams: BeamResult) -> None:
        """Take a search one step further; it may be the last one."""
        request, state = beams.request, self._requests.get(beams.request.id)
        if state is None:
            return  # it ended while this step was running
        assert state.history is not None
        state.history.add(beams.candidate_tokens, beams.candidate_sources, beams.candidate_scores)
        if not state.history.done:
            self.scheduler.blocks.reorder(request.sequences, beams.sources, beams.length)
            return
        self.scheduler.remove(request.sequences)
        for sequence, hypothesis in state.keep_best():
            for token in hypothesis.token_ids:
                self._append(sequence, token)

    def _call_back(
        self, state: RequestState, sequence: Text, token: int | None, logprobs: TokenLogprobs | None = None
    ) -> None:
        """Call the request's callback; end the request if it raises."""
        if state.on_token is None or state.error is not None:
            return
        try:
            state.on_token(state.event(sequence, token, logprobs))
        except Exception as error:  # of any kind: it concerns this request alone, and the others continue
            state.error = error
            self._end(state, "error")

    def _end(self, state: RequestState, reason: FinishReason = "cancelled") -> None:
        """Make the output of a request. Its unfinished sequences end for the given reason."""
        request = state.request
        if self._requests.pop(request.id, None) is None:
            return  # a callback has ended it
        self.scheduler.remove(request.sequences)
        state.drop_beams()
        unfinished = [sequence for sequence in request.sequences if sequence.finish_reason is None]
        for sequence in unfinished:
            state.end(sequence, reason)
        for sequence in unfinished:
            self._call_back(state, sequence, None)
        self._outputs[request.id] = state.output()
