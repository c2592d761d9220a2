"""A run's settings: read from TOML and overrides (`read`), and what each key may be (`keys`)."""
