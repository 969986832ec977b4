"""The error of the training programmes: something the user asked for that cannot be done."""

__all__ = ["LaunchError"]


class LaunchError(ValueError):
    """Names the value, the rule it breaks and the remedy; printed without a traceback."""
