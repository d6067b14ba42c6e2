"""The loss of the language-model head, without the logits of all tokens at once."""
