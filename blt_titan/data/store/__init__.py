"""Byte shards and entropy sidecars on disk: written whole, read with every number checked."""
