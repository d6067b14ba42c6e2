"""Old path of `llama_te_core.train.data.text_data`; import from there."""

from .data.text_data import TextBatches, TextData, merge_states

__all__ = ["TextBatches", "TextData", "merge_states"]
