"""The models: configuration, decoder, heads, generation, and the code files of a checkpoint."""

# The import of transformers registers the models, so it must be complete before a module here begins: see
# `llama_te_core.__init__`.
import transformers  # noqa: F401
