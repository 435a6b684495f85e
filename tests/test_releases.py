"""The readers of the benchmarks' release files, on the real files and on broken ones."""

import json
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.utils import apply_template

from eval.releases import RowErrors, carve, hold_out, paths, plain_alias, rows, webglm_prompt


def lm_eval_yaml(path: str) -> dict:
    class Loader(yaml.SafeLoader):
        """Reads lm-eval's files without calling the functions they name."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return yaml.load((Path(lm_eval.__file__).parent / "tasks" / path).read_text(), Loader)


@pytest.mark.parametrize(
    "benchmark, split, count",
    [
        ("mmlu", "dev", 285),
        ("mmlu", "validation", 1531),
        ("gsm8k", "train", 7473 - 500),
        ("gsm8k", "validation", 500),
        ("gsm8k", "test", 660),
        ("triviaqa", "train", 8837 - 500),
        ("triviaqa", "validation", 500),
        ("triviaqa", "test", 4000),
    ],
)
def test_real_files_are_read_to_the_last_row(shared, benchmark, split, count):
    errors = RowErrors()
    assert len(rows(benchmark, split, shared / "data", errors)) == count
    assert errors.bad == []


def test_mmlu_has_57_subjects_with_four_choices(shared):
    found = rows("mmlu", "test", shared / "data")
    assert len({row["subject"] for row in found}) == 57 == len(paths("mmlu", "test", shared / "data"))
    assert all(len(row["choices"]) == 4 and row["answer"] in range(4) for row in found)
    first = rows("mmlu", "dev", shared / "data")[0]
    assert first == {
        "question": "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.",
        "subject": "abstract_algebra",
        "choices": ["0", "1", "2", "3"],
        "answer": 1,
    }


@pytest.mark.parametrize(
    "benchmark, template",
    [
        ("mmlu", "mmlu/default/_default_template_yaml"),
        ("gsm8k", "gsm8k/gsm8k.yaml"),
        ("triviaqa", "triviaqa/default.yaml"),
    ],
)
def test_rows_fit_lm_evals_own_templates(shared, benchmark, template):
    task = lm_eval_yaml(template)
    row = rows(benchmark, "test", shared / "data")[0]
    assert row["question"].strip() in apply_template(task["doc_to_text"], row)
    target = task["doc_to_target"]  # lm-eval takes either the name of a column or a template
    answer = row[target] if target in row else apply_template(target, row)
    expected = {"mmlu": row["answer"], "gsm8k": row["answer"]}.get(benchmark) or str(row["answer"]["aliases"])
    assert answer == expected


def test_training_never_meets_what_chooses_the_rank(shared):
    for benchmark in ("gsm8k", "triviaqa"):
        train = {row["question"] for row in rows(benchmark, "train", shared / "data")}
        chooses = {row["question"] for row in rows(benchmark, "validation", shared / "data")}
        assert train and chooses and not train & chooses


def test_carving_depends_on_the_text_alone():
    found = [{"question": f"How many are {n} and {n}?"} for n in range(6000)]
    train, validation = carve(found)
    assert (len(train), len(validation)) == (5500, 500)
    backwards = carve(found[::-1])[1]
    assert sorted(backwards, key=str) == sorted(validation, key=str)
    assert len(carve(found[:4000])[1]) == 400
    spelled = [{"question": row["question"].upper().replace("?", " ?")} for row in validation[:100]]
    assert carve([*found, *spelled])[1][-100:] == spelled


def test_equal_texts_fall_on_the_same_side():
    kept, held = hold_out([(n % 50, n) for n in range(200)], lambda item: str(item[0]), 10, salt="s")
    assert len(held) == 40
    assert not {a for a, _ in kept} & {a for a, _ in held}
    assert hold_out([(n % 50, n) for n in range(200)], lambda item: str(item[0]), 10, salt="t")[1] != held


def test_a_folders_own_validation_file_leaves_training_whole(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split, count in (("train", 50), ("validation", 3)):
        lines = [json.dumps({"question": f"{split} {n}", "answer": "#### 1"}) for n in range(count)]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines))
    assert len(rows("gsm8k", "train", tmp_path)) == 50
    assert [row["question"] for row in rows("gsm8k", "validation", tmp_path)] == [f"validation {n}" for n in range(3)]


def test_a_malformed_row_is_reported_with_file_and_line(tmp_path):
    file = tmp_path / "gsm8k" / "test.jsonl"
    file.parent.mkdir()
    good = [json.dumps({"question": f"q{n}", "answer": "a\u2028b"}, ensure_ascii=False) for n in range(300)]
    lines = [line.encode() for line in good]
    lines[41] = b'{"question": "q"'
    lines[42] = b'{"question": "\xff", "answer": "1"}'
    lines[43] = b'{"question": "", "answer": "1"}'
    file.write_bytes(b"\n".join(lines))
    errors = RowErrors()
    assert len(rows("gsm8k", "test", tmp_path, errors)) == 297
    assert errors.rows == 300
    assert [entry.split(": ")[0] for entry in errors.bad] == [f"{file}:{n}" for n in (42, 43, 44)]


def test_more_than_one_percent_of_malformed_rows_stops(tmp_path):
    file = tmp_path / "mmlu" / "test" / "virology_test.csv"
    file.parent.mkdir(parents=True)
    good = ["q,1,2,3,4,A"] * 98
    file.write_text("\n".join([*good, "q,1,2,3,4,A", "q,1,2,3,4,E"]))
    assert len(rows("mmlu", "test", tmp_path)) == 99
    file.write_text("\n".join([*good[:50], "q,1,2,3,A", *good[50:], "q,1,2,3,4,E"]))
    with pytest.raises(ValueError, match=rf"2 of 100 rows .*{file}:51: "):
        rows("mmlu", "test", tmp_path)


def test_triviaqa_rows_with_quotes_and_tabs(tmp_path):
    file = tmp_path / "triviaqa" / "topics.dpr.trivia.test.txt"
    file.parent.mkdir()
    good = 'Who?\t"[\'a\\tb\', ""Men\'s""]"\n'
    file.write_text(good * 200 + "Who?\tno list\nonly a question\n")
    errors = RowErrors()
    found = rows("triviaqa", "test", tmp_path, errors)
    assert found[0] == {"question": "Who?", "answer": {"value": "a\tb", "aliases": ["a\tb", "Men's"]}}
    assert [entry.split(": ")[0] for entry in errors.bad] == [f"{file}:201", f"{file}:202"]


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        rows("webglm", "test", tmp_path)
    message = str(raised.value)
    assert str(tmp_path / "webglm" / "test.jsonl") in message
    assert "source=hub" in message and "webglm/{train,validation,test}.jsonl" in message
    with pytest.raises(FileNotFoundError, match=r"<subject>_test\.csv"):
        (tmp_path / "mmlu" / "test").mkdir(parents=True)
        rows("mmlu", "test", tmp_path)


def test_unknown_splits_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev' of benchmark 'gsm8k'"):
        rows("gsm8k", "dev", tmp_path)
    with pytest.raises(ValueError, match="benchmark 'squad'"):
        rows("squad", "test", tmp_path)


def test_a_plain_alias_is_preferred():
    assert plain_alias(["🚁", "BH (disambiguation)", "Helicopter"]) == "Helicopter"
    assert plain_alias(["拳闘", "?!"]) == "拳闘"


def test_webglm_on_a_real_record(shared, tmp_path):
    (tmp_path / "webglm").mkdir()
    record = (shared / "data" / "webglm" / "webglm_qa_one_test_record.jsonl").read_text()
    (tmp_path / "webglm" / "test.jsonl").write_text(record)
    (row,) = rows("webglm", "test", tmp_path)
    assert len(row["references"]) == 5 and "[5]" in row["answer"]
    prompt = webglm_prompt(row["question"], row["references"])
    assert prompt.startswith("Reference [1]: Driving in snow at night is dangerous")
    assert prompt.endswith(f"\nQuestion: {row['question']}\nAnswer:")
    assert prompt.count("\nReference [") == 4
    assert webglm_prompt("Why?") == "Question: Why?\nAnswer:"
