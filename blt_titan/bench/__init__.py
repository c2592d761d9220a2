"""Benchmarks: this code and its peers on the same rows, measured in turn, as data and as a table."""
