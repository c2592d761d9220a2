"""A run's settings: read (`read`), checked by themselves (`rules`) and with what they refer to (`refer`)."""
