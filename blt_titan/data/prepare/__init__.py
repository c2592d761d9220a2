"""Text to byte shards: sources, formats, a shuffle by sorted runs, and the job that writes them."""
