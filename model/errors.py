"""The one exception for mistakes a user can correct. Knows nothing about where the message will be shown."""


class UserError(ValueError):
    """One clear sentence: what was given, what is allowed, what to do."""
