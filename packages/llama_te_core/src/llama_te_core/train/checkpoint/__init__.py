"""The checkpoints and the folder of a training run."""
