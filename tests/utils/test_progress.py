"""Progress bars: redrawn in a terminal, lines in a log."""

from __future__ import annotations

import io
import re
import sys

import pytest
from tqdm import tqdm

from fpq_lightning.utils.progress import progress_bar


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("steps", [3, 40, 1000])
def test_a_log_gets_whole_lines_about_every_tenth(steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("sampling", total=steps, unit="image", mininterval=0) as bar:
        for _ in range(steps):
            bar.update()
    err = capsys.readouterr().err
    assert "\r" not in err
    lines = err.splitlines()
    assert min(steps, 10) <= len(lines) <= 11
    shares = [int(re.match(r"sampling: +(\d+)% \d+/\d+ \[", line)[1]) for line in lines]  # type: ignore[index]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert max(b - a for a, b in zip([0, *shares], shares, strict=False)) <= max(11, 100 / steps + 1)


def test_a_log_gets_a_line_after_half_a_minute_of_little_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    bar = progress_bar("calibrating", total=10_000, initial=5000, mininterval=0)
    for _ in range(12):
        bar.update()
        clock[0] += 10
    lines = capsys.readouterr().err.splitlines()
    assert [int(re.search(r"(\d+)/10000", line)[1]) for line in lines] == [5004, 5007, 5010]  # type: ignore[index]
    bar.close()
    bar.close()
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["5012/10000"]


def test_a_total_may_come_later_and_other_lines_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("sampling", unit="image", mininterval=0) as bar:
        bar.total = 2
        bar.update()
        tqdm.write("a line", file=sys.stderr)
        bar.set_description("judging")
        bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0] for line in lines] == ["sampling:  50", "a line", "judging: 100"]


def test_nothing_is_written_without_progress_or_when_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    progress_bar("sampling", total=3).close()
    with progress_bar("sampling", total=3, disable=True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar("sampling", total=2) as bar:
        bar.update(2)
    assert "\rsampling: 100%|" in terminal.getvalue()
