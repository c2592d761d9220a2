"""Entropies of documents by an entropy model: over shards, or while training."""
