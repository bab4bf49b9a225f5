"""The error for what a user can cause in a ladder, a table of runs or a law."""


class ScalingError(ValueError):
    """Runs, a ladder or a law that cannot be used. The message is one line: what, its value, the rule and the fix."""
