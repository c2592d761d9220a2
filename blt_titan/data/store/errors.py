"""The one exception of the data layer."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file and says what to do."""
