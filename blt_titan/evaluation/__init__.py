"""Bits per byte of held-out rows and of documents, noise, and the harness."""
