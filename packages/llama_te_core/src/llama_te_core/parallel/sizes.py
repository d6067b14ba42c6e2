"""The sizes of the mesh of processes. Importing this module does not import torch."""

from dataclasses import dataclass, fields, replace
from typing import Literal

# The exchange of keys and values between context ranks, by the names of Transformer Engine's `cp_comm_type`: keys and
# values go round a ring, all ranks gather them, or ranks exchange heads for tokens.
ContextKind = Literal["p2p", "all_gather", "a2a"]


@dataclass(frozen=True)
class ParallelSizes:
    """The sizes of the mesh's dimensions.

    Attributes:
        replicate: Copies of the model, each with its own batches.
        shard: Processes that share the weights (FSDP), each with its own batches; -1 takes the number of processes
            divided by the other sizes.
        context: Processes that share the tokens of each sequence.
        tensor: Processes that share the heads, the features of the MLP and the vocabulary.

    Raises:
        ValueError: A size is not an integer of at least 1 (or -1, for `shard`).
    """

    replicate: int = 1
    shard: int = -1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for field in fields(ParallelSizes):
            size = getattr(self, field.name)
            if (
                isinstance(size, bool)
                or not isinstance(size, int)
                or (size < 1 and (field.name, size) != ("shard", -1))
            ):
                rest = ", or -1 for all processes that the others leave" if field.name == "shard" else ""
                raise ValueError(f"{field.name}={size!r}: it must be an integer of at least 1{rest}.")

    def resolve(self, world_size: int) -> "ParallelSizes":
        """Return these sizes with the value of `shard` for a number of processes.

        Args:
            world_size: The number of processes.

        Raises:
            ValueError: The sizes' product is not the number of processes.
        """
        others = self.replicate * self.context * self.tensor
        shard = world_size // others if self.shard == -1 else self.shard
        if shard * others != world_size:
            named = ", ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(ParallelSizes))
            needed = f"a multiple of {others}" if self.shard == -1 else str(shard * others)
            raise ValueError(
                f"{named} need {needed} processes, but there are {world_size}: change the sizes, or start another "
                "number of processes."
            )
        return replace(self, shard=shard)
