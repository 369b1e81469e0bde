"""Errors of the user's making: one line that names the field, the file or the row, and what would be right."""


class UserError(Exception):
    """A mistake that the user can mend; the command line prints its one line and exits with `exit_code`."""

    exit_code = 2


class NonFiniteError(UserError):
    """A reward, loss or gradient became NaN or infinite; the last good checkpoint is kept."""

    exit_code = 3
