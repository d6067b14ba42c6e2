"""Generation with the caches of this project, as a mixin for transformers' `generate`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import GenerationMixin

from ..compat.entry_points import installed_function
from ..compat.transformers import mark_as_given, prefill
from ..layers.kv_cache import KVCache, default_cache_factory
from .arguments import CACHE_FIELD, given_cache

ENTRY_POINT_GROUP = "llama_te_core.generation"


class CachedGenerationMixin(GenerationMixin):
    """`generate` with a `KVCache`, in place of transformers' own caches.

    A class that uses it has a `config` and a method `check_cache`.
    """

    config: Any

    def check_cache(self, cache: Any, rows: int) -> KVCache:
        """Refuse a cache that does not fit the model, or has fewer than `rows` rows; see `kv_cache.check_cache`."""
        raise NotImplementedError

    def generate(self, *args: Any, past_key_values: Any | None = None, cache: Any | None = None, **kwargs: Any) -> Any:
        """Generate text by transformers' own method. It accepts the cache by either name, here and in transformers."""
        cache = given_cache(past_key_values, cache)
        if cache is not None:
            kwargs[CACHE_FIELD] = cache
        return super().generate(*args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Continue prompts of tokens, as many at the same time as fit: see `llama_te_infer.continuous_batching`.

        It takes and returns what transformers' `generate_batch` does.

        Raises:
            ImportError: llama-te-infer is not installed.
            NotImplementedError: transformers' `generate` calls it for cache_implementation="paged", with padded rows.
        """
        if kwargs.get("cache_implementation") is not None:
            self.init_continuous_batching()
        function = installed_function(ENTRY_POINT_GROUP, "generate_batch")
        if function is None:
            raise ImportError("generate_batch runs on the engine of llama-te-infer: pip install llama-te-infer.")
        results: dict[str, Any] = function(self, inputs, *args, **kwargs)
        return results

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: transformers' continuous batching computes attention in functions that the layers do not call.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "init_continuous_batching and cache_implementation='paged' (transformers' continuous batching) do not work "
            f"with {type(self).__name__}. Use model.generate_batch, or llama_te_infer.Engine, which takes requests at "
            "any time."
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Make a cache that the layers can use, or check the given one. `generate` calls this."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: the layers cannot use transformers' "
                "own caches. Leave it out, or pass a llama_te_infer.InferenceParams as past_key_values."
            )
        given = model_kwargs.get(CACHE_FIELD)
        rows = batch_size * _rows_of_a_prompt(generation_config)
        if given is None and generation_config.use_cache is not False:
            factory = default_cache_factory()
            if factory is None:
                generation_config.use_cache = False
                return None
            model_kwargs[CACHE_FIELD] = factory(self, batch_size=rows, max_length=max_cache_length)
        elif given is not None:
            model_kwargs[CACHE_FIELD] = self.check_cache(given, rows)
            mark_as_given(model_kwargs[CACHE_FIELD])
        return None

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate reads the signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of the next forward pass. The cache is named `past_key_values`, as PEFT expects it."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if CACHE_FIELD in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE_FIELD)
        return inputs

    def _prefill(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute each prompt once, then copy its row of the cache.

        `generate` calls this with one row for each beam or returned sequence of a prompt.
        """
        cache = model_kwargs.get(CACHE_FIELD)
        copies = _rows_of_a_prompt(generation_config)
        # A cache with content may have other content in each of the rows.
        if copies == 1 or cache is None or cache.get_seq_length() > 0:
            return prefill(CachedGenerationMixin, self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        rows = input_ids.shape[0]
        once = {
            name: value[::copies] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value
            for name, value in model_kwargs.items()
        }
        outputs = prefill(CachedGenerationMixin, self, input_ids[::copies], generation_config, once, *args, **kwargs)
        cache.repeat_rows(copies)
        outputs.logits = outputs.logits.repeat_interleave(copies, 0)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(hidden.repeat_interleave(copies, 0) for hidden in outputs.hidden_states)
        return outputs


def _rows_of_a_prompt(generation_config: Any) -> int:
    """Return the number of rows that `generate` makes of each prompt."""
    return max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
