"""A step of decoding by kernels made for few tokens, over the model's own weights, replayed from CUDA graphs.

It computes what the model's layers compute, in the same order and with the same roundings, except for one: RMSNorm's
factor of a row multiplies the product behind it. What changes from step to step (tokens, lengths, pages) is read from
the device's memory, so a step is one launch of a graph, and needs nothing from the host.

Shapes: B rows, R rows there may be, E hidden size, V vocabulary, Q features of the fused projection, F size of the MLP,
H query heads, K key/value heads, G a key/value head's share of the fused projection, D size of a head, P positions.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional as F

from ..ops import library
from ..ops.decode_attention import decode_attention, takes_decode_attention, workspace_size
from ..ops.embed import embed
from ..ops.linear import LinearWorkspace, Product, linear_chain, one_at_a_time, takes_linear
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu
from ..runner.sampler import take_likeliest

if TYPE_CHECKING:
    from ..generate.inference_params import InferenceParams
    from ..runner.model_runner import DecodeState

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


class Weight(NamedTuple):
    """A weight as the kernels take it.

    Attributes:
        values: [N, K], bfloat16 or float8_e4m3fn.
        scale: float32 [1], what FP8 values are multiplied by.
    """

    values: torch.Tensor
    scale: torch.Tensor | None = None


class StepRows(NamedTuple):
    """What a step reads of its rows from the device's memory, where there is no `DecodeState`.

    Attributes:
        token_R: int64, the last token of each row, which is not in the cache.
        length_R: int32, tokens in the cache.
        page_table_RP: int32; `None` for a contiguous cache.
    """

    token_R: torch.Tensor
    length_R: torch.Tensor
    page_table_RP: torch.Tensor | None


class LayerWeights(NamedTuple):
    """What a decoder layer has."""

    attention_norm_E: torch.Tensor
    qkv_QE: Weight
    proj_EX: Weight
    mlp_norm_E: torch.Tensor
    fc1_FE: Weight
    fc2_EF: Weight


def takes_fused_decode(model: Any, rows: int, page_size: int | None) -> bool:
    """Whether the kernels can run this model.

    Args:
        model: An `NVLlamaForCausalLM`.
        rows: Most rows of a step.
        page_size: Of the cache, None for a contiguous one.
    """
    config, dtype = model.config, model.get_input_embeddings().weight.dtype
    group = config.num_attention_heads // config.num_key_value_heads
    # Within PEFT's adapters: they compute more than the products of the weights.
    if any("base_layer" in module._modules for module in model.modules()):
        return False
    if dtype != torch.bfloat16 or not library.available(model.device.type):
        return False
    if rows > library.limits().max_decode_rows:
        return False
    if not takes_decode_attention(dtype, group, config.head_dim, page_size):
        return False
    layers = [weights_of(layer) for layer in model.model.layers]
    return all(
        weights is not None
        and all(takes_linear(part.values) for part in weights if isinstance(part, Weight))
        and weights.attention_norm_E.dtype == weights.mlp_norm_E.dtype == dtype
        for weights in layers
    ) and (takes_linear(model.lm_head.weight) and model.model.norm.weight.dtype == dtype)


def weights_of(layer: Any) -> LayerWeights | None:
    """The weights of a decoder layer of either kind; `None` where one is in a format that the kernels do not take."""
    attention, mlp = layer.self_attention, layer.layernorm_mlp
    products = [
        _weight(parameter)
        for parameter in (attention.layernorm_qkv.weight, attention.proj.weight, mlp.fc1_weight, mlp.fc2_weight)
    ]
    qkv, proj, fc1, fc2 = products
    if qkv is None or proj is None or fc1 is None or fc2 is None:
        return None
    return LayerWeights(
        attention.layernorm_qkv.layer_norm_weight.detach(), qkv, proj, mlp.layer_norm_weight.detach(), fc1, fc2
    )


def _weight(parameter: torch.Tensor) -> Weight | None:
    if type(parameter) in (torch.Tensor, torch.nn.Parameter):
        return Weight(parameter.detach())
    # One of Transformer Engine's, which is there then.
    from llama_te_core.layers.te import fp8_parts

    parts = fp8_parts(parameter)
    return None if parts is None else Weight(*parts)


class FusedDecode:
    """A step of decoding in a few kernels per layer. An implementation of `DecodeStep`.

    Weights are multiplied in the format in which the model holds them, activations in bfloat16: layers that
    `layer_precision` computes in FP8 from bfloat16 weights decode in bfloat16.

    Args:
        model: An `NVLlamaForCausalLM` that `takes_fused_decode`.
        cache: Of this model, with the memory of all layers.
        rows: R.
    """

    def __init__(self, model: Any, cache: InferenceParams, rows: int) -> None:
        config, device = model.config, cache.device
        self.cache = cache
        self.layers: list[LayerWeights] = [weights for layer in model.model.layers if (weights := weights_of(layer))]
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
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}  # of the one state that there is

    def __call__(self, state: DecodeState | StepRows, rows: int) -> torch.Tensor:
        """See `DecodeStep`. The logits are good until the next step."""
        self._run(self._compute, state, rows)
        return self.logits_RV[:rows]

    def advance(self, state: DecodeState, rows: int) -> None:
        """See `DecodeStep`."""
        self._run(self._advance, state, rows)

    def _run(self, step: Callable[[Any, int], None], state: DecodeState | StepRows, rows: int) -> None:
        """Run a step for as many rows, or a few more: those behind have no tokens."""
        rows = min(next(size for size in (*BUCKETS, rows) if size >= rows), len(self.hidden_RE))
        if self.cache.device.type != "cuda":
            step(state, rows)
            return
        key = (step.__name__, rows)
        if key not in self._graphs:
            # Ahead of it, what libraries do once: a product of no step. It stores nothing that the step will not.
            self._compute(state, rows)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                step(state, rows)
            self._graphs[key] = graph
        with one_at_a_time(self.cache.device):
            self._graphs[key].replay()

    def _compute(self, state: DecodeState | StepRows, rows: int) -> None:
        hidden_BE, qkv_BQ = self.hidden_RE[:rows], self.qkv_RQ[:rows]
        context_BHD, activation_BF = self.context_RHD[:rows], self.activation_RF[:rows]
        qkv_BKGD, context_BX = qkv_BQ.unflatten(1, self.shape_KGD), context_BHD.flatten(1)
        embed(state.token_R[:rows], self.table_VE, hidden_BE)

        def projection(layer: LayerWeights) -> Product:
            return self._product(hidden_BE, layer.qkv_QE, qkv_BQ, norm_weight=layer.attention_norm_E)

        products = [projection(self.layers[0])]
        for number, layer in enumerate(self.layers, 1):
            self._multiply(products)
            decode_attention(
                qkv_BKGD,
                self.cos_sin_PD,
                state.length_R,
                state.page_table_RP,
                self.scale,
                *self.cache.cache_manager.cache[number],
                context_BHD,
                self.attention_workspace,
            )
            products = [
                self._product(context_BX, layer.proj_EX, hidden_BE, residual=hidden_BE),
                self._product(hidden_BE, layer.fc1_FE, activation_BF, norm_weight=layer.mlp_norm_E, swiglu=True),
                self._product(activation_BF, layer.fc2_EF, hidden_BE, residual=hidden_BE),
                projection(self.layers[number])
                if number < len(self.layers)
                else self._product(hidden_BE, self.head, self.logits_RV[:rows], norm_weight=self.norm_E),
            ]
        self._multiply(products)

    def _advance(self, state: DecodeState, rows: int) -> None:
        self._compute(state, rows)
        take_likeliest(self.logits_RV[:rows], state.token_R[:rows], state.sampling, state.length_R[:rows])

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
        """Do products of which each may need the one before."""
        rows, most_rows = len(products[0].input), library.limits().max_linear_rows
        for is_fp8, some in groupby(products, lambda product: product.scale is not None):
            if is_fp8 or rows <= most_rows:
                # FP8 weights are read again for each so many rows, which takes less than widening them would.
                whole = list(some)
                for first in range(0, rows, most_rows):
                    part = slice(first, first + most_rows)
                    linear_chain([_rows_of(product, part) for product in whole], self.linear_workspace)
            else:
                # For more rows a product is bound by arithmetic, and cuBLAS is at the limit of that.
                _multiply_many(list(some))


def _rows_of(product: Product, rows: slice) -> Product:
    residual = None if product.residual is None else product.residual[rows]
    return product._replace(input=product.input[rows], output=product.output[rows], residual=residual)


def _multiply_many(products: list[Product]) -> None:
    """Products of bfloat16 weights with any number of rows, of which each may need the one before."""
    addend_BK: torch.Tensor | None = None  # a product that the next one's norm adds to the residual
    for product, following in zip_longest(products, products[1:]):
        input_BK, values, output_BN = product.input, product.weight, product.output
        if product.norm_weight is not None:
            input_BK = torch.empty_like(product.input)
            rms_norm(product.input, product.norm_weight, product.epsilon, input_BK, addend=addend_BK)
            addend_BK = None
        if product.swiglu:
            swiglu(F.linear(input_BK, values), output_BN)
        elif product.residual is None:
            torch.mm(input_BK, values.T, out=output_BN)
        elif product.residual is output_BN and following is not None and _norms(following, output_BN):
            addend_BK = F.linear(input_BK, values)
        else:
            # As a layer of single operations: the product is rounded before the addition.
            torch.add(F.linear(input_BK, values), product.residual, out=output_BN)


def _norms(product: Product, hidden_BK: torch.Tensor) -> bool:
    return product.norm_weight is not None and product.input is hidden_BK
