"""A run on many GPUs without any: the loaders of all its ranks over text that is on no disk, and its failures."""
