"""Training: the command and its loop, data, many processes, checkpoints."""
