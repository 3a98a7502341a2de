"""Progress bars that leave a readable log where there is no terminal, and times when nothing is to be said."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_SHARE = 0.1  # of the whole, between two lines
_SECONDS = 30.0  # or so many
_hidden = ContextVar("hidden", default=False)


class _LogBar(tqdm):
    """A bar that writes a line now and then instead of redrawing one."""

    def __init__(self, **options: Any) -> None:
        self._shown_n, self._shown_t = options.get("initial", 0), time.monotonic()
        super().__init__(leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes a line if the bar has moved far enough, or is being closed."""
        moved, seconds = self.n - self._shown_n, time.monotonic() - self._shown_t
        is_far = self.total is not None and moved >= _SHARE * self.total
        if moved and (is_far or seconds >= _SECONDS or self.disable):  # as `close` has done
            self._shown_n, self._shown_t = self.n, time.monotonic()
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Nothing: lines stay."""


def progress_bar(desc: str, **options: Any) -> tqdm:
    """A `tqdm` bar; where standard error is no terminal, one that writes lines.

    Args:
        desc: what makes progress.
        options: of `tqdm`.
    """
    options["disable"] = options.get("disable") or _hidden.get()
    if sys.stderr.isatty():
        return tqdm(desc=desc, dynamic_ncols=True, mininterval=0.5, **options)
    line = "{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
    return _LogBar(desc=f"{desc}: ", bar_format=line, **options)


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Within the block no bar is shown and nothing is logged but errors; warnings are given to the caller instead."""
    token, disabled = _hidden.set(True), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True, action="always") as said:
            yield said
    finally:
        logging.disable(disabled)
        _hidden.reset(token)
