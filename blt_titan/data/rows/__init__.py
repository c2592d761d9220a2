"""Shards to batches: the order of the data, packing into rows, collation and the stateful loader."""
