"""Errors that are for the user: one clear message, no traceback."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and the remedy."""


class CheckpointError(UserError):
    """A checkpoint could not be written, or not read as it was written; complete ones are untouched."""
