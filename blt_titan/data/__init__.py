"""From raw text to rows of bytes: sources, shards, order, streams, packing, loader."""
