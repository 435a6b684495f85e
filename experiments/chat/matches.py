"""A tournament's matches and its verdicts: which are to be asked, and a file to which each is added once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from experiments.chat.prompts import Prompt
from experiments.mistakes import ConfigError


@dataclass(frozen=True)
class Match:
    """Two contestants' answers to a prompt, in the order shown."""

    prompt: Prompt
    first: str
    second: str
    first_answer: str
    second_answer: str

    @property
    def key(self) -> str:
        """Changes when the prompt, a contestant's name or an answer does."""
        parts = (self.prompt.id, self.prompt.turns, self.first, self.second, self.first_answer, self.second_answer)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def schedule(prompts: list[Prompt], answers: Mapping[str, Mapping[str, str]]) -> list[Match]:
    """Every ordered pair of contestants on every prompt. answers: contestant -> prompt id -> answer."""
    return [
        Match(prompt, first, second, answers[first][prompt.id], answers[second][prompt.id])
        for prompt in prompts
        for first, second in permutations(answers, 2)
    ]


class Verdicts:
    """The file verdicts.jsonl: one line a verdict, only ever appended to."""

    def __init__(self, file: Path):
        self.file = file

    def lines(self) -> list[dict]:
        """All verdicts; a torn last line, which a killed run may leave, is no verdict."""
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").split("\n")[:-1] if line]

    def of(self, judge: Mapping) -> list[dict]:
        """The verdicts of one judge, see `judge_id`."""
        return [line for line in self.lines() if judge_id(line) == judge_id(judge)]

    @contextmanager
    def writing(self) -> Iterator[Verdicts]:
        """Hold the file: a second run would ask everything twice. Cuts a torn last line off. ConfigError if held."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab+") as self._stream:
            try:
                fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another run is writing {self.file}; wait for it, or stop it") from None
            self._stream.seek(0)
            content = self._stream.read()
            self._stream.truncate(content.rfind(b"\n") + 1)
            yield self

    def add(self, line: dict) -> None:
        """Append a verdict; when this returns it is on the disk."""
        self._stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def judge_id(line: Mapping) -> tuple:
    """What makes a judge the same judge."""
    return line["model"], line["prompt_version"], line["temperature"]
