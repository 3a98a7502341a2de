"""Parsers of command-line options. They take no abbreviations, and say in one line what is wrong."""

from __future__ import annotations

import re
import shutil
from argparse import SUPPRESS, Action
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from textwrap import fill, shorten
from typing import Any, NoReturn

from jsonargparse import ArgumentParser


def suggestion(name: str, names: Iterable[str]) -> str:
    """A question for the nearest name, empty if none is near; an option may also lack what comes before its dot."""
    known = list(names)
    last = [k for k in known if "." in k and k.rpartition(".")[2] == name.lstrip("-")]
    near = last or get_close_matches(name, known, n=1)
    return f": did you mean {' or '.join(near[:3])}?" if near else ""


class OptionParser(ArgumentParser):
    """A parser that ends a wrong command line in one line, which suggests the nearest option for an unknown one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the process, or raises `ArgumentError` where jsonargparse tries one type after another."""
        if not self.exit_on_error:
            super().error(message, ex)
        command = self.prog.replace(" [options]", "")
        line = " ".join(message.split())
        if match := re.match(r"unrecognized arguments: (-[^\s=]+)", line):
            options = [name for name in self._option_string_actions if not name.endswith("+")]
            line = f"{command} has no option {match[1]}" + (suggestion(match[1], options) or f": see {command} --help")
        self.exit(2, f"fpq: {line}\n")


def option_help(parser: ArgumentParser, command: str, topic: str = "", hidden: Sequence[str] = ()) -> str:
    """Help of one line for each option; for a group of options, all that is known of them.

    Args:
        parser: of the command.
        command: what the user types, such as ``fpq fit``.
        topic: a group, such as ``recipe``; empty for a line for each option.
        hidden: groups that are shown only as a topic.

    Raises:
        ValueError: if there is no such group.
    """
    titles = {name: str(group.title) for name, group in (parser.groups or {}).items() if "." not in name}
    if topic and topic not in titles:
        raise ValueError(f"{command} --help {topic}: there is help on {', '.join(titles)}")
    width = max(80, min(120, shutil.get_terminal_size((100, 24)).columns))
    groups: dict[str, list[Action]] = {"": [], **{name: [] for name in titles}}
    for action in parser._actions:
        group = action.dest.partition(".")[0]
        if action.option_strings and action.dest not in (parser.groups or {}):  # which take whole files
            groups[group if group in titles else ""].append(action)
    if topic:
        return "\n".join([f"{command}: {titles[topic]}", *(_whole(action, width) for action in groups[topic])])
    lines = [f"usage: {command} [options]", "", str(parser.description), "", *_lines(groups[""], width)]
    shown = [name for name in titles if groups[name]]
    for name in (name for name in shown if name not in hidden):
        lines += ["", f"{name}: {titles[name]}", *_lines(groups[name], width)]
    lines += ["", f"{command} --help GROUP says all about the options of a group: {', '.join(shown)}."]
    return "\n".join(lines)


def _default(action: Action) -> str:
    return "" if action.default in (None, SUPPRESS) else f"[{action.default}]"


def _lines(actions: Sequence[Action], width: int) -> list[str]:
    names = [max(action.option_strings[:2], key=lambda option: len(option.rstrip("+"))) for action in actions]
    column = max(map(len, names))
    lines = []
    for name, action in zip(names, actions, strict=True):
        text, default = str(action.help).replace("`", ""), _default(action)
        left = max(20, width - column - 5 - len(default))
        lines.append(f"  {name:<{column}}  {shorten(text, left, placeholder=' ...')} {default}".rstrip())
    return lines


def _whole(action: Action, width: int) -> str:
    values = action.metavar if isinstance(action.metavar, str) else "VALUE"
    text = fill(str(action.help).replace("`", ""), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"\n  {action.option_strings[0]} {values} {_default(action)}".rstrip() + f"\n{text}"
