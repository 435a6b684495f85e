"""Several answers in columns, printed while they are generated."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Sequence
from shutil import get_terminal_size
from typing import TextIO

import torch
from transformers.generation import BaseStreamer

NARROWEST = 12
BETWEEN = " | "
UP, ERASE_BELOW = "\x1b[{}A", "\x1b[J"


class SideBySide(BaseStreamer):
    """What `generate` streams of a batch, one column a row: a line appears when it is full in all columns, and on a
    terminal the lines that are not are redrawn with every token.

    text: tokens of an answer -> its text. ends: tokens that end an answer.
    """

    def __init__(
        self,
        heads: Sequence[str],
        text: Callable[[list[int]], str],
        ends: Collection[int],
        out: TextIO | None = None,
        width: int | None = None,
    ):
        self.text, self.ends, self.out = text, ends, out or sys.stdout
        whole = width or get_terminal_size().columns
        between = len(BETWEEN) * (len(heads) - 1)
        self.width = max(NARROWEST, (whole - between) // len(heads))
        # Lines that the terminal breaks, or that have left its top, could not be redrawn.
        live = self.out.isatty() and self.width * len(heads) + between <= whole
        self.room = get_terminal_size().lines - 1 if live else 0
        self.tokens: list[list[int]] = [[] for _ in heads]
        self.ended = [False for _ in heads]
        self._prompt_seen = False
        self._printed = self._redrawn = 0  # lines for good, and lines below them to be drawn again
        self._write(self._line(heads), self._line(["-" * self.width for _ in heads]))

    @property
    def texts(self) -> list[str]:
        return [self.text(tokens) for tokens in self.tokens]

    def put(self, value: torch.Tensor) -> None:
        """The next token of every answer, shape (answers,); first of all, the prompts."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in enumerate(value.tolist()):
            self.ended[row] = self.ended[row] or token in self.ends
            if not self.ended[row]:
                self.tokens[row].append(token)
        self._show()

    def end(self) -> None:
        self.ended = [True for _ in self.ended]
        self._show()

    def _show(self) -> None:
        # Half of a character of several bytes is decoded as a replacement character.
        texts = [t if over else t.rstrip("�") for t, over in zip(self.texts, self.ended, strict=True)]
        columns = [wrapped(text, self.width) for text in texts]
        longest = max(map(len, columns))
        open_columns = [lines for lines, over in zip(columns, self.ended, strict=True) if not over]
        full = max(self._printed, min((len(lines) - 1 for lines in open_columns), default=longest))
        lines = [self._line([c[k] if k < len(c) else "" for c in columns]) for k in range(self._printed, longest)]
        if self._redrawn:
            self.out.write(UP.format(self._redrawn) + ERASE_BELOW)
        for_good = full - self._printed
        shown = lines[: for_good + self.room]
        self._write(*shown)
        self._printed, self._redrawn = full, len(shown) - for_good

    def _line(self, cells: Sequence[str]) -> str:
        return BETWEEN.join(cell.ljust(self.width) for cell in cells).rstrip()

    def _write(self, *lines: str) -> None:
        self.out.write("".join(f"{line}\n" for line in lines))
        self.out.flush()


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken at blanks where there are any. Text that grows at its end changes
    its last line only."""
    parts = (re.findall(rf".{{1,{width}}}(?:\s+|$)|.{{1,{width}}}", line) or [""] for line in text.split("\n"))
    return [part.rstrip() for found in parts for part in found]
