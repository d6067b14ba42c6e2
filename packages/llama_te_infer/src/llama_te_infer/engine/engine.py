"""An engine that continues many prompts at the same time: requests join and leave the running batch at any step.

    engine = Engine(model, tokenizer)
    for output in engine.generate(["The sky is blue because", "Two and two"], SamplingParams(temperature=0)):
        print(output.outputs[0].text)

The host is one step behind the device: it launches a step, and while that step runs, it reads the tokens of the step
before. So the host learns one step late that a sequence has ended, and drops the token that the sequence got since.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from llama_te_core.layers.kv_cache import computing_dtype

from ..decode.backend import (
    DecodeBackend,
    check_implementation,
    has_own_forward,
    select_backend,
    select_prefill,
)
from ..decode.fused import FusedDecode
from ..decode.layers import LayersDecode, padded_multiple
from ..decode.prefill import FusedPrefill
from ..integers import checked_integer
from ..kv_cache.engine_cache import EngineCache
from ..ops.greedy import NO_TOKEN
from ..runner.model_runner import ModelRunner
from ..runner.plan import Plan
from ..runner.results import BeamResult, Pending, StepResult
from ..runner.sequence import Request
from ..runner.sequence import Sequence as Text
from ..sampling_params import SamplingParams, checked_params, shown
from .grammars import GrammarCompiler
from .limits import (
    CacheSizes,
    check_memory,
    check_model,
    checked_cache_format,
    eos_token_ids_of,
    fitting_pages,
    max_sequence_length_of,
    model_kind,
)
from .live_model import copy_weights, evaluating
from .logprobs import record_of, records_of
from .model_watch import ModelWatch
from .one_thread import OneThread
from .outputs import RequestOutput, TokenEvent
from .request_state import RequestState
from .scheduler import Scheduler
from .statistics import Counters, EngineStats
from .token_stream import TokenStream
from .tokenization import (
    Prompt,
    special_stops_of,
    special_tokens_of,
    tokens_of_bad_words,
    tokens_of_chats,
    tokens_of_prompt,
    tokens_of_prompts,
)
from .warm_up import warm_ups

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

    A call from a second thread raises a RuntimeError while requests are in progress.

    Args:
        model: An `NVLlamaForCausalLM`. It may be in training: the engine evaluates it, and leaves its mode, gradients,
            hooks and autograd's state as they were.
        tokenizer: A tokenizer of transformers, for prompts, texts and stop strings; prompts of tokens need none.
        max_batch_size: Sequences that run at the same time; each beam is one.
        max_sequence_length: Most tokens of a sequence, prompt included; by default and at most the configuration's
            `max_position_embeddings`.
        page_size: Tokens of a page of the cache.
        total_num_pages: Pages of the cache. By default as many as `max_batch_size` sequences of
            `max_sequence_length` need, at most as many as fit 85 % of the GPU's free memory, or 2 GiB on a CPU.
        gpu_memory_utilization: The share of the device's whole memory that the weights and the cache take, if
            `total_num_pages` is not given; from 0 to 1. A forward pass needs memory beside it.
        prefill_budget: Most tokens of prompts that a step reads.
        prefix_caching: Whether prompts with the prefix of an earlier text reuse its keys and values.
        kv_cache_dtype: How keys and values are stored. "auto", in the dtype in which the layers compute them;
            "bfloat16", likewise, for a model that computes so; "fp8" or "fp8_e4m3", as 8-bit numbers, each head of a
            token with a scale of its own. In FP8 nearly twice as many pages fit. On a GPU it needs the kernels for
            the model.
        decode_implementation: How decoding steps are computed, as in `InferenceParams`: "layers", by the layers of the
            model; "fused", by kernels, replayed from a CUDA graph; "auto", on a GPU by the kernels, or with one warning
            by the layers if the kernels cannot compute the model.

    The model may change between requests: the engine looks at it once after each `submit`. It then decides again how
    to compute decoding steps, captures new CUDA graphs where weights have moved, and forgets all cached prefixes if
    weights, hooks or adapters have changed. Running requests continue with the changed model. `ModelWatch` says
    which changes the engine sees; call `reset_prefix_cache` after others, such as `parameter.data.mul_(...)`. So an
    optimizer may train the model between calls; `sleep` lends the engine's memory to the training meanwhile. Under
    `torch.autocast` the cache has the dtype of autocast.

    Attributes:
        is_asleep: Whether `sleep` has given the memory back.

    Raises:
        ValueError: An argument is out of its range, or `kv_cache_dtype` does not fit the model; more memory is needed
            than there is; or an EOS token of the model is no integer. `step`, `generate` and `stream` raise it too, if
            the model has changed; no request has advanced then.
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
        gpu_memory_utilization: float | None = None,
        prefill_budget: int = 2048,
        prefix_caching: bool = True,
        kv_cache_dtype: str = "auto",
        decode_implementation: str = "auto",
    ) -> None:
        max_batch_size = checked_integer("max_batch_size", max_batch_size)
        page_size = checked_integer("page_size", page_size)
        prefill_budget = checked_integer("prefill_budget", prefill_budget)
        if max_sequence_length is not None:
            max_sequence_length = checked_integer("max_sequence_length", max_sequence_length)
        if total_num_pages is not None:
            total_num_pages = checked_integer("total_num_pages", total_num_pages)
        check_implementation(decode_implementation)
        check_model(model)
        self.model, self.tokenizer = model, tokenizer
        self.decode_implementation = decode_implementation
        self.max_sequence_length = max_sequence_length_of(model.config, max_sequence_length)
        self._longest = max_sequence_length_of(model.config, None)
        self.eos_token_ids = eos_token_ids_of(model, tokenizer)
        self.kv_cache_dtype = kv_cache_dtype
        multiple = padded_multiple(model)
        self._rows = -(-max_batch_size // multiple) * multiple
        cache_format = checked_cache_format(model, kv_cache_dtype, page_size)
        sizes = CacheSizes(
            model, cache_format, self._rows, multiple, self.max_sequence_length, page_size, prefill_budget
        )
        if total_num_pages is None:
            wanted = max_batch_size * sizes.pages_per_row
            total_num_pages = max(1, min(wanted, fitting_pages(sizes, gpu_memory_utilization)))
        elif gpu_memory_utilization is not None:
            raise ValueError(f"{total_num_pages=} and {gpu_memory_utilization=}: give one of them.")
        self._check_memory = functools.partial(check_memory, sizes, total_num_pages, max_batch_size)
        self._check_memory()
        # The model keeps this table. It is made here, outside inference mode, so that the model can be trained later.
        model.model.rotary_angles(self.max_sequence_length, model.device)
        self._make_cache = functools.partial(
            EngineCache,
            model,
            rows=self._rows,
            max_sequence_length=self.max_sequence_length,
            total_num_pages=total_num_pages,
            page_size=page_size,
            is_fp8=cache_format.is_fp8,
            rows_multiple=multiple,
            prefill_budget=prefill_budget,
        )
        self._make_scheduler = functools.partial(
            Scheduler, max_batch_size, total_num_pages, page_size, prefill_budget, prefix_caching
        )
        self._kind = model_kind(model)
        self._watch = ModelWatch(model) if prefix_caching else None
        self._thread = OneThread()
        self._abandoned: deque[int] = deque()  # requests of dropped streams
        self._special_tokens = special_tokens_of(tokenizer)
        self.grammars = GrammarCompiler(tokenizer, model.lm_head.out_features, self.eos_token_ids)
        self._submitted = 0
        self._failure: Exception | None = None  # why the engine cannot be used any more
        self._held_from: int | None = None  # the id of the first request that `hold` keeps in the queue
        self._outputs: dict[int, RequestOutput] = {}  # not fetched yet
        self._counters = Counters()
        self.is_asleep, self._backend_is_current = True, False
        self._forget_requests()
        self._wake()

    def __repr__(self) -> str:
        pool = self.scheduler.blocks.pool
        return (
            f"Engine({self.scheduler.max_rows} rows of {self.max_sequence_length} tokens, {pool.total_num_pages} pages "
            f"of {pool.page_size}: {len(self.scheduler.rows)} sequences run, {len(self.scheduler.waiting)} requests "
            f"wait)"
        )

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        on_token: Callable[[TokenEvent], None] | None = None,
        arrival: float | None = None,
    ) -> int:
        """Put a request in the queue.

        Args:
            prompt: Text, or tokens.
            params: How to continue it.
            on_token: Called, during `step`, with each token of each completion; with the tokens of beams at the end.
                If it raises, the request ends with the tokens it has; its output has the exception. It is not called
                again.
            arrival: When the request arrived, in seconds of `time.monotonic()`; now by default.

        Returns:
            The request's id.

        Raises:
            ValueError: The request does not fit the engine or the model.
        """
        with self._use():
            return self._submit(
                tokens_of_prompt(prompt, self.tokenizer, self.max_sequence_length),
                checked_params(params),
                on_token,
                time.monotonic() if arrival is None else arrival,
            )

    def cancel(self, request_id: int) -> bool:
        """End a request; its output has the tokens written so far. Callbacks may call this.

        Returns:
            Whether the request was in progress: `False` for an unknown id and for a finished request.
        """
        with self._use():
            state = self._requests.get(request_id)
            if state is None:
                return False
            self._end(state)
            return True

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, so that the next prompts are computed from their beginnings.

        Needed only after a change of the weights that `ModelWatch` cannot see. Running requests keep their pages.
        """
        with self._use():
            self.scheduler.blocks.forget_prefixes()

    def hold(self) -> int:
        """Let requests that `submit` takes from now on wait, until `release`. Those before them go on.

        They wait asleep, too: only `wake` wakes the engine then. `generate`, `chat` and `stream` raise a RuntimeError
        meanwhile, since they would wait for ever.

        Returns:
            The id of the first request that waits. Ids grow in the order of the requests.
        """
        with self._use():
            if self._held_from is None:
                self._held_from = self._submitted
            return self._held_from

    def release(self) -> None:
        """Let the requests run that `hold` has kept waiting."""
        with self._use():
            self._held_from = None

    def sleep(self, *, keep_requests: bool = False) -> None:
        """Give back the memory of the cache, the CUDA graphs and the workspaces, for example to a training step.

        `wake`, or the next request, takes it again. The model keeps its weights; cached prefixes are lost.

        Args:
            keep_requests: Requests in progress stay. After `wake` they are computed again as far as they were, and go
                on; beams begin again.

        Raises:
            ValueError: Requests are in progress, or outputs have not been fetched.
        """
        with self._use():
            if self.has_unfinished and not keep_requests:
                raise ValueError("requests are in progress: let step finish them, or cancel them, before sleep.")
            if self.is_asleep:
                return
            self._read_last_step()
            self.is_asleep = True
            self._counters.num_preemptions += self.scheduler.preempt_all()
            self.scheduler.blocks.forget_prefixes()
            del self._runner, self._decode, self._fused, self._fused_prefill, self._layers, self._cache
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()  # the memory of graphs is not the caching allocator's to give to others

    def wake(self) -> None:
        """Take the memory that `sleep` gave back. Does nothing if the engine is awake.

        Raises:
            ValueError: There is less memory than the engine needs.
        """
        with self._use():
            if self.is_asleep:
                self._check_memory()
                self._wake()

    def update_weights(self, weights: nn.Module | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy weights that live elsewhere into the engine's model, in place, one after the other.

        Cached prefixes are forgotten; requests in progress go on with the new weights.

        Args:
            weights: A model of the same kind, or names and tensors as its `named_parameters` gives them, on any device
                and in any dtype, such as an optimizer's float32 copies. Shards of FSDP2 are gathered, so all ranks call
                this. Of names and tensors, weights that do not come stay as they are.

        Raises:
            ValueError: A name or a shape is not the model's. Of a model nothing has been written then; of names and
                tensors, the weights before it.
        """
        with self._use():
            try:
                copy_weights(self.model, weights)
            finally:
                self._backend_is_current = False
                self.scheduler.blocks.forget_prefixes()

    def warm_up(self) -> None:
        """Run steps of all sizes, so that first requests do not wait for what a GPU makes once.

        That is a CUDA graph for each size of a batch, cuDNN's plans for prompts, and kernels to load. It takes seconds
        on a GPU; a CPU gains nothing. No cached prefix stays, and nothing is counted.

        Raises:
            ValueError: Requests are in progress.
        """
        with self._use():
            if self.has_unfinished:
                raise ValueError("warm_up runs steps of its own: call it while no request is in progress.")
            scheduler, counters, pool = self.scheduler, self._counters.copy(), self.scheduler.blocks.pool
            longest = min(self.max_sequence_length, pool.total_num_pages * pool.page_size)
            batches = list(warm_ups(scheduler.max_rows, scheduler.prefill_budget, longest))
            options: dict[str, Any] = {"disable": None, "delay": SECONDS_BEFORE_PROGRESS}
            for prompts, params in tqdm(batches, desc="warming up", unit="batch", **options):
                self._generate(prompts, params)
                scheduler.blocks.forget_prefixes()  # the next prompts begin alike
            self._counters = counters

    def stats(self) -> EngineStats:
        """Return the load and the counters. Any thread may ask; a step in progress may be counted in part."""
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        return EngineStats(
            len(scheduler.running),
            len(scheduler.waiting),
            blocks.pool.total_num_pages - blocks.available,
            blocks.pool.total_num_pages,
            blocks.pool.page_size,
            blocks.prefix_caching,
            self.kv_cache_dtype,
            self._counters.copy(),
        )

    @property
    def cache_bytes(self) -> int:
        """The bytes of the keys and values of all pages; with an FP8 cache also of what its attention widens."""
        return 0 if self.is_asleep else self._cache.memory_bytes

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has something to do, or to return. Any thread may ask."""
        if not self._abandoned:
            return bool(self._requests or self._outputs)
        return not {*self._requests, *self._outputs} <= set(self._abandoned)

    def step(self) -> list[RequestOutput]:
        """Compute one step, and return the requests that have finished.

        An exception that concerns one request ends this request alone: its output has the finish reason "error", and
        the exception as `error`. An error in the step itself, such as too little memory, is raised, and ends all
        requests without outputs. The engine is empty then and can be used again.

        Raises:
            RuntimeError: A step failed, and the engine could not start over: it cannot be used any more.
        """
        with self._use():
            self._advance()
            outputs, self._outputs = list(self._outputs.values()), {}
            return outputs

    def settle(self) -> list[RequestOutput]:
        """Wait for the step in progress, launch no further one, and return the requests that have finished.

        Raises as `step` does.
        """
        with self._use():
            self._read_last_step()
            outputs, self._outputs = list(self._outputs.values()), {}
            return outputs

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue prompts, and return when all are done.

        Shows a progress bar on a terminal when it takes longer.

        Args:
            prompts: One prompt or a list of them. A prompt is a text, a list of token ids, or the output of a tokenizer
                or of `apply_chat_template`, as lists or tensors. A tokenizer's output may hold several texts; its
                `attention_mask` says which tokens are padding.
            params: For all of them, or for each.

        Returns:
            The outputs, in the order of the prompts; also for one prompt a list.

        Raises:
            ValueError: A request does not fit; none has been started then.
        """
        with self._use(), evaluating(self.model):
            return self._generate(tokens_of_prompts(prompts, self.tokenizer, self.max_sequence_length), params)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, by the tokenizer's chat template.

        Args:
            messages: A list of messages, each a dict with "role" and "content"; or a list of such lists.
            params: For all conversations, or for each.
            add_generation_prompt: End the prompt with the beginning of an answer.
            continue_final_message: Continue the last message instead; needs `add_generation_prompt=False`.
            tools: Functions or their JSON schemas, for the template.
            chat_template: Instead of the tokenizer's own.
            chat_template_kwargs: Further variables of the template.

        Returns:
            The outputs, in the order of the conversations; also for one conversation a list.

        Raises:
            ValueError: A request does not fit, or the tokenizer has no chat template; none has been started then.
        """
        with self._use():
            prompts = tokens_of_chats(
                messages,
                self.tokenizer,
                self.max_sequence_length,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template=chat_template,
                **(chat_template_kwargs or {}),
            )
            return self._generate(prompts, params)

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> TokenStream:
        """Continue one prompt or several, and yield tokens as they arrive.

        The requests are in the queue when this method returns. Leaving the loop, or dropping the iterator before its
        first event, cancels the rest.

        Args:
            prompts: As in `generate`.
            params: For all of them, or for each.

        Raises:
            ValueError: A request does not fit; none has been started then.
            RuntimeError: Raised by the iterator: another call's step has failed, and the requests were lost in it.
        """
        events: deque[TokenEvent] = deque()
        with self._use():
            ids = self._submit_all(
                tokens_of_prompts(prompts, self.tokenizer, self.max_sequence_length), params, events.append
            )
            states = [self._requests[request_id] for request_id in ids]

        def advance() -> bool:
            with self._use():
                if any(request_id in self._requests for request_id in ids):
                    self._advance()
                    return True
                for state in states:
                    if state.lost_in is not None:
                        raise RuntimeError(f"the request was lost in a step that failed ({state.lost_in}).")
                return False

        def close() -> None:
            with self._use():
                self._forget(ids)

        return TokenStream(events, advance, close, lambda: self._abandoned.extend(ids))

    # --- submitting ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Refuse calls from other threads, and end requests of dropped streams."""
        is_outermost = self._thread.enter(bool(self._requests or self._outputs))
        try:
            while is_outermost and self._abandoned:
                self._forget([self._abandoned.popleft()])
            yield
        finally:
            self._thread.leave()

    def _generate(
        self, prompts: list[list[int]], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[RequestOutput]:
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

    def _submit_all(
        self,
        prompts: list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        on_token: Callable[[TokenEvent], None] | None,
    ) -> list[int]:
        if self._held_from is not None:
            raise RuntimeError("hold lets new requests wait: call release before generate, chat and stream.")
        if isinstance(params, Sequence) and not isinstance(params, str):
            each = [checked_params(its_params) for its_params in params]
        else:
            each = [checked_params(params)] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"params has {len(each)} entries for {len(prompts)} prompts: give one for each, or one.")
        ids: list[int] = []
        now = time.monotonic()
        try:
            for prompt, its_params in zip(prompts, each, strict=True):
                ids.append(self._submit(prompt, its_params, on_token, now))
        except BaseException:
            self._forget(ids)
            raise
        return ids

    def _submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        on_token: Callable[[TokenEvent], None] | None,
        arrival: float,
    ) -> int:
        self._check_usable()
        if self._held_from is None:
            self.wake()
        special_stops = special_stops_of(params, self._special_tokens)
        bad_words = tokens_of_bad_words(params.bad_words, self.tokenizer) if self.tokenizer is not None else []
        seed = params.seed
        if seed is None:
            # From torch's generator, so that torch.manual_seed makes all requests repeatable.
            draws = params.temperature > 0 and params.num_beams == 1
            seed = int(torch.randint(2**63 - 1, ())) if draws else 0
        self.scheduler.check_rows(params)  # before a request makes its sequences
        self._check(tokens, params, special_stops, bad_words)
        params = self._with_length(tokens, params)
        form = params.structured_outputs
        grammar = None if form is None else self.grammars.compile(form)
        request = Request(self._submitted, tokens, params, seed, self.eos_token_ids, special_stops, bad_words, grammar)
        state = RequestState(request, self.tokenizer, on_token, arrival)
        self.scheduler.submit(request)
        self._submitted += 1
        self._requests[request.id] = state
        self._backend_is_current = False
        return request.id

    def _with_length(self, tokens: list[int], params: SamplingParams) -> SamplingParams:
        """Refuse prompts and lengths beyond the limit; return parameters whose `max_tokens` is a number."""
        limit, given = self.max_sequence_length, len(tokens)
        longer = "make an engine for longer sequences" if limit < self._longest else "it is the model's limit"
        if given >= limit:
            raise ValueError(
                f"prompt has {given} tokens, but max_sequence_length={limit}, so no token can follow: shorten the "
                f"prompt ({longer})."
            )
        if params.max_tokens is not None:
            if given + params.max_tokens > limit:
                raise ValueError(
                    f"prompt has {given} tokens and max_tokens={params.max_tokens}, but max_sequence_length={limit}: "
                    f"shorten one of them, or give max_tokens=None for as many as fit ({longer})."
                )
            return params
        most = min(limit - given, self.scheduler.blocks.most_tokens(given, params.n, params.num_beams))
        if most < max(1, params.min_tokens):
            raise ValueError(
                f"prompt has {given} tokens and min_tokens={params.min_tokens}, but max_sequence_length={limit} and "
                f"total_num_pages={self.scheduler.blocks.pool.total_num_pages} leave room for {most}: shorten one of "
                "them, or make an engine for more."
            )
        return dataclasses.replace(params, max_tokens=most)

    def _check(
        self, tokens: list[int], params: SamplingParams, special_stops: dict[str, int], bad_words: list[list[int]]
    ) -> None:
        """Refuse tokens and texts that the model or the tokenizer does not have."""
        if not tokens:
            raise ValueError("prompt has no tokens: give at least one, such as the BOS token.")
        vocab_size = self.model.lm_head.out_features
        for name, ids in (
            ("prompt", tokens),
            ("stop_token_ids", params.stop_token_ids),
            ("stop", special_stops.values()),
            ("logit_bias", params.logit_bias or ()),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("bad_words", [token for word in bad_words for token in word]),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(
                    f"{name} has the tokens {min(ids)} to {max(ids)}, but the model knows 0 to {vocab_size - 1}: use "
                    "the model's own tokenizer."
                )
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop={params.stop!r} needs text, but the engine has no tokenizer: give it one, or use stop_token_ids."
            )
        if params.bad_words and self.tokenizer is None:
            raise ValueError(
                f"bad_words={params.bad_words!r} needs tokens, but the engine has no tokenizer: give it one, or use "
                "logit_bias or allowed_token_ids."
            )
        allowed: Sequence[int] | None = params.allowed_token_ids
        forbidden = {word[-1] for word in bad_words}
        if params.min_tokens:
            forbidden.update(params.stop_token_ids, special_stops.values())
            forbidden.update(() if params.ignore_eos else self.eos_token_ids)
        if all(token in forbidden for token in (range(vocab_size) if allowed is None else allowed)):
            raise ValueError(
                f"allowed_token_ids={shown(allowed)} leaves no token that min_tokens={params.min_tokens} and bad_words="
                f"{shown(params.bad_words)} do not forbid: allow more tokens, or give fewer stop_token_ids."
            )

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                "the engine cannot be used any more: a step failed, and starting over failed with "
                f"{type(self._failure).__name__}: {self._failure}. Make a new engine; after a CUDA error, in a new "
                "process."
            ) from self._failure

    def _forget(self, ids: Sequence[int] | set[int]) -> None:
        """Cancel requests, and drop their outputs."""
        for request_id in ids:
            if (state := self._requests.get(request_id)) is not None:
                self._end(state)
            self._outputs.pop(request_id, None)

    # --- stepping -----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Take the memory of the cache, and make what works with it."""
        self._cache = self._make_cache()
        self._layers = LayersDecode(self.model, self._cache)
        self._fused: FusedDecode | None = None
        self._fused_prefill: FusedPrefill | None = None
        self._decode = self._select_backend()
        self._make_runner()
        self.is_asleep = False

    def _make_runner(self) -> None:
        self._runner = ModelRunner(self.model, self._cache, self._decode, self._fused_prefill)

    def _forget_requests(self) -> None:
        self._requests: dict[int, RequestState] = {}  # in progress
        self._pending: Pending | None = None
        self._is_stepping = False
        self.scheduler = self._make_scheduler()

    def _start_over(self) -> None:
        """Forget all requests, and the content of the cache."""
        self._forget_requests()
        self._make_runner()

    def _recover(self, error: BaseException) -> None:
        """Start over after a step that failed. If that fails too, further requests are refused."""
        for state in self._requests.values():
            state.lost_in = f"{type(error).__name__}: {error}"
        self._fused, self._fused_prefill, self._backend_is_current = None, None, False
        try:
            self._start_over()
        except Exception as failure:  # such as a CUDA error, which stays until the process ends
            self._failure = failure

    def _select_backend(self) -> DecodeBackend:
        if has_own_forward(self.model, self.model):
            _warn_of_unused_hooks()
        self._fused, _ = select_backend(self.model, self._cache, self._rows, self.decode_implementation, self._fused)
        self._fused_prefill = select_prefill(self.model, self._cache, self._fused, self._fused_prefill)
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
            cache_format = checked_cache_format(self.model, self.kv_cache_dtype, self._cache.storage.page_size)
            self._cache.convert(cache_format.dtype)
            self.scheduler.blocks.forget_prefixes()
        self._decode = self._runner.decode = self._select_backend()
        self._runner.prefill.fused = self._fused_prefill

    def _fits_autocast(self) -> bool:
        """Return whether the cache has the dtype that the layers compute in, which autocast changes."""
        return self._cache.dtype == computing_dtype(self.model.get_input_embeddings().weight)

    def _advance(self) -> None:
        """Launch a step, and read the results of the step before."""
        with evaluating(self.model), torch.inference_mode():
            self._advance_evaluated()

    def _advance_evaluated(self) -> None:
        self._check_usable()
        if self.is_asleep:
            return  # requests wait, if there are any
        self._refuse_nested_step()
        previous = self._decode  # its graph may still run: it stays until the step before has been read
        has_adapters = self._watch is not None and self._watch.has_adapters
        if not self._backend_is_current or has_adapters or not self._fits_autocast():
            self._follow_model()
        self._is_stepping = True
        try:
            plan = self.scheduler.plan(self._held_from)
            for request in dict.fromkeys(s.request for s in plan.beginning if s.request.has_beams):
                self._requests[request.id].begin_search()
            self._count_step(plan)
            launched = None if plan.is_empty else self._runner.launch(plan, self._pending)
            for request, error in launched.failed if launched is not None else ():
                if (state := self._requests.get(request.id)) is not None:
                    self._end(state, error=error)
            if self._watch is not None and self._watch.has_adapters:
                self._watch.accept()
            pending, self._pending = self._pending, launched
            if pending is not None:
                self._read(pending.result())
        except BaseException as error:
            # Interrupted, or out of memory: the state of the step is unknown, so no request can continue.
            self._recover(error)
            raise
        del previous
        self._is_stepping = False
        if not self._requests:
            self._pending = None  # no request needs its results

    def _refuse_nested_step(self) -> None:
        if self._is_stepping:
            raise RuntimeError("a callback has called step, generate or stream: it may call submit and cancel only.")

    def _read_last_step(self) -> None:
        """Read the results of the launched step, which have not been read yet, and launch none."""
        self._refuse_nested_step()
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._is_stepping = True
        try:
            with torch.inference_mode():
                self._read(pending.result())
        except BaseException as error:  # as in a step
            self._recover(error)
            raise
        self._is_stepping = False

    def _count_step(self, plan: Plan) -> None:
        """Count the tokens of a step that is about to run, and note which requests begin."""
        counters = self._counters
        counters.num_preemptions += plan.preempted
        if not plan.is_empty:
            read = sum(len(chunk.tokens) for chunk in plan.chunks)
            counters.step_tokens.add(read + len(plan.running) + len(plan.beginning))
        for chunk in plan.chunks:
            state = self._requests[chunk.sequence.request.id]
            if state.scheduled is None:
                state.scheduled, state.num_cached_tokens = time.monotonic(), chunk.start
                if self.scheduler.blocks.reuses_prefix(state.request):
                    counters.prefix_cache_queries += len(state.request.prompt)
                    counters.prefix_cache_hits += chunk.start

    def _read(self, result: StepResult) -> None:
        self._now = time.monotonic()
        self._times_before: list[float | None] = []  # when the tokens before the new ones arrived
        for request, position, logprobs in result.prompt_logprobs:
            if request.id in self._requests:
                records = records_of(logprobs, request.params.prompt_logprobs or 0)
                self._requests[request.id].add_prompt_logprobs(position, records)
        by_kind: dict[tuple[int, bool], list[bytes]] = {}  # the records of all sequences, as some of them want theirs
        for i, (sequence, token) in enumerate(result.tokens):
            params, record = sequence.request.params, None
            if params.logprobs is not None:
                assert result.logprobs is not None
                kind = params.logprobs, params.logprobs_mode == "processed"
                if kind not in by_kind:
                    by_kind[kind] = records_of(result.logprobs, *kind)
                record = by_kind[kind][i]
            self._append(sequence, token, record)
        for beams in result.beams:
            self._follow(beams)
        self._counters.add_tokens(self._now, self._times_before)

    def _append(self, sequence: Text, token: int, record: bytes | None = None) -> None:
        """Append a token to a sequence; it may be the last one. `record` has its log-probabilities."""
        state = self._requests.get(sequence.request.id)
        if state is None or sequence.finish_reason is not None:
            if token == NO_TOKEN:
                self._clean()
            return  # it ended while this step was running, or a callback has just ended it
        try:
            state.add_token(sequence, token, record)
        except Exception as error:  # of any kind: it concerns this request alone, and the others continue
            self._end(state, error=error)
            return
        if state.first_token is None:
            state.first_token = self._now
            self._counters.time_to_first_token_seconds.add(self._now - state.arrival)
            self._counters.prompt_tokens += len(state.request.prompt)
        self._times_before.append(sequence.last_token)
        sequence.last_token = self._now
        if sequence.finish_reason is not None:
            self.scheduler.remove([sequence])
        self._call_back(state, sequence, token, record)
        if sequence.finish_reason is not None and state.request.is_finished:
            self._end(state)

    def _follow(self, beams: BeamResult) -> None:
        """Take a search one step further; it may be the last one."""
        request, state = beams.request, self._requests.get(beams.request.id)
        if state is None:
            return  # it ended while this step was running
        assert state.history is not None
        try:
            state.history.add(
                beams.candidate_tokens,
                beams.candidate_sources,
                beams.candidate_scores,
                beams.text_ends,
                beams.candidate_logprobs,
                beams.top,
            )
        except Exception as error:  # as in `_append`
            self._end(state, error=error)
            return
        if not state.history.done:
            self.scheduler.blocks.reorder(request.sequences, beams.sources, beams.length)
            return
        self.scheduler.remove(request.sequences, is_read=False)  # the launched step continues other beams
        for sequence, hypothesis in state.keep_best():
            wanted, positions = request.params.logprobs, hypothesis.positions
            for index, token in enumerate(hypothesis.token_ids):
                record = None
                if wanted is not None and positions is not None:
                    record = record_of(*positions[index], wanted)
                if sequence.grammar is not None:
                    sequence.grammar.add(token)
                self._append(sequence, token, record)

    def _call_back(self, state: RequestState, sequence: Text, token: int | None, record: bytes | None = None) -> None:
        """Call the request's callback; end the request if it raises."""
        if state.on_token is None:
            return
        try:
            state.on_token(state.event(sequence, token, record))
        except Exception as error:  # as in `_append`
            state.on_token = None
            state.error = state.error or error
            self._end(state, error=error)

    def _end(self, state: RequestState, error: Exception | None = None) -> None:
        """Make the output of a request. Its unfinished sequences end as "cancelled", or with the error."""
        request = state.request
        if self._requests.pop(request.id, None) is None:
            return  # a callback has ended it
        self.scheduler.remove(request.sequences, is_read=request.is_finished)
        if isinstance(error, FloatingPointError):
            self._clean()
        for sequence in state.end(error):
            self._call_back(state, sequence, None)
        self._outputs[request.id] = state.output()

    def _clean(self) -> None:
        """Clear the pages that no running request needs: they may have NaN, which would spoil their next texts.

        Attention multiplies what is behind a text's last token in its last page by 0, and 0 times NaN is NaN.
        """
        self.scheduler.blocks.forget_prefixes()
        self._cache.clear_pages(self.scheduler.blocks.pool.free)
