"""Prompts of a tournament, and how they are put to a model and to a judge."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import BatchEncoding, PreTrainedTokenizerBase

from experiments.data.formats import ALPACA_NO_INPUT, ASSISTANT, HUMAN
from experiments.mistakes import ConfigError

OWN_PROMPTS = Path(__file__).with_suffix(".jsonl")
CHAT_FORMATS = ("guanaco", "alpaca", "plain", "chat")
FORMAT_OF = {"oasst1": "guanaco", "alpaca": "alpaca"}  # by data set; the others were trained without a template
TURN = re.compile(f"({HUMAN}|{ASSISTANT})")


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user: turns by turns, the user's first."""

    id: str
    turns: tuple[str, ...]

    @property
    def text(self) -> str:
        """What judges and raters read."""
        if len(self.turns) == 1:
            return self.turns[0]
        names = ("Human", "Assistant")
        return "\n\n".join(f"{names[i % 2]}: {turn}" for i, turn in enumerate(self.turns))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(repr(self.turns).encode()).hexdigest()


def load(file: Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a JSON lines file.

    A line has the user's question as `text` (FastChat's question files, QLoRA's Vicuna prompts) or a dialogue as
    `input` (QLoRA's OA prompts, "### Human: ... ### Assistant:"); its id is `question_id`, else the line's number.
    FileNotFoundError, or ValueError that names the line.
    """
    prompts = []
    for number, line in enumerate(_lines(file), start=1):
        row = _object(file, number, line)
        turns = dialogue(row["input"]) if isinstance(row.get("input"), str) else (row.get("text"),)
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns) or len(turns) % 2 == 0:
            raise ValueError(f"{file}, line {number}: no `text`, and no dialogue as `input` that ends with the user")
        prompts.append(Prompt(str(row.get("question_id", number)), tuple(turn.strip() for turn in turns)))
        if len(prompts) == limit:
            break
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise ValueError(f"{file}: two prompts have one question_id")
    if not prompts:
        raise ValueError(f"{file} holds no prompts")
    return prompts


def load_named(field: str, file: str, limit: int | None = None) -> list[Prompt]:
    """`load` of the file that `field` of the configuration names. ConfigError if it cannot be read."""
    try:
        return load(Path(file), limit)
    except FileNotFoundError:
        raise ConfigError(f"{field} is {file!r}, which is no file; name a file of prompts") from None
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error


def dialogue(text: str) -> tuple[str, ...]:
    """The turns of a dialogue in the Guanaco form; () if it is none. A trailing "### Assistant:" is dropped."""
    parts = TURN.split(text.strip().removesuffix(ASSISTANT))[1:]
    markers, turns = parts[::2], parts[1::2]
    expected = [(HUMAN, ASSISTANT)[i % 2] for i in range(len(markers))]
    return tuple(turns) if markers == expected else ()


def render(prompt: Prompt, how: str, tokenizer) -> str:
    """The prompt as the model reads it, up to where its answer starts. how: one of CHAT_FORMATS."""
    if how == "chat":
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(prompt.turns)]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if how == "guanaco":
        markers = (HUMAN, ASSISTANT)
        return "".join(f"{markers[i % 2]} {turn}" for i, turn in enumerate(prompt.turns)) + ASSISTANT
    return ALPACA_NO_INPUT.format(instruction=prompt.text) if how == "alpaca" else f"{prompt.text}\n\n"


def format_for(how: str, data: str) -> str:
    """One of CHAT_FORMATS: `how`, or for `auto` the one that models are trained with on the data set `data`."""
    return FORMAT_OF.get(data, "plain") if how == "auto" else how


def tokenized(prompts: Sequence[Prompt], how: str, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """Token ids and attention mask (prompts, longest) of rendered prompts. A chat template has its special tokens."""
    texts = [render(prompt, how, tokenizer) for prompt in prompts]
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=how != "chat")


def answers(file: Path, prompts: list[Prompt]) -> dict[str, str]:
    """Prompt id -> answer, of a JSON lines file {question_id, text}; QLoRA's own files, whose answer is `generation`
    (`generation_truncated` if there), are read too. ValueError if a prompt has no answer."""
    found = {}
    for number, line in enumerate(_lines(file), start=1):
        row = _object(file, number, line)
        # In QLoRA's files `text` is the question.
        text = row.get("generation_truncated", row.get("generation", row.get("text")))
        if not isinstance(text, str):
            raise ValueError(f"{file}, line {number}: no answer as `text`")
        found[str(row.get("question_id", number))] = text
    missing = [prompt.id for prompt in prompts if prompt.id not in found]
    if missing:
        raise ValueError(f"{file} has no answer to {len(missing)} of {len(prompts)} prompts, such as {missing[0]}")
    return {prompt.id: found[prompt.id] for prompt in prompts}


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def _object(file: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{file}, line {number} is not a JSON object")
    return row
