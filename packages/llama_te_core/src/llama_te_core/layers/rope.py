"""Rotary position embedding: the angles of positions, and the rotation of queries and keys.

Shapes: P positions, D size of a head, N heads; `x_bND` stands for any leading dimensions of tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..compat.transformers import rope_functions

# Rope types whose frequencies depend on the length of the longest sequence.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def check_rope_type(rope_type: str) -> None:
    """Refuse an unknown type of `rope_parameters`. transformers only warns, or accepts it.

    Raises:
        ValueError: The type is unknown. The message names it and the known types.
    """
    known = ["default", *rope_functions()]
    if rope_type not in known:
        raise ValueError(f"rope_parameters has rope_type={rope_type!r}: it must be one of {', '.join(known)}.")


class RotaryAngles:
    """Angles for every `rope_parameters` type of transformers' Llama.

    transformers computes the frequencies, on the host in float32. A table of angles stays on each device and grows when
    a longer sequence arrives. This class is not a module: it has no parameters and no state to save, and casting or
    moving the model does not affect it.

    Args:
        config: A Llama configuration.

    Raises:
        ValueError: `rope_parameters` have an unknown type, or lack a value that the type needs.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self.rope_type: str = config.rope_parameters["rope_type"]
        check_rope_type(self.rope_type)
        try:
            frequency_D, self._scaling = self._frequencies(None)
        except KeyError as missing:
            raise ValueError(
                f"rope_parameters={dict(config.rope_parameters)} has no {missing}, which rope_type={self.rope_type!r} "
                "needs: add it, as the model's authors give it."
            ) from missing
        self._frequency_D: list[float] = frequency_D.tolist() if frequency_D.device.type == "cpu" else []
        self._tables: dict[tuple[torch.device, int], torch.Tensor] = {}

    @property
    def inv_freq(self) -> torch.Tensor:
        """float32 [D/2] on the host, the frequencies of short sequences, as transformers' rotary embedding names them.

        Assigning to it only accepts the same values: `config.rope_parameters` define the frequencies.
        """
        return self._frequencies(None)[0]

    @inv_freq.setter
    def inv_freq(self, value: torch.Tensor) -> None:
        if not torch.allclose(value.detach().float().cpu(), self.inv_freq, rtol=1e-5, atol=0.0):
            raise ValueError(
                "inv_freq differs from the frequencies of config.rope_parameters, which the model and its checkpoints "
                "use: change rope_parameters in the configuration, and build the model with it."
            )

    @property
    def softmax_scale(self) -> float:
        """The factor on query·key in attention.

        Yarn and longrope scale the rotated query and the rotated key. The softmax scale carries both factors, since
        Transformer Engine's rotation takes angles only.
        """
        return float(self._config.head_dim**-0.5 * self._scaling**2)

    def __call__(self, length: int, device: torch.device) -> torch.Tensor:
        """Return the angles for sequences of at most `length` tokens.

        Args:
            length: Positions of the longest sequence, cached ones included.
            device: The device of the result.

        Returns:
            float32 of shape [P, 1, 1, D] with P ≥ `length`, the two halves of D equal (TE's layout).
        """
        if torch.compiler.is_compiling() and self.rope_type not in _LENGTH_DEPENDENT:
            # A graph for any length: it computes the angles, since a table would have the length of this trace.
            frequency_D = torch.tensor(self._frequency_D, dtype=torch.float32, device=device)
            angle_PD = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency_D)
            return torch.cat((angle_PD, angle_PD), dim=-1)[:, None, None, :]
        regime = self._regime(length)
        table_P11D = self._tables.get((device, regime))
        if table_P11D is None or table_P11D.shape[0] < length:
            positions = max(1 << (length - 1).bit_length(), 256)
            frequency_D, _ = self._frequencies(length)
            position_P = torch.arange(positions, dtype=torch.float32, device=frequency_D.device)
            angle_PD = torch.outer(position_P, frequency_D)
            table_P11D = torch.cat((angle_PD, angle_PD), dim=-1)[:, None, None, :].to(device)
            if self.rope_type == "dynamic":
                self._tables.clear()  # each length beyond the trained length has its own frequencies
            self._tables[device, regime] = table_P11D
        return table_P11D

    def are_fixed(self, length: int) -> bool:
        """Tell whether all sequences of at most `length` tokens have the same angles."""
        return self._regime(length) == self._regime(1)

    def _regime(self, length: int) -> int:
        """Return a number that is equal for lengths with the same frequencies."""
        if self.rope_type == "dynamic":
            trained = self._config.max_position_embeddings
            return length if length > trained else trained
        if self.rope_type == "longrope":
            return int(length > self._config.rope_parameters["original_max_position_embeddings"])
        return 0

    def _frequencies(self, length: int | None) -> tuple[torch.Tensor, float]:
        """Return float32 frequencies [D/2] on the host, and the factor on cosine and sine."""
        config = self._config
        with torch.device("cpu"):  # the model may be under construction on the meta device
            if self.rope_type == "default":
                exponent_D = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
                return 1.0 / config.rope_parameters["rope_theta"] ** exponent_D, 1.0
            function = rope_functions()[self.rope_type]
            arguments = {"device": torch.device("cpu"), "seq_len": length}
            known = inspect.signature(function).parameters
            if self.rope_type not in _LENGTH_DEPENDENT:
                arguments.pop("seq_len")
            frequency_D, scaling = function(config, **{k: v for k, v in arguments.items() if k in known})
        return frequency_D.float(), float(scaling)


def rotate(query_bND: torch.Tensor, key_bND: torch.Tensor, angle_bD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the pairs (i, i + D/2) of each head by its token's angles.

    Args:
        query_bND: Heads of queries.
        key_bND: Heads of keys.
        angle_bD: float32, the two halves of D equal.

    Returns:
        Tensors like the queries and the keys. Cosine and sine are rounded to the queries' dtype first, as in
        transformers. Under autocast, hidden states are float32, and so are cosine, sine and the rotation.
    """
    angle_b1D = angle_bD[..., None, :]
    device_type = query_bND.device.type
    is_cast = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    dtype = torch.float32 if is_cast else query_bND.dtype
    cos_b1D, sin_b1D = angle_b1D.cos().to(dtype), angle_b1D.sin().to(dtype)

    def turn(x_bND: torch.Tensor) -> torch.Tensor:
        first, second = x_bND.chunk(2, dim=-1)
        turned_bND = x_bND * cos_b1D + torch.cat((-second, first), dim=-1) * sin_b1D
        return turned_bND.to(x_bND.dtype)

    return turn(query_bND), turn(key_bND)
