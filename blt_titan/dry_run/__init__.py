"""The dry run: one training step of a run's own code on "cuda" tensors without data, on a machine without a GPU.

`run.dry_run(config, world_size=..., gpu=...)` is the way in; `blt-titan check-cuda` prints what it returns.
"""
