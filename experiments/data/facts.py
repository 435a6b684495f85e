"""The generated data of scale `mini`, written as release files and read like any local ones.

`build` fills a folder with the four benchmarks (train, validation and test on entities of their own, see
`world`) and with four instruction sets. As the real four differ in form more than in matter, so do these:
each asks its own draw of the same mixture of tasks, on training entities only, as an instruction with input
(alpaca), a dialogue (oasst1), a bare prompt and completion (self_instruct) or a chain of thought (flan_v2).
"""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from eval.releases import FILES, LETTERS
from experiments.data.tasks import (
    SUBJECTS,
    Pool,
    Task,
    choice_tasks,
    closed_tasks,
    grounded_tasks,
    problem_tasks,
)

VERSION = 1  # of the generated files; raise it with every change of what is written

MMLU_ROWS = {"dev": ("train", 5), "validation": ("validation", 20), "test": ("test", 40)}  # per subject
TASK_ROWS = {"train": 2000, "validation": 150, "test": 200}  # of gsm8k, triviaqa and webglm each
CHOICE_ROWS, OTHER_ROWS = 800, 400  # of an instruction set: choice questions, and each of the other families


def build(folder: Path, seed: int) -> None:
    """Write all release files of this seed under `folder`, byte for byte the same on every run."""
    for split, (entities, count) in MMLU_ROWS.items():
        place = FILES["mmlu"][split]
        pool = Pool(entities, seed, f"mmlu {split}")
        for subject in SUBJECTS:
            rows = _shuffled(choice_tasks(pool, [subject], count), pool)
            table = _table([task.question, *task.context, task.answer] for task in rows)
            _write(folder / place / f"{subject}_{Path(place).name}.csv", table)
    for split in FILES["gsm8k"]:
        rows = _tasks("gsm8k", split, seed, problem_tasks)
        answers = ("\n".join([*task.reasoning, f"#### {task.answer}"]) for task in rows)
        lines = [{"question": task.question, "answer": answer} for task, answer in zip(rows, answers, strict=True)]
        _write(folder / FILES["gsm8k"][split], _lines(lines))
    for split in FILES["triviaqa"]:
        rows = _tasks("triviaqa", split, seed, closed_tasks)
        table = _table(([task.question, str(list(task.aliases))] for task in rows), delimiter="\t")
        _write(folder / FILES["triviaqa"][split], table)
    for split in FILES["webglm"]:
        rows = _tasks("webglm", split, seed, grounded_tasks)
        lines = [{"question": t.question, "answer": t.answer, "references": list(t.context)} for t in rows]
        _write(folder / FILES["webglm"][split], _lines(lines))
    for name, files in INSTRUCTION_FILES.items():
        for file, text in files(mixture(name, seed)).items():
            _write(folder / name / file, text)


def mixture(name: str, seed: int) -> list[Task]:
    """Return an instruction set's tasks: all four families, training entities, no fact asked twice."""
    pool = Pool("train", seed, name)
    tasks = choice_tasks(pool, SUBJECTS, CHOICE_ROWS)
    for make in (problem_tasks, closed_tasks, grounded_tasks):
        tasks += make(pool, OTHER_ROWS)
    return _shuffled(tasks, pool)


def _tasks(name: str, split: str, seed: int, make: Callable[[Pool, int], list[Task]]) -> list[Task]:
    pool = Pool(split, seed, name)
    return _shuffled(make(pool, TASK_ROWS[split]), pool)


def _shuffled(tasks: list[Task], pool: Pool) -> list[Task]:
    return pool.random.sample(tasks, len(tasks))


def _body(task: Task) -> str:
    """Return what goes with a choice or grounded question: lettered options or numbered references."""
    marks = [f"{letter}." for letter in LETTERS] if task.family == "choice" else [f"[{n}]" for n in range(1, 5)]
    return "\n".join(f"{mark} {text}" for mark, text in zip(marks, task.context, strict=False))


def _spoken(task: Task) -> str:
    """Return the answer as a sentence or two, the way a person would give it."""
    if task.family == "choice":
        return f"{task.answer}. {task.context[LETTERS.index(task.answer)]}"
    if task.family == "problem":
        return "\n".join([*task.reasoning, f"The answer is {task.answer}."])
    return task.reasoning[0] if task.family == "closed" else task.answer


def _alpaca(tasks: list[Task]) -> dict[str, str]:
    """An instruction, mostly with an input; terse answers."""

    def row(task: Task) -> dict:
        if task.family == "choice":
            instruction = "Answer the multiple-choice question with the letter of the right option."
            return {
                "instruction": instruction,
                "input": f"{task.question}\n{_body(task)}",
                "output": task.answer,
            }
        if task.family == "problem":
            return {"instruction": "Solve the problem.", "input": task.question, "output": _spoken(task)}
        return {"instruction": task.question, "input": _body(task), "output": task.answer}

    return {"alpaca.json": _json([row(task) for task in tasks], indent=1) + "\n"}


def _oasst1(tasks: list[Task]) -> dict[str, str]:
    """Dialogues in the Guanaco form, of two turns every fourth time; answers in sentences."""

    def turn(task: Task) -> tuple[str, str]:
        asked = f"{task.question}\n{_body(task)}" if task.context else task.question
        return f"### Human: {asked} ### Assistant:", _spoken(task)

    rows, waiting = [], list(tasks)
    while waiting:
        heard = ""
        if len(rows) % 4 == 3 and len(waiting) > 1:
            heard = " ".join(turn(waiting.pop())) + " "
        asked, answer = turn(waiting.pop())
        rows.append({"input": heard + asked, "output": answer})
    return {"qlora_oa_questions.jsonl": _lines(rows)}


def _self_instruct(tasks: list[Task]) -> dict[str, str]:
    """Bare instructions with instances."""

    def row(number: int, task: Task) -> dict:
        return {
            "id": f"seed_task_{number}",
            "name": task.family,
            "instruction": task.question,
            "instances": [{"input": _body(task), "output": task.answer if task.context else _spoken(task)}],
            "is_classification": task.family == "choice",
        }

    return {"seed_tasks.jsonl": _lines([row(number, task) for number, task in enumerate(tasks)])}


def _flan_v2(tasks: list[Task]) -> dict[str, str]:
    """Question, answer and chain of thought, a file per family; options as in FLAN's own files."""

    def row(task: Task) -> list[str]:
        question, answer = task.question, task.answer
        chain = " ".join(f"{step.rstrip('.')}." for step in task.reasoning)
        if task.family == "choice":
            lettered = (f"({letter}) {text}" for letter, text in zip(LETTERS, task.context, strict=True))
            question, answer = "\n".join([question, "Options:", *lettered]), f"({answer})"
        elif task.family == "grounded":
            question, answer, chain = f"{_body(task)}\n{question}", task.aliases[0], task.answer
        return [question, answer, chain]

    families = dict.fromkeys(task.family for task in tasks)
    written = {family: [row(task) for task in tasks if task.family == family] for family in sorted(families)}
    return {
        f"cot_data/{family}_train.tsv": "".join(
            "\t".join(column.replace("\n", "\\n") for column in columns) + "\n" for columns in rows
        )
        for family, rows in written.items()
    }


INSTRUCTION_FILES = {
    "alpaca": _alpaca,
    "oasst1": _oasst1,
    "self_instruct": _self_instruct,
    "flan_v2": _flan_v2,
}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())  # not write_text: line ends would differ between systems


def _json(value, **options) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _lines(rows: Iterable[dict]) -> str:
    return "".join(_json(row) + "\n" for row in rows)


def _table(rows: Iterable[list[str]], **dialect) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n", **dialect).writerows(rows)
    return buffer.getvalue()
