"""The error for what a user can cause in the data."""


class DataError(ValueError):
    """Text, a recipe or a store that cannot be used. The message is one line: field, value, rule and fix."""
