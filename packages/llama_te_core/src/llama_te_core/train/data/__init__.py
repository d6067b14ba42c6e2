"""The batches of a training run, from its documents."""
