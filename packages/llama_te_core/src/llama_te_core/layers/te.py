"""The decoder layer on Transformer Engine. Importing this module imports Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Placement

from ..precision.plan import transformer_engine
from .collectives import local, local_norm
from .reference import CACHE_OF_SPLIT_MODEL

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..models.configuration_nvllama import NVLlamaConfig
    from .collectives import ContextKind
    from .kv_cache import KVCache

te = transformer_engine()


def build_transformer_engine_layer(
    config: NVLlamaConfig,
    layer_number: int,
    softmax_scale: float,
    tensor_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> nn.Module:
    """A `te.TransformerLayer` with the sizes of `config`, in torch's default dtype and on its default device.

    Args:
        config: Sizes of the model.
        layer_number: Number of the layer, from 1, as TE counts.
        softmax_scale: What attention multiplies query·key by.
        tensor_group: Processes that share heads and features; the layer has this process's part of the weights.
        sequence_parallel: Whether each of them has a part of the tokens (of the first dimension) outside the products.

    Raises:
        RuntimeError: `use_quantized_model_init` on a device that holds no quantized weights.
    """
    device = torch.get_default_device()
    if config.use_quantized_model_init and device.type not in ("cuda", "meta"):
        raise RuntimeError(
            f"use_quantized_model_init=True needs the model to be built on a GPU, but the default device is {device}: "
            "build it under `with torch.device('cuda')`, or under 'meta' followed by init_empty_weights()."
        )

    def initialize(weight: torch.Tensor) -> torch.Tensor:
        return nn.init.normal_(weight, std=config.initializer_range)

    layer = te.TransformerLayer(
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_gqa_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        layernorm_epsilon=config.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=float(config.attention_dropout or 0.0),
        layer_number=layer_number,
        attn_input_format=config.attn_input_format,
        self_attn_mask_type=config.self_attn_mask_type,
        normalization="RMSNorm",
        activation="swiglu",
        bias=False,
        fuse_qkv_params=True,
        qkv_weight_interleaved=True,
        init_method=initialize,
        output_layer_init_method=initialize,
        params_dtype=torch.get_default_dtype(),
        device=str(device),  # TE knows "meta" by its name only
        tp_group=tensor_group,
        set_parallel_mode=tensor_group is not None,
        sequence_parallel=sequence_parallel,
    )
    # TransformerLayer has no argument for it; TE's own default is head_dim**-0.5.
    for module in layer.self_attention.core_attention.modules():
        if hasattr(module, "softmax_scale"):
            module.softmax_scale = softmax_scale
    _hide_extra_state(layer)
    layer.register_forward_pre_hook(_refuse_adapted_norms)
    CachedAttention(layer, config, layer_number)
    return layer


def _refuse_adapted_norms(layer: nn.Module, args: Any) -> None:
    """Refuse what PEFT makes of a weight that was not asked for by `lora.on_weights`: see there."""
    adaptable: Any = layer
    for module in (adaptable.self_attention.layernorm_qkv, adaptable.layernorm_mlp):
        if "base_layer" in module._modules and not hasattr(module, "parameter_name"):
            raise RuntimeError(
                f"a layer's {type(module.base_layer).__name__} has an adapter, {type(module).__name__}, of what goes "
                "into its norm: it could not be merged or exported. Give PEFT its configuration through "
                "llama_te_core.lora.on_weights, for get_peft_model and, as config=, for PeftModel.from_pretrained."
            )


class CachedAttention:
    """What a layer does differently where a cache takes part, as hooks on the modules of TE's own call path.

    1. A cache with a kernel for it (`fuses_rope`) rotates and stores what the fused projection gives. The layer is told
       of no rotation, and attention gets the rotated queries from the cache, as it gets keys and values in any case.
    2. Packed queries go to attention as a padded batch, and come back packed. TE 2.20 (FusedAttention.forward) cuts the
       running sums of packed queries that meet cached keys to as many rows as there are heads, and computes nothing for
       the rows behind. Where every row brings one token, both arrangements are the same memory.

    Without a cache nothing changes.

    Shapes: T packed tokens, B rows, W columns of the padded queries, K key/value heads, G heads of a group, H query
    heads, D size of a head.
    """

    def __init__(self, layer: nn.Module, config: NVLlamaConfig, layer_number: int) -> None:
        self.layer_number = layer_number
        self.qkv_format = config.attn_input_format
        self.shape_KGD = (
            config.num_key_value_heads,
            config.num_attention_heads // config.num_key_value_heads + 2,
            config.head_dim,
        )
        # Of the forward pass that is under way.
        self._cache: KVCache | None = None
        self._angles: torch.Tensor | None = None
        self._query: torch.Tensor | None = None
        self._unpad: Callable[[torch.Tensor], torch.Tensor] | None = None
        attention: Any = layer.self_attention
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        attention.layernorm_qkv.register_forward_hook(self._append)
        attention.core_attention.register_forward_pre_hook(self._hand_over, with_kwargs=True)
        attention.core_attention.register_forward_hook(self._take_back)

    def _begin(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("inference_params")
        if cache is None or not cache.fuses_rope:
            self._cache = None
            return None
        self._cache, self._angles = cache, kwargs["rotary_pos_emb"]
        return args, {**kwargs, "rotary_pos_emb": None}

    def _append(self, projection: nn.Module, args: Any, qkv: torch.Tensor) -> torch.Tensor | None:
        if self._cache is None:
            return None
        assert self._angles is not None
        qkv_xKGD = qkv.unflatten(-1, self.shape_KGD)
        self._query = self._cache.append_rope(self.layer_number, qkv_xKGD, self._angles, self.qkv_format)
        # Nobody reads it any more, but TE would copy the queries out of it: of one number, any shape is a view.
        return qkv.new_zeros(()).expand(qkv.shape)

    def _hand_over(self, core_attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        cache: KVCache | None = kwargs.get("inference_params")
        self._unpad = None
        if cache is None:
            return None
        query, key, value = args
        if self._query is not None:
            query = self._query
        elif self.qkv_format == "thd":
            cache.step(self.layer_number, key, value, "thd")  # stored as they come, before queries are padded
        else:
            return None
        self._cache = self._angles = self._query = None  # the layer must not keep a cache alive
        if self.qkv_format == "thd":
            query, self._unpad = _pad(query, cache, kwargs["max_seqlen_q"])
            kwargs = {**kwargs, "qkv_format": "bshd", "max_seqlen_q": query.shape[1]}
        # TE passes keys and values on to the cache, which has them already: only their shape is looked at.
        unread = query.new_empty(*query.shape[:-2], self.shape_KGD[0], self.shape_KGD[2])
        return (query, unread, unread), kwargs

    def _take_back(self, core_attention: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        unpad, self._unpad = self._unpad, None
        return None if unpad is None else unpad(output)


def _pad(
    query_THD: torch.Tensor, cache: KVCache, longest: int
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Queries as a padded batch [B, W, H, D], and what makes [T, ...] of attention's [B, W, ...]."""
    # Attention makes a plan for each width: powers of two, so that there are few; never more queries than keys.
    width = min(1 << (longest - 1).bit_length(), cache.max_sequence_length)
    rows = cache.batch_size
    place_T = cache.padded_places(width)
    used = rows * width if place_T is None else len(place_T)  # behind them stands what fills T up for FP8
    query_BWHD = query_THD[:used]
    if place_T is not None:
        query_BWHD = query_THD.new_zeros(rows * width, *query_THD.shape[1:]).index_copy(0, place_T, query_BWHD)

    def unpad(output_BWx: torch.Tensor) -> torch.Tensor:
        output_Tx = output_BWx.flatten(0, 1)
        if place_T is not None:
            output_Tx = output_Tx[place_T]
        filling = query_THD.shape[0] - used
        return nn.functional.pad(output_Tx, (0, 0, 0, filling)) if filling else output_Tx

    return query_BWHD.unflatten(0, (rows, width)), unpad


def split_tensor(
    layer: nn.Module, config: NVLlamaConfig, softmax_scale: float, mesh: DeviceMesh, placement: Placement
) -> None:
    """Share heads and features of the MLP out over the ranks of a mesh of one dimension.

    TE fixes sizes and what is exchanged when a layer is built; `set_tensor_parallel_group` sets no more than the group.
    So the modules of a layer that is built for the group take the places of those of `layer`, with their weights.

    Args:
        layer: A `te.TransformerLayer` with `DTensor`s on the mesh for weights; it is changed.
        config: What it was built with.
        softmax_scale: The same.
        mesh: The tensor ranks.
        placement: Of the tokens that come in and go out: `Replicate()` or `Shard(0)`.
    """
    whole: Any = layer
    with torch.device("meta"):
        part: Any = build_transformer_engine_layer(
            config, whole.self_attention.layer_number, softmax_scale, mesh.get_group(), placement.is_shard()
        )
    for name in ("self_attention.layernorm_qkv", "self_attention.proj", "layernorm_mlp"):
        module = part.get_submodule(name)
        for key, weight in layer.get_submodule(name).named_parameters(recurse=False):
            setattr(module, key, weight)
        _compute_with_local_weights(module, mesh, placement)
    part.train(layer.training)
    # The layer itself stays, for what wraps its forward pass or listens to it.
    whole.self_attention, whole.layernorm_mlp = part.self_attention, part.layernorm_mlp
    layer.register_forward_pre_hook(_refuse_cache, with_kwargs=True, prepend=True)


def _compute_with_local_weights(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Show a module of TE the local part of each weight during its forward pass; TE's kernels take no `DTensor`."""

    def show(module: nn.Module, args: Any) -> None:
        for name, weight in module.named_parameters(recurse=False):
            is_norm = name == "layer_norm_weight"
            # An attribute of its own is found before a parameter of the name.
            module.__dict__[name] = local_norm(weight, mesh, placement) if is_norm else local(weight, mesh)

    def hide(module: nn.Module, args: Any, output: Any) -> None:
        for name, _ in module.named_parameters(recurse=False):
            module.__dict__.pop(name, None)

    module.register_forward_pre_hook(show)
    module.register_forward_hook(hide, always_call=True)


def _refuse_cache(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("inference_params") is not None:
        raise ValueError(CACHE_OF_SPLIT_MODEL)


def split_context(layers: Iterable[nn.Module], mesh: DeviceMesh, kind: ContextKind) -> None:
    """Share the tokens of each sequence out over the ranks of a mesh of one dimension.

    Args:
        layers: Of the class `te.TransformerLayer`; their input is a rank's part of each sequence from now on, as
            `train.context_parallel.shard_context` cuts it.
        mesh: The context ranks.
        kind: How keys and values of other ranks are come by.
    """
    ranks = mesh.size()

    def describe_whole_sequences(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        whole = {
            name: kwargs[name] * ranks
            for name in ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv")
            if kwargs.get(name) is not None
        }
        for name in ("cu_seqlens_q", "cu_seqlens_kv"):
            if name in whole:
                whole[f"{name}_padded"] = whole[name]
        return args, {**kwargs, **whole}

    group = mesh.get_group()
    stream = torch.cuda.Stream()  # the second one of attention, which one layer after the other uses
    layer: Any
    for layer in layers:
        layer.set_context_parallel_group(group, dist.get_process_group_ranks(group), stream, kind)
        layer.register_forward_pre_hook(describe_whole_sequences, with_kwargs=True)


def checkpoint(layer: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run `layer` without keeping its activations; TE's version, which also restores the state of FP8 scaling."""
    output: torch.Tensor = te.checkpoint(layer, *args, use_reentrant=False, **kwargs)
    return output


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether a parameter is held in one of TE's quantized formats only."""
    return isinstance(parameter, te.QuantizedTensor)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in an ordinary dtype."""
    return tensor.dequantize() if is_quantized(tensor) else tensor


def fp8_parts(parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What a parameter in FP8 (E4M3) with one scale is made of; `None` for other formats.

    Returns:
        Its values, float8_e4m3fn of its shape, and the float32 [1] that they are multiplied by; not copies.
    """
    if not isinstance(parameter, te.Float8Tensor) or parameter._fp8_dtype.name != "kFloat8E4M3":
        return None
    values, scale = parameter._data, parameter._scale_inv
    if values is None or scale is None or scale.numel() != 1:
        return None
    return values.view(torch.float8_e4m3fn), scale.view(1)


def quantize_loaded_weights(model: nn.Module) -> None:
    """Quantize the weights of layers that were built under `te.quantized_model_init`, from the values they hold.

    Loading a checkpoint replaces the quantized parameters by ordinary ones. TE quantizes what it initialises, so this
    has it initialise every weight with the value that is there.

    Raises:
        RuntimeError: The weights are not on a GPU.
    """
    module: Any  # of TE's own base class
    for module in model.modules():
        if not getattr(module, "primary_weights_in_fp8", False):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type != "cuda":
                raise RuntimeError(
                    f"use_quantized_model_init=True, but {name} is on {parameter.device}: weights are quantized on a "
                    "GPU, so load the model there (device_map='cuda')."
                )
        initialisers = {name: meta.init_fn for name, meta in module.param_init_meta.items()}
        for meta in module.param_init_meta.values():
            meta.init_fn = _leave_as_it_is
        module.reset_parameters()
        for name, init_fn in initialisers.items():
            module.param_init_meta[name].init_fn = init_fn


def _leave_as_it_is(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _hide_extra_state(layer: nn.Module) -> None:
    """Keep TE's `_extra_state` entries out of the layer's state dict, and do not load or miss them.

    They hold the scales of FP8, which the first steps find again; a checkpoint without them fits either
    implementation of the layer.
    """

    def drop(module: nn.Module, state_dict: dict[str, Any], prefix: str, *details: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix) and key.endswith("_extra_state")]:
            del state_dict[key]

    def do_not_miss(module: nn.Module, incompatible_keys: Any) -> None:
        missing = incompatible_keys.missing_keys
        missing[:] = [key for key in missing if not key.endswith("_extra_state")]

    layer.register_state_dict_post_hook(drop)
    layer.register_load_state_dict_pre_hook(drop)
    layer.register_load_state_dict_post_hook(do_not_miss)
