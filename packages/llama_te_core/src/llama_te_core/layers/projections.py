"""The projections of a Hugging Face Llama layer, as modules over the fused weights of a decoder layer.

A decoder layer has one weight for queries, keys and values, and one for the MLP's gate and up projection. Adapters name
the projections (`self_attn.q_proj`, ...) and need a module for each. The modules here have no parameters of their own:
each reads its rows of a fused weight. A module in the place of one, such as an adapter's, changes the weight that the
layer computes with.

Shapes: E input features, N output features of a fused weight, n of one projection, K key/value heads, G heads of a
group (its query heads, its key and its value), D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .backend import LayerConfig

# Returns the weight of a module in a projection's place, given the projection's own weight [n, E].
WeightOf = Callable[[nn.Module, torch.Tensor], torch.Tensor]

CONTAINERS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
PROJECTIONS = tuple(name for names in CONTAINERS.values() for name in names)


class FusedWeight:
    """A parameter of a decoder layer, and the projections that it holds.

    Args:
        layer: The decoder layer, which has the projections as `layer.self_attn.q_proj` and so on.
        owner: The module of the parameter.
        name: The parameter's name there.
        projections: Names of the projections.
        heads: K, G and D of the fused QKV weight; `None` for a weight whose projections are equal parts, in order.
    """

    def __init__(
        self,
        layer: nn.Module,
        owner: nn.Module,
        name: str,
        projections: tuple[str, ...],
        heads: tuple[int, int, int] | None = None,
    ) -> None:
        self.layer, self.owner, self.name, self.projections, self.heads = layer, owner, name, projections, heads

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter [N, E]."""
        return self.owner.get_parameter(self.name)

    def split(self, weight_NE: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the weight [n, E] of each projection."""
        parts = weight_NE.chunk(len(self.projections))
        if self.heads is not None:
            weight_KGDE = weight_NE.unflatten(0, self.heads)
            queries = self.heads[1] - 2
            parts = tuple(part.flatten(0, 2) for part in weight_KGDE.split((queries, 1, 1), dim=1))
        return dict(zip(self.projections, parts, strict=True))

    def join(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the fused weight [N, E] of the projections' weights."""
        weights = [parts[name] for name in self.projections]
        if self.heads is None:
            return weights[0] if len(weights) == 1 else torch.cat(weights)
        heads, _, size = self.heads
        return torch.cat([weight.unflatten(0, (heads, -1, size)) for weight in weights], dim=1).flatten(0, 2)

    def register_hooks(self, weight_of: WeightOf) -> None:
        """Let the layer compute with the weights of the modules that replaced projections.

        The hooks are methods, so that a deep copy of the layer has hooks of its own.
        """
        self.weight_of = weight_of
        self.owner.register_forward_pre_hook(self._replace)
        self.owner.register_forward_hook(self._restore, always_call=True)

    def _replace(self, owner: nn.Module, args: Any) -> None:
        modules = ((name, _child(self.layer, name)) for name in self.projections)
        replaced = {name: module for name, module in modules if module is not None and type(module) is not Projection}
        if not replaced:
            return
        parts = self.split(self.parameter)
        changed = {name: self.weight_of(module, parts[name]) for name, module in replaced.items()}
        if any(changed[name] is not parts[name] for name in changed):
            # Python finds an attribute of the object before a parameter of the same name.
            owner.__dict__[self.name] = self.join({**parts, **changed})

    def _restore(self, owner: nn.Module, args: Any, output: Any) -> None:
        owner.__dict__.pop(self.name, None)


class Projection(nn.Linear):
    """One projection of a fused weight.

    The decoder layer does not call it.
    """

    def __init__(self, fused: FusedWeight, name: str) -> None:
        nn.Module.__init__(self)  # without the parameters of `nn.Linear`
        self.fused, self.name = fused, name
        self.register_parameter("bias", None)
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> torch.Tensor:
        """The weight [n, E], a copy where its rows lie apart. Assigning to it writes to the fused weight."""
        edited: torch.Tensor | None = self.__dict__.get("_edited")
        return self.fused.split(self.fused.parameter.detach())[self.name] if edited is None else edited

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        fused = self.fused.parameter.detach()
        fused.copy_(self.fused.join({**self.fused.split(fused), self.name: value.detach().to(fused)}))

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Let code inside change `weight` in place; afterwards the fused weight has the changes.

        Within another such context, the outermost one writes.
        """
        if "_edited" in self.__dict__:
            yield
            return
        edited = nn.Parameter(self.weight.clone(), requires_grad=False)
        self.__dict__["_edited"] = edited  # not a parameter of this module
        try:
            yield
        finally:
            del self.__dict__["_edited"]
        self.weight = edited.detach()


class LayerProjections:
    """The projections of one decoder layer, as `layer.self_attn.q_proj`, `layer.mlp.gate_proj` and so on.

    Args:
        layer: A decoder layer of either implementation; it is changed.
        config: The layer was built with it.
        weight_of: Called in each forward pass for each module that replaced a projection.
    """

    def __init__(self, layer: nn.Module, config: LayerConfig, weight_of: WeightOf) -> None:
        own: Any = layer
        self.layer = layer
        heads = config.num_key_value_heads
        group = config.num_attention_heads // heads + 2
        attention, mlp = own.self_attention, _unwrapped(own.layernorm_mlp)
        self.weights = (
            FusedWeight(
                layer,
                _unwrapped(attention.layernorm_qkv),
                "weight",
                CONTAINERS["self_attn"][:3],
                (heads, group, config.head_dim),
            ),
            FusedWeight(layer, _unwrapped(attention.proj), "weight", ("o_proj",)),
            FusedWeight(layer, mlp, "fc1_weight", ("gate_proj", "up_proj")),
            FusedWeight(layer, mlp, "fc2_weight", ("down_proj",)),
        )
        for fused in self.weights:
            fused.register_hooks(weight_of)

    def show(self) -> None:
        """Add each projection that is not there yet to the layer."""
        for fused in self.weights:
            for name in fused.projections:
                container = _container_of(name)
                if not hasattr(self.layer, container):
                    self.layer.add_module(container, nn.Module())
                parent = self.layer.get_submodule(container)
                if not hasattr(parent, name):
                    parent.add_module(name, Projection(fused, name))

    def hide(self) -> list[nn.Module]:
        """Remove each projection that no other module replaced. Return the modules in the place of the others."""
        others: list[nn.Module] = []
        for container in CONTAINERS:
            parent = getattr(self.layer, container, None)
            if parent is None:
                continue
            for name, module in list(parent.named_children()):
                if isinstance(module, Projection):
                    delattr(parent, name)
                else:
                    others.append(module)
            if not list(parent.children()):
                delattr(self.layer, container)
        return others


def is_projections_hook(hook: Callable[..., Any]) -> bool:
    """Tell whether a hook is one that `FusedWeight` registered. Without adapters it does nothing."""
    return getattr(hook, "__module__", None) == __name__


def _container_of(projection: str) -> str:
    return next(container for container, names in CONTAINERS.items() if projection in names)


def _child(layer: nn.Module, projection: str) -> nn.Module | None:
    module: nn.Module | None = getattr(getattr(layer, _container_of(projection), None), projection, None)
    return module


def _unwrapped(module: Any) -> nn.Module:
    """Return the module of the layer itself, inside an adapter of a whole weight."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    result: nn.Module = module
    return result
