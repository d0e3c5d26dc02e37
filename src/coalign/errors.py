"""The two exceptions that are meant to be read by people."""


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
