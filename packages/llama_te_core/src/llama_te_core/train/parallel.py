"""Old path of modules in `llama_te_core.parallel`: `sizes`, `mesh` and `parallelize`; import from there."""

from ..parallel.mesh import make_mesh
from ..parallel.parallelize import clip_gradients, parallelize
from ..parallel.sizes import ParallelSizes

__all__ = ["ParallelSizes", "clip_gradients", "make_mesh", "parallelize"]
