"""Errors that a user can mend: one line each, and the exit code that the command line answers with."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk, a quota or a limit of a file's size is full."""


class UserError(Exception):
    """A wrong field, file or row; the message names it and says what would be right."""

    exit_code = 2


class NonFiniteError(UserError):
    """Training met a NaN or an infinity; the last good checkpoint is kept."""

    exit_code = 3


class Stopped(UserError):
    """A signal ended the run after it had saved; the same command goes on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)  # by which another process makes it anew
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return self.args[0]


def missing_extra(package: str, needed_by: str) -> UserError:
    """The error for a package that the extra "hf" brings, and that is not installed."""
    return UserError(f'{needed_by}: needs the package {package}, which is not installed: pip install "rlhf_jax[hf]"')
