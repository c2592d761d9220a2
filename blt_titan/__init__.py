"""Byte Latent Transformers (arXiv 2412.09871) trained on TorchTitan."""
