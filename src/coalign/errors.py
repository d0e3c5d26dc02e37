"""Exceptions whose messages are shown to users."""

from typing import Any


class UserError(Exception):
    """Wrong input, such as an option, a path or a dataset. The command line prints the message and exits with code 2.

    The message is a single line: what is wrong, where, and how to fix it.
    """


class NotFinite(UserError):
    """A run that was stopped because its loss or gradient was not finite."""


def first_line(error: BaseException) -> str:
    """Returns the first line of the message of another library's error, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class BadSample(Exception):
    """A sample that cannot be used. `reason` is a fixed phrase to count by ("truncated image"), `detail` is specific to the sample."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str]]:  # pickled by data loading workers
        return BadSample, (self.reason, self.detail)

    def copy(self) -> "BadSample":
        """Returns this error without traceback and cause, which keep the local variables of all functions that it passed."""
        return type(self)(self.reason, self.detail)


class NoImage(BadSample):
    """A sample without an image. Methods that train on unpaired captions can still use it."""

    def __reduce__(self) -> Any:
        return NoImage, (self.reason, self.detail)
