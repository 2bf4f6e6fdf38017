"""Errors that are for the user: one clear message, no traceback."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and the remedy."""
