"""The errors of the data: what a user can cause, and what befalls the processes that read ahead."""


class DataError(ValueError):
    """Text, a recipe or a store that cannot be used. The message is one line: field, value, rule and fix."""


class MakerDied(RuntimeError):
    """A process that read ahead is gone, which no recipe can help: the same command may do better. The message is one line."""
