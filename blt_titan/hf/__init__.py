"""To and from Hugging Face: `pretrained` loads and saves, `export` streams a checkpoint into a directory."""
