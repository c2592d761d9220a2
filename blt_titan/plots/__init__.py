"""A small web server that shows what runs left behind: curves, patch lengths, pages of patches, scaling."""
