"""A run: its data, its steps, its metrics, its folder."""
