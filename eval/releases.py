"""Readers of the benchmarks' original release files.

Every reader yields rows in the Hugging Face hub schema of its benchmark, so that lm-eval's own task YAML
works on them unchanged:

| benchmark | hub set | row |
| --- | --- | --- |
| mmlu | cais/mmlu | question, subject, choices, answer (0..3) |
| gsm8k | openai/gsm8k, main | question, answer |
| triviaqa | mandarjoshi/trivia_qa, rc.nocontext | question, answer: {value, aliases} |
| webglm | THUDM/webglm-qa | question, answer, references |

Splits are named by what they are used for here: `dev` (MMLU's few-shot examples), `train`, `validation`
(chooses the rank) and `test` (the score that is reported). TriviaQA's test labels are not public, so its
`test` here is the hub's validation split, as in lm-eval. GSM8K and TriviaQA have no split of their own for
choosing, so `validation` is carved out of their training rows (see `carve`), unless the folder brings a
validation file, as our generated data does.
"""

import ast
import csv
import functools
import hashlib
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILES = {
    "mmlu": {"dev": "mmlu/dev", "validation": "mmlu/val", "test": "mmlu/test"},
    "gsm8k": {
        "train": "gsm8k/train.jsonl",
        "validation": "gsm8k/validation.jsonl",
        "test": "gsm8k/test.jsonl",
    },
    "triviaqa": {
        "train": "triviaqa/topics.dpr.trivia.dev.txt",
        "validation": "triviaqa/topics.dpr.trivia.validation.txt",
        "test": "triviaqa/topics.dpr.trivia.test.txt",
    },
    "webglm": {
        "train": "webglm/train.jsonl",
        "validation": "webglm/validation.jsonl",
        "test": "webglm/test.jsonl",
    },
}
LAYOUT = (
    "mmlu/{dev,val,test}/<subject>_{dev,val,test}.csv, gsm8k/{train,test}.jsonl, "
    "triviaqa/topics.dpr.trivia.{dev,test}.txt, webglm/{train,validation,test}.jsonl"
)
CARVED = ("gsm8k", "triviaqa")
LETTERS = "ABCD"
VALIDATION_ROWS = 500
MAX_UNPARSED = 0.01


@dataclass
class RowErrors:
    """Counts the rows of a data set and keeps `file:line: reason` of those that did not parse."""

    rows: int = 0
    bad: list[str] = field(default_factory=list)

    def parse(self, where: str, function: Callable, *args) -> Any:
        """Return `function(*args)`, or None (and note `where` and the reason) if the row is malformed."""
        try:
            value = function(*args)
        except (ValueError, KeyError, TypeError, IndexError, SyntaxError) as error:
            self.note(where, error)
            return None
        self.rows += 1
        return value

    def note(self, where: str, error: Exception) -> None:
        """Count a row at `where` ("file:line") that could not be read because of `error`."""
        self.rows += 1
        self.bad.append(f"{where}: {type(error).__name__}: {error}")

    def check(self) -> None:
        """Raise ValueError naming the count and the first `file:line` if more than 1% of the rows are bad."""
        if len(self.bad) > MAX_UNPARSED * self.rows:
            raise ValueError(
                f"{len(self.bad)} of {self.rows} rows do not parse (more than {MAX_UNPARSED:.0%}); "
                f"the first is {self.bad[0]}"
            )


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require(path: Path) -> Path:
    """Return `path` if it exists; raise FileNotFoundError with what to do about it if not."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: put the original release file there (layout: {LAYOUT}) "
            "or take the data from the hub with source=hub"
        )
    return path


def paths(benchmark: str, split: str, root: Path) -> list[Path]:
    """Return the files that `rows(benchmark, split, root)` reads.

    ValueError for an unknown benchmark or split, FileNotFoundError for a missing file.
    """
    if split not in FILES.get(benchmark, {}):
        known = "; ".join(f"{name}: {', '.join(splits)}" for name, splits in FILES.items())
        raise ValueError(f"no split {split!r} of benchmark {benchmark!r}; there are {known}")
    path = Path(root) / FILES[benchmark][split]
    if benchmark in CARVED and split == "validation" and not path.exists():
        path = Path(root) / FILES[benchmark]["train"]
    if benchmark == "mmlu":
        files = sorted(require(path).glob(f"*_{path.name}.csv"))
        return files or [require(path / f"<subject>_{path.name}.csv")]
    return [require(path)]


def rows(benchmark: str, split: str, root: Path, errors: RowErrors | None = None) -> list[dict]:
    """Return the rows of one split of a benchmark in its hub schema.

    Malformed rows are left out and noted in `errors` (pass one to see them). Raises ValueError if they are
    more than 1%, or for an unknown benchmark or split; FileNotFoundError if a file is missing.
    """
    errors = RowErrors() if errors is None else errors
    files = paths(benchmark, split, root)
    read = READERS[benchmark]
    found = [row for path in files for row in read(path, errors)]
    errors.check()
    has_own_validation = (Path(root) / FILES[benchmark]["validation"]).exists()
    if benchmark in CARVED and split != "test" and not has_own_validation:
        train, validation = carve(found)
        return train if split == "train" else validation
    return found


def carve(found: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Split a benchmark's training rows into (training, validation) by a hash of the question.

    500 questions go to validation, or a tenth of fewer than 5,000 rows; questions that differ only in
    punctuation or case go together. Use it on hub rows too: who trains
    and who scores get the same split from the same rows, whatever their order.
    """
    count = VALIDATION_ROWS if len(found) >= 10 * VALIDATION_ROWS else len(found) // 10
    return hold_out(found, lambda row: normalized(row["question"]), count, salt="validation")


@functools.cache
def _punctuation() -> dict[int, str]:
    codes = range(sys.maxunicode + 1)
    return {code: " " for code in codes if unicodedata.category(chr(code)).startswith("P")}


def normalized(text: str) -> str:
    """Return `text` in NFKC and case-folded, with every run of punctuation and white space made one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_punctuation()).split())


def hold_out(items: Iterable, text_of: Callable[[Any], str], count: int, salt: str) -> tuple[list, list]:
    """Split `items` into (kept, held out): the `count` texts with the smallest hashes are held out.

    Items of equal text always fall on the same side, and the order of `items` does not matter.
    """
    items = list(items)

    def key(text: str) -> bytes:
        return hashlib.sha256(f"{salt}\n{text}".encode()).digest()

    texts = [text_of(item) for item in items]
    chosen = set(sorted(set(texts), key=key)[:count])
    kept = [item for item, text in zip(items, texts, strict=True) if text not in chosen]
    return kept, [item for item, text in zip(items, texts, strict=True) if text in chosen]


def webglm_prompt(question: str, references: Sequence[str] = ()) -> str:
    """Return WebGLM's prompt, up to and including "Answer:"; without references only the question.

    The words are those of WebGLM's model/modeling_webglm.py; its separator, a single backslash its tokenizer
    was trained with, is a newline here.
    """
    numbered = [f"Reference [{number}]: {text}\n" for number, text in enumerate(references, start=1)]
    return "".join(numbered) + f"Question: {question}\nAnswer:"


def read_jsonl(path: Path, parse: Callable[[dict], Any], errors: RowErrors) -> Iterator[Any]:
    """Yield `parse(object)` of every line of a JSON-lines file; malformed lines go to `errors`."""
    # Binary lines: only "\n" ends one, and a badly encoded line is one bad row instead of the end of the
    # file.
    with open(require(path), "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = errors.parse(f"{path}:{number}", lambda line=line: parse(json.loads(line)))
                if row is not None:
                    yield row


def text_field(row: dict, name: str) -> str:
    """Return the text in `row[name]`; ValueError if it is not text or is empty."""
    text = row[name]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} is {text!r}, not text")
    return text


def _csv_rows(path: Path, parse: Callable[[list[str]], dict], errors: RowErrors, **dialect) -> Iterator[dict]:
    with open(require(path), encoding="utf-8", newline="") as file:
        reader = csv.reader(file, **dialect)
        while True:
            try:
                record = next(reader, None)
            except csv.Error as error:  # such as a quotation that never ends
                errors.note(f"{path}:{reader.line_num}", error)
                continue
            if record is None:
                return
            if record:
                row = errors.parse(f"{path}:{reader.line_num}", parse, record)
                if row is not None:
                    yield row


def _mmlu(path: Path, errors: RowErrors) -> Iterator[dict]:
    subject = path.stem.rsplit("_", 1)[0]

    def parse(record: list[str]) -> dict:
        question, *choices, letter = record
        if len(choices) != 4:
            raise ValueError(f"{len(record)} columns, not question, A, B, C, D, answer")
        if len(letter) != 1 or letter not in LETTERS:
            raise ValueError(f"answer is {letter!r}, not one of {', '.join(LETTERS)}")
        return {
            "question": question,
            "subject": subject,
            "choices": choices,
            "answer": LETTERS.index(letter),
        }

    return _csv_rows(path, parse, errors)


def _gsm8k(path: Path, errors: RowErrors) -> Iterator[dict]:
    def parse(row: dict) -> dict:
        return {"question": text_field(row, "question"), "answer": text_field(row, "answer")}

    return read_jsonl(path, parse, errors)


def _triviaqa(path: Path, errors: RowErrors) -> Iterator[dict]:
    def parse(record: list[str]) -> dict:
        question, listed = record
        aliases = ast.literal_eval(listed)
        if not isinstance(aliases, list) or not aliases or not all(isinstance(a, str) for a in aliases):
            raise ValueError("the second column is not a list of aliases")
        return {"question": question, "answer": {"value": plain_alias(aliases), "aliases": aliases}}

    return _csv_rows(path, parse, errors, delimiter="\t")


def plain_alias(aliases: Sequence[str]) -> str:
    """Return the first alias in ASCII with a letter or digit and without brackets, else simply the first.

    The release lists aliases in no order, and often an emoji, another script or a Wikipedia title such as
    "BH (disambiguation)" comes first; the hub's `value` is the plain name.
    """
    plain = (a for a in aliases if a.isascii() and "(" not in a and any(c.isalnum() for c in a))
    return next(plain, aliases[0])


def _webglm(path: Path, errors: RowErrors) -> Iterator[dict]:
    def parse(row: dict) -> dict:
        references = row["references"]
        if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
            raise ValueError("references is not a list of texts")
        return {
            "question": text_field(row, "question"),
            "answer": text_field(row, "answer"),
            "references": references,
        }

    return read_jsonl(path, parse, errors)


READERS = {"mmlu": _mmlu, "gsm8k": _gsm8k, "triviaqa": _triviaqa, "webglm": _webglm}
