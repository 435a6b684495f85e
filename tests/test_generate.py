"""`python -m experiments.generate`: the answers of every rank, the same dice for all of them, and their columns."""

from __future__ import annotations

import io
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import LLAMA, base

from experiments.data.formats import ALPACA_NO_INPUT
from experiments.generate import SameNoise
from experiments.side_by_side import SideBySide, wrapped
from qdylora import at_rank, cut, load_adapter, load_tokenizer
from tests.commands import inside

COMMAND = "experiments.generate"
CELL = "outputs/smoke/table1/tiny--alpaca--qdylora--seed0"
SMOKE = (
    "table=table1",
    "scale=smoke",
    "data=alpaca",
    "method=qdylora",
    "tracker=none",
    "method.bits=32",
    "optim.lr=1e-2",
)
PROMPTS = ["Name a colour.", "What is two and two?"]
SHORT = ("max_new_tokens=24", f"cell={CELL}")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a trained cell, in float32, and a file of prompts."""
    folder = tmp_path_factory.mktemp("home")
    done = inside("experiments.train", *SMOKE, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = (json.dumps({"question_id": i, "text": text}) for i, text in enumerate(PROMPTS))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def generate(home: Path, *options: str) -> str:
    done = inside(COMMAND, *SHORT, *options, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


def columns(printed: str) -> list[list[str]]:
    """For each prompt the text of its columns, line by line."""
    answers = []
    for part in printed.split("> ")[1:]:
        _, head, rule, *lines = part.rstrip("\n").split("\n")
        ends = [len(dashes) for dashes in rule.split(" | ")]
        assert len(head.split(" | ")) == len(ends)
        shown = [[line[sum(ends[:k]) + 3 * k :][: ends[k]] for line in lines] for k in range(len(ends))]
        answers.append(["\n".join(line.rstrip() for line in column).rstrip() for column in shown])
    return answers


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")


@pytest.mark.parametrize("how", ["truncate", "svd"])
def test_without_temperature_every_rank_answers_as_stock_generation_does(how, home, wide):
    model = load_adapter(base("llama", 32, home), home / CELL / "adapter").eval()
    tokenizer = load_tokenizer("random", cache=home, random_config=LLAMA)
    printed = columns(generate(home, "prompts=prompts.jsonl", "ranks=[1,8,64]", "temperature=0", f"cut={how}"))
    assert len(printed) == len(PROMPTS)
    different = set()
    for prompt, found in zip(PROMPTS, printed, strict=True):
        ids = tokenizer(ALPACA_NO_INPUT.format(instruction=prompt), return_tensors="pt").input_ids
        for rank, answer in zip((1, 8, 64), found, strict=True):
            with cut(model, how), at_rank(model, rank):
                new = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
            text = tokenizer.decode(new, skip_special_tokens=True).strip()
            assert answer == "\n".join(wrapped(text, 131)).rstrip()
            different.add(text)
    assert len(different) > 1


def test_an_answer_does_not_depend_on_the_other_ranks_but_on_the_seed(home, wide):
    options = ("prompts=prompts.jsonl", "temperature=0.7", "top_p=0.9")
    together = columns(generate(home, *options, "ranks=[1,8,64]"))
    alone = columns(generate(home, *options, "ranks=[8]"))
    other = columns(generate(home, *options, "ranks=[8]", "sampling_seed=1"))
    greedy = columns(generate(home, *options, "ranks=[8]", "temperature=0"))
    unwrapped = [answers[1].replace("\n", "") for answers in together]
    assert unwrapped == [answers[0].replace("\n", "") for answers in alone]
    assert len({str(alone), str(other), str(greedy)}) == 3


def test_prompts_are_typed_line_by_line(home, monkeypatch, wide):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a colour.\n\nWhat is two and two?\n"))
    typed = generate(home, "ranks=[1,8]", "temperature=0")
    assert typed == generate(home, "ranks=[1,8]", "temperature=0", "prompts=prompts.jsonl")


def test_the_noise_samples_from_the_softmax_and_is_the_same_for_all_rows():
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    noise = SameNoise(seed=0)
    scores = probabilities.log().repeat(4, 1)
    drawn = torch.stack([noise(None, scores).argmax(-1) for _ in range(6000)])
    assert (drawn == drawn[:, :1]).all()
    assert torch.bincount(drawn[:, 0]) / 6000 == pytest.approx(probabilities.numpy(), abs=0.03)


# Columns --------------------------------------------------------------------------------------------


def test_text_that_grows_changes_its_last_line_only():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab  \n") if rng.random() < 0.8 else "c" * 9 for _ in range(60))
        width = rng.randint(4, 12)
        lines = wrapped(text, width)
        assert max(map(len, lines)) <= width
        assert "".join(lines).replace(" ", "") == "".join(text.split())
        for end in range(1, len(text)):
            before = wrapped(text[:end], width)
            assert before[:-1] == lines[: len(before) - 1]


class Terminal(io.StringIO):
    """A terminal that does what the two control sequences say."""

    def __init__(self, live: bool):
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live

    @property
    def lines(self) -> list[str]:
        shown: list[str] = []
        for part in re.split(r"(\x1b\[\d+A\x1b\[J)", self.getvalue()):
            if up := re.fullmatch(r"\x1b\[(\d+)A\x1b\[J", part):
                del shown[-int(up[1]) :]
            else:
                shown += part.splitlines()
        return shown


def stream(live: bool, tokens: list[list[int]]) -> tuple[Terminal, list[list[str]]]:
    """Two columns of words; what was shown after each step."""
    out, words = Terminal(live), {1: "one ", 2: "two ", 3: "three ", 4: "four "}
    columns = SideBySide(["a", "b"], lambda t: "".join(words[i] for i in t).strip(), {0}, out, width=27)
    columns.put(torch.zeros(2, 5))
    shown = []
    for step in tokens:
        columns.put(torch.tensor(step))
        shown.append(out.lines[2:])
    columns.end()
    return out, shown


TOKENS = [[1, 3], [2, 3], [3, 3], [4, 0], [4, 0], [0, 0]]
WHOLE = ["one two      | three three", "three four   | three", "four         |"]


def test_a_terminal_shows_every_token_as_it_comes():
    out, shown = stream(True, TOKENS)
    assert shown[0] == ["one          | three"]
    assert shown[1] == ["one two      | three three"]
    assert out.lines[2:] == WHOLE


def test_a_pipe_gets_a_line_when_it_is_full_in_all_columns():
    out, shown = stream(False, TOKENS)
    assert shown[0] == shown[1] == [] and "\x1b" not in out.getvalue()
    assert shown[3] == WHOLE[:1] and out.lines[2:] == WHOLE


def test_a_terminal_keeps_what_it_redraws_on_one_screen(monkeypatch):
    """One answer of many short lines, one of a single long one that has not filled its first line yet."""
    monkeypatch.setenv("LINES", "5")
    out = Terminal(live=True)
    columns = SideBySide(["a", "b"], lambda tokens: "".join(map(chr, tokens)), {0}, out, width=40)
    columns.put(torch.zeros(2, 1))
    for _ in range(9):
        for letter, other in (("x", "y"), ("\n", "y")):
            columns.put(torch.tensor([ord(letter), ord(other)]))
            assert max(map(int, re.findall(r"\x1b\[(\d+)A", out.getvalue())), default=0) <= 4
    columns.end()
    assert [line[0] for line in out.lines[2:11]] == ["x"] * 9 and out.lines[2].count("y") == 18


# Refusals -------------------------------------------------------------------------------------------

BAD = {
    "rank 65": ("generate.ranks has 65; ranks go from r_min 1 to r_max 64", ["ranks=[65]"]),
    "no rank": ("generate.ranks is empty", ["ranks=[]"]),
    "no file": ("generate.prompts is 'nowhere.jsonl', which is no file", ["prompts=nowhere.jsonl"]),
    "no prompts": ("generate.prompts: empty.jsonl holds no prompts", ["prompts=empty.jsonl"]),
    "no template": ("generate.format is 'chat', but the tokenizer of random has no chat template", ["format=chat"]),
    "an unknown format": ("generate.format is 'html'; choose one of auto, guanaco", ["format=html"]),
    "a negative temperature": ("generate.temperature is -1.0; it must be at least 0", ["temperature=-1"]),
    "a share of nothing": ("generate.top_p is 0.0; it must be above 0", ["top_p=0"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence(name, home):
    says, options = BAD[name]
    (home / "empty.jsonl").write_text("")
    done = inside(COMMAND, *SHORT, *options, cwd=home)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
