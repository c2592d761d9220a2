"""The exceptions of the data layer."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file and says what to do."""


class UnreachableError(DataError):
    """Data that may be sound and cannot be had: a store that is away, or access that is denied; never passed over."""
