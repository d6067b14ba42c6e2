"""The fused decoding step: kernels for few tokens use the model's own weights, and CUDA graphs replay them.

The step follows the model's layers in the same order and with the same roundings. There is one exception: RMSNorm's
factor of a row multiplies the product after the norm. A step reads its inputs (tokens, lengths, pages) from device
memory, so one graph launch runs it and the host supplies nothing.

Shapes: B rows, R rows allocated, E hidden size, V vocabulary, Q features of the fused projection, F size of the MLP,
H query heads, K key/value heads, G a key/value head's share of the fused projection, D size of a head, P positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

import torch

from llama_te_core.compat.torch import fp8_product

from ..kv_cache.step import CacheStep
from ..kv_cache.storage import tensors_of
from ..ops import library
from ..ops.decode_attention import decode_attention, takes_decode_attention, workspace_size
from ..ops.embed import embed
from ..ops.linear import LinearWorkspace, Product, linear_chain, one_at_a_time, takes_linear
from ..ops.quantize_rows import quantize_rows
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu
from .buckets import bucket_of
from .greedy import GreedyWorkspace, take_likeliest
from .inputs import StepInputs
from .weights import LayerWeights, Weight, addresses_of

# Up to so many rows stay in bfloat16 beside FP8 weights, which `linear` widens. With more rows that takes longer than
# rounding the rows to FP8: a step of Llama 3 8B takes 3.1 ms with 16 rows, and took 4.2 ms with 32 (H200).
MOST_WIDENING_ROWS = 16


def takes_fused_decode(model: Any, rows: int, page_size: int | None, layers: list[LayerWeights]) -> bool:
    """Return whether there are kernels for this model's dtype and sizes.

    Args:
        model: An `NVLlamaForCausalLM` whose layers are as they were built; see `decode_problem`.
        rows: Most rows of a step.
        page_size: Tokens of a page of the cache; None for a contiguous cache.
        layers: From `layer_weights`.
    """
    config, dtype = model.config, model.get_input_embeddings().weight.dtype
    group = config.num_attention_heads // config.num_key_value_heads
    if dtype != torch.bfloat16 or not library.available(model.device.type):
        return False
    if rows > library.limits().max_decode_rows:
        return False
    if not takes_decode_attention(dtype, group, config.head_dim, page_size):
        return False
    if len(layers) < len(model.model.layers):
        return False
    return all(
        all(takes_linear(part.values) for part in weights if isinstance(part, Weight))
        and weights.attention_norm_E.dtype == weights.mlp_norm_E.dtype == dtype
        for weights in layers
    ) and (takes_linear(model.lm_head.weight) and model.model.norm.weight.dtype == dtype)


class FusedDecode:
    """A decoding step in a few kernels per layer. An implementation of `DecodeBackend`.

    Products use the weights in the model's own format. Activations are bfloat16, but those of more than
    `MOST_WIDENING_ROWS` rows meet FP8 weights in FP8. Layers that `layer_precision` runs in FP8 from bfloat16 weights
    decode in bfloat16.

    The step keeps the addresses of the weights and of the cache's memory; `is_for` says whether they are still valid.
    It holds no reference to the cache itself, so a cache may own its step.

    Args:
        model: An `NVLlamaForCausalLM` in which `decode_problem` finds no problem.
        cache: The model's cache, with allocated memory for all layers.
        rows: R.
        layers: The layers' weights, from `layer_weights`.
    """

    # Inference mode is off: code outside inference mode could not write to its tensors later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Any, cache: CacheStep, rows: int, layers: list[LayerWeights]) -> None:
        config, device = model.config, cache.device
        self.rows = rows
        self.caches = dict(cache.caches)
        self.layers = layers
        self.table_VE = model.model.embed_tokens.weight.detach()
        self.head = Weight(model.lm_head.weight.detach())
        self.norm_E = model.model.norm.weight.detach()
        self.epsilon = float(config.rms_norm_eps)
        self.scale = float(model.model.rotary_angles.softmax_scale)
        self.cos_sin_PD = cache.cos_sin(model.model.rotary_angles(cache.max_sequence_length, device))
        kv_heads = config.num_key_value_heads
        heads_of_group = config.num_attention_heads // kv_heads + 2
        self.shape_KGD = (kv_heads, heads_of_group, config.head_dim)

        def memory(*shape: int) -> torch.Tensor:
            return torch.zeros(rows, *shape, dtype=cache.dtype, device=device)

        self.hidden_RE = memory(config.hidden_size)
        self.qkv_RQ = memory(kv_heads * heads_of_group * config.head_dim)
        self.context_RHD = memory(config.num_attention_heads, config.head_dim)
        self.activation_RF = memory(config.intermediate_size)
        self.logits_RV = memory(model.lm_head.out_features)
        size = 0
        if device.type == "cuda":
            size = workspace_size(rows, kv_heads, heads_of_group - 2, config.head_dim, cache.max_sequence_length)
        self.attention_workspace = torch.zeros(size, dtype=torch.int32, device=device)
        self.linear_workspace = LinearWorkspace(device)
        self.greedy_workspace = GreedyWorkspace(rows, device)
        self._addresses = _addresses(model, cache, layers)
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._inputs: StepInputs | None = None
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}  # by kind of step and number of rows

    def is_for(self, model: Any, cache: CacheStep, rows: int, layers: list[LayerWeights]) -> bool:
        """Return whether the step was made for this many rows, and its weights, keys and values are still in place."""
        return self.rows == rows and self._addresses == _addresses(model, cache, layers)

    def __call__(self, inputs: StepInputs, rows: int) -> torch.Tensor:
        """See `DecodeBackend`. The next step overwrites the logits."""
        self._run(self._compute, inputs, rows)
        return self.logits_RV[:rows]

    def advance(self, inputs: StepInputs, rows: int) -> None:
        """See `DecodeBackend`."""
        self._run(self._advance, inputs, rows)

    def _run(self, step: Callable[[StepInputs, int], None], inputs: StepInputs, rows: int) -> None:
        """Run a step for a bucket of rows. The rows after the batch have no tokens."""
        rows = bucket_of(rows, self.rows)
        if self._device.type != "cuda":
            step(inputs, rows)
            return
        if inputs is not self._inputs:
            self._inputs = inputs
            self._graphs.clear()
        key = (step.__name__, rows)
        if key not in self._graphs:
            # Libraries initialise themselves at their first product, and a capture must not include that. This run
            # stores the same keys and values as the step will.
            self._compute(inputs, rows)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                step(inputs, rows)
            self._graphs[key] = graph
        with one_at_a_time(self._device):
            self._graphs[key].replay()

    def _compute(self, inputs: StepInputs, rows: int) -> None:
        hidden_BE, qkv_BQ = self.hidden_RE[:rows], self.qkv_RQ[:rows]
        context_BHD, activation_BF = self.context_RHD[:rows], self.activation_RF[:rows]
        qkv_BKGD, context_BX = qkv_BQ.unflatten(1, self.shape_KGD), context_BHD.flatten(1)
        embed(inputs.token_R[:rows], self.table_VE, hidden_BE)
        products = [self.projection(0, hidden_BE, qkv_BQ)]
        for number, layer in enumerate(self.layers, 1):
            self._multiply(products)
            keys, values, *scales = self.caches[number]
            decode_attention(
                qkv_BKGD,
                self.cos_sin_PD,
                inputs.length_R,
                inputs.page_table_RP,
                self.scale,
                keys,
                values,
                context_BHD,
                self.attention_workspace,
                *scales,
            )
            products = self.after_attention(layer, context_BX, hidden_BE, activation_BF)
            if number < len(self.layers):
                products.append(self.projection(number, hidden_BE, qkv_BQ))
            else:
                logits_BV = self.logits_RV[:rows]
                products.append(self._product(hidden_BE, self.head, logits_BV, norm_weight=self.norm_E))
        self._multiply(products)

    def _advance(self, inputs: StepInputs, rows: int) -> None:
        self._compute(inputs, rows)
        take_likeliest(self.logits_RV[:rows], inputs.token_R[:rows], self.greedy_workspace, inputs.length_R[:rows])

    def projection(self, index: int, hidden_BE: torch.Tensor, qkv_BQ: torch.Tensor) -> Product:
        """Return a layer's product before attention, of any number of rows.

        Args:
            index: Of the layer, from 0.
            hidden_BE: The hidden states.
            qkv_BQ: The output.
        """
        layer = self.layers[index]
        return self._product(hidden_BE, layer.qkv_QE, qkv_BQ, norm_weight=layer.attention_norm_E)

    def after_attention(
        self, layer: LayerWeights, context_BX: torch.Tensor, hidden_BE: torch.Tensor, activation_BF: torch.Tensor
    ) -> list[Product]:
        """Return a layer's products after attention, of any number of rows.

        Args:
            layer: The layer's weights.
            context_BX: Attention's output.
            hidden_BE: The hidden states, to which the products add.
            activation_BF: Memory for the activation.
        """
        return [
            self._product(context_BX, layer.proj_EX, hidden_BE, residual=hidden_BE),
            self._product(hidden_BE, layer.fc1_FE, activation_BF, norm_weight=layer.mlp_norm_E, swiglu=True),
            self._product(activation_BF, layer.fc2_EF, hidden_BE, residual=hidden_BE),
        ]

    def _product(
        self,
        input_BK: torch.Tensor,
        weight: Weight,
        output_BN: torch.Tensor,
        *,
        norm_weight: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        swiglu: bool = False,
    ) -> Product:
        return Product(input_BK, weight.values, output_BN, weight.scale, norm_weight, self.epsilon, residual, swiglu)

    def _multiply(self, products: list[Product]) -> None:
        """Compute products in order: each may read the previous output."""
        rows, most_rows = len(products[0].input), library.limits().max_linear_rows
        if rows > most_rows:
            # Arithmetic limits products of more rows, and cuBLAS reaches that limit.
            multiply_many(products)
            return
        for is_fp8, some in groupby(products, lambda product: product.scale is not None):
            if is_fp8 and rows > MOST_WIDENING_ROWS:
                multiply_many(list(some))
            else:
                linear_chain(list(some), self.linear_workspace)


def multiply_many(products: list[Product]) -> None:
    """Compute products with any number of rows, in order: each may read the previous output.

    Products with FP8 weights round their rows to FP8. An activation that only such a product reads is not stored.
    """
    defer = [_defers_scales(product, following) for product, following in zip_longest(products, products[1:])]
    addend: _Deferred | None = None
    rounded: _Rounded | None = None  # an activation that the following product reads in FP8
    for product, following, defers, following_defers in zip_longest(products, products[1:], defer, defer[1:]):
        output_BN = product.output
        factors = product.input if rounded is None else rounded
        rounded = None
        if product.norm_weight is not None:
            product_BK, scale_B = addend or (None, None)
            addend = None
            norm = functools.partial(rms_norm, product.input, product.norm_weight, product.epsilon)
            factors = _computed(norm, product.input, product, defers, addend=product_BK, addend_scale=scale_B)
        elif product.scale is not None and isinstance(factors, torch.Tensor):
            factors = _computed(functools.partial(quantize_rows, product.input), product.input, product, defers)
        is_stored = product.residual is None and not product.swiglu
        product_BN = _times_weight(factors, product, defers, output_BN if is_stored else None)
        scale_B = factors.scale_B if defers and isinstance(factors, _Rounded) else None
        if product.swiglu:
            activate = functools.partial(swiglu, product_BN, input_scale=scale_B)
            if following is not None and following.input is output_BN and following.scale is not None:
                result = _computed(activate, output_BN, following, following_defers)
                assert isinstance(result, _Rounded)
                rounded = result  # nobody else reads the activation
            else:
                activate(output=output_BN)
        elif defers:
            addend = _Deferred(product_BN, scale_B)
        elif product.residual is not None:
            # The product is rounded before the addition, as in a layer of single operations.
            torch.add(product_BN, product.residual, out=output_BN)


class _Rounded(NamedTuple):
    """Rows in FP8. Their scales, [B], include that of the weight that they meet, unless the product defers scales."""

    value_BK: torch.Tensor
    scale_B: torch.Tensor


class _Deferred(NamedTuple):
    """A product that the following norm adds to the residual, and what still multiplies its rows."""

    product_BK: torch.Tensor
    scale_B: torch.Tensor | None


def _defers_scales(product: Product, following: Product | None) -> bool:
    """Return whether the operator behind a product takes the scales of its rows.

    cuBLAS is slower with scales of rows: the products of a layer of Llama 3 8B take 102 instead of 66 us with 32 rows,
    and 127 instead of 98 us with 256 rows (H200).
    """
    is_addend = product.residual is product.output and following is not None and _norms(following, product.output)
    return product.swiglu or is_addend


def _computed(
    operator: Callable[..., None], like_BK: torch.Tensor, product: Product, defers: bool, **options: Any
) -> torch.Tensor | _Rounded:
    """Return the output of an operator, in FP8 if the weight of the product that reads it has a scale."""
    if product.scale is None:
        output_BK = torch.empty_like(like_BK)
        operator(output=output_BK, **options)
        return output_BK
    value_BK = torch.empty_like(like_BK, dtype=torch.float8_e4m3fn)
    scale_B = torch.empty(len(like_BK), dtype=torch.float32, device=like_BK.device)
    operator(output=value_BK, scale=scale_B, factor=None if defers else product.scale, **options)
    return _Rounded(value_BK, scale_B)


def _times_weight(
    factors: torch.Tensor | _Rounded, product: Product, defers: bool, output_BN: torch.Tensor | None
) -> torch.Tensor:
    """Multiply rows with a product's weight, and with nothing else of it."""
    weight_KN, device = product.weight.T, product.weight.device
    if isinstance(factors, torch.Tensor):
        return torch.mm(factors, weight_KN, out=output_BN)
    assert product.scale is not None
    scales = (_ones(1, device)[0], product.scale)
    if not defers:
        scales = (factors.scale_B[:, None], _ones(weight_KN.shape[1], device))
    return fp8_product(factors.value_BK, weight_KN, *scales, product.output.dtype, output_BN)


@functools.cache
@torch.inference_mode(False)
def _ones(features: int, device: torch.device) -> torch.Tensor:
    """Return the scales of a weight's rows, whose one scale is in the scales of the input's rows already."""
    return torch.ones(1, features, device=device)


def _norms(product: Product, hidden_BK: torch.Tensor) -> bool:
    return product.norm_weight is not None and product.input is hidden_BK


def _addresses(model: Any, cache: CacheStep, layers: list[LayerWeights]) -> list[int]:
    return addresses_of(model, layers) + [tensor.data_ptr() for tensor in tensors_of(cache.caches)]
