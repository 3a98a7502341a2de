"""Work that a run can do without."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class LeftOut(UserWarning):
    """Something that a run can do without has failed."""


@contextmanager
def side_work(what: str, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Leaves out what the block was to do if it fails, with a line; a run is worth more than a figure about it.

    Args:
        what: is left out.
        but: errors that are somebody else's to handle.
    """
    try:
        yield
    except but:
        raise
    except Exception as error:  # whatever a model may raise
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"{what}: left out, for {type(error).__name__}: {reason}", LeftOut, stacklevel=3)
