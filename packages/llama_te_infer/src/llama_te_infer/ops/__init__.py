"""The compiled operators, one module for each: `from llama_te_infer.ops.linear import linear`.

An operator `torch.ops.llama_te.<name>` is registered when its module is imported. `library` says whether the kernels
are available here, and which sizes they take.
"""
