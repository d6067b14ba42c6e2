"""The section `parallel` of a configuration."""

from dataclasses import dataclass, fields

from ...parallel.sizes import ContextKind, ParallelSizes


@dataclass(frozen=True)
class ParallelConfig(ParallelSizes):
    """The share of each process in the work.

    Attributes:
        reshard_after_forward: Free a layer's gathered weights after its forward pass: less memory, more traffic.
        context_kind: How context ranks of Transformer Engine layers get each other's keys and values: in a ring (p2p),
            all at once (all_gather), or by exchanging heads for tokens (a2a).
    """

    reshard_after_forward: bool = True
    context_kind: ContextKind = "p2p"

    @property
    def sizes(self) -> ParallelSizes:
        """The mesh's sizes."""
        return ParallelSizes(**{field.name: getattr(self, field.name) for field in fields(ParallelSizes)})
