"""Checkpoints: what model they hold (description), which step (steps, find), how they are read and written."""
