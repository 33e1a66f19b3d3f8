"""The one exception a user's mistake raises."""


class UserError(ValueError):
    """A mistake in what the user gave: one line that says what, where and what to do.

    The launch scripts print it without a traceback and exit with status 2.
    """


class LostRank(UserError):
    """Another rank is gone or silent. Every rank that finds out says so, for the first of a host may be the lost one."""
