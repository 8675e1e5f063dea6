"""What epops raises.  Every text says: op, argument or rank, expected, got, and what to do."""

from __future__ import annotations


class EpopsError(RuntimeError):
    """Base of the errors that a step can meet at run time."""


class GroupError(EpopsError):
    """A group was used wrongly: before it exists, after it was closed, inside a capture, or under a name that is taken."""


class RoutingError(EpopsError):
    """The routing of an earlier op was bad (index out of range, an expert twice, more rows than capacity).

    The op that met it treated the bad selections as -1; it is raised at the next op, step, ``check()`` or ``close()``.
    """


class DisagreementError(EpopsError):
    """Ranks of one group called different ops, or one op with different settings, in the same position of their order."""


class PeerError(EpopsError):
    """A rank of the group did not arrive within the timeout, left, or reported that its own call failed."""
