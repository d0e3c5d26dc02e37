"""The exceptions that are meant to be read by people."""

from typing import Any


class UserError(Exception):
    """A mistake of the user's: one sentence that says what is wrong, where, and what to do. The CLI prints it and exits with 2."""


class BadSample(Exception):
    """One sample that cannot be used. `reason` is a short stable word group that is counted ("truncated image"), `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str]]:  # crosses process borders in loader workers
        return BadSample, (self.reason, self.detail)


class NoImage(BadSample):
    """A sample that has no image at all, for methods that take a text alone."""

    def __reduce__(self) -> Any:
        return NoImage, (self.reason, self.detail)


class NoCaption(BadSample):
    """A sample that has no caption, or an empty one. `record` is what else is known of it, for methods that take an image alone."""

    def __init__(self, reason: str, detail: str, record: Any) -> None:
        super().__init__(reason, detail)
        self.record = record

    def __reduce__(self) -> Any:
        return NoCaption, (self.reason, self.detail, self.record)
