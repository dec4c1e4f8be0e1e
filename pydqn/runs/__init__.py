"""The folder of a run: its layout, lock, logs, checkpoints and weights."""
