"""Comparison of an exported directory with `transformers`."""
