"""The generated data: right, balanced, reproducible, and split so that memory does not answer the test."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from eval.releases import FILES, LETTERS, rows, sha256
from experiments.data import facts, tasks, world
from experiments.data.sources import generated
from experiments.data.tasks import Pool, choice_tasks, closed_tasks, grounded_tasks, problem_tasks


@pytest.fixture(scope="module")
def folder(generated_root) -> Path:
    return generated(generated_root, seed=0)


def test_well_known_facts_are_right():
    known = {fact.key: fact.answer for fact in world.facts()}
    assert known["country:France:capital"] == "Paris"
    assert known["country:Chad:capital"] == "N'Djamena"
    assert known["country:United States:continent"] == "North America"
    assert known["country:Japan:currency"] == "Yen"
    assert known["country:Kenya:code3"] == "KEN"
    assert known["country:Greece:language"] == "Greek"
    assert known["city:Lyon:city"] == "France"
    assert known["element:iron:symbol"] == "Fe"
    assert known["element:gold:number"] == "79"
    assert known["currency:Swedish Krona:currency_code"] == "SEK"
    assert len(known) == len(world.facts())


def test_every_entity_is_in_one_split():
    splits = defaultdict(set)
    for fact in world.facts():
        splits[fact.entity].add(fact.split)
    assert all(len(found) == 1 for found in splits.values())
    sizes = Counter((entity.kind, *found) for entity, found in splits.items())
    assert sizes["element", "test"] == 37 and sizes["element", "train"] == 59
    assert min(sizes.values()) >= 20


def test_a_test_fact_is_never_met_in_training(folder):
    """No row of any training file states, asks or answers what a validation or test question asks for."""
    unseen = [fact for fact in world.facts() if fact.split != "train"]
    statements = {tasks.statement(fact) for fact in unseen} | {tasks.question(fact) for fact in unseen}
    files = ["alpaca/alpaca.json", "oasst1/qlora_oa_questions.jsonl", "self_instruct/seed_tasks.jsonl"]
    files += [FILES[name]["train"] for name in ("gsm8k", "triviaqa", "webglm")]
    files += [path.relative_to(folder) for path in (folder / "flan_v2").rglob("*.tsv")]
    files += [path.relative_to(folder) for path in (folder / "mmlu" / "dev").iterdir()]
    for name in files:
        text = (folder / name).read_text()
        assert [found for found in statements if found in text] == [], name
    trained = {tasks.question(fact) for fact in world.facts() if fact.split == "train"}
    alpaca = (folder / "alpaca" / "alpaca.json").read_text()
    assert sum(question in alpaca for question in trained) > 1000  # the search above can find something


def test_splits_of_a_benchmark_share_no_question(folder):
    for benchmark in FILES:
        asked = Counter()
        for split in FILES[benchmark]:
            found = rows(benchmark, split, folder)
            asked.update({(row["question"], *row.get("choices", ())) for row in found})
        assert max(asked.values()) == 1, benchmark


def test_an_instruction_set_never_asks_a_fact_twice():
    for name in facts.INSTRUCTION_FILES:
        found = facts.mixture(name, seed=0)
        own = Counter(task.keys[0] for task in found)
        assert max(own.values()) == 1
        assert Counter(task.family for task in found).keys() == {"choice", "problem", "closed", "grounded"}


def test_choices_are_fair(folder):
    for split, (_, count) in facts.MMLU_ROWS.items():
        found = rows("mmlu", split, folder)
        by_subject = defaultdict(list)
        for row in found:
            assert len(set(row["choices"])) == 4
            assert len(row["question"].split()) <= 25
            by_subject[row["subject"]].append(row["answer"])
        assert set(by_subject) == set(tasks.SUBJECTS)
        for answers in by_subject.values():
            assert count - 3 <= len(answers) <= count
            times = [answers.count(place) for place in range(4)]
            assert max(times) - min(times) <= 1
    order = [row["answer"] for row in rows("mmlu", "test", folder)]
    assert order[:8] != [0, 1, 2, 3] * 2


def test_the_right_option_is_the_only_right_one(folder):
    answers = defaultdict(set)
    for fact in world.facts():
        answers[tasks.question(fact)] |= {fact.answer, *fact.also_right}
    kinds = defaultdict(set)
    for fact in world.facts():
        kinds[f"Which of these is {tasks.KINDS[fact.entity.kind]}?"].add(fact.entity.name)
    checked = 0
    for row in rows("mmlu", "test", folder):
        right = answers.get(row["question"]) or kinds.get(row["question"])
        if right:
            assert [choice in right for choice in row["choices"]].count(True) == 1
            assert row["choices"][row["answer"]] in right
            checked += 1
    assert checked > 250


def test_word_problems_add_up(folder):
    for row in [*rows("gsm8k", "train", folder), *rows("gsm8k", "test", folder)]:
        *steps, final = row["answer"].splitlines()
        value = int(re.fullmatch(r"#### (\d+)", final)[1])
        assert steps and value > 0 and re.search(rf"\b{value}\b", steps[-1])
    assert world._correct("He has 2*3+4=10 and 12 / 4 = 3.")
    assert not world._correct("He has 39.24 - 30.24 = 8 left.")
    assert not world._correct("He gets 1/2 = 153 of them.")
    assert not world._correct("He has 3 left.")


def test_references_hold_the_answer_that_is_cited(folder):
    several = 0
    for row in rows("webglm", "test", folder):
        assert len(row["references"]) in (3, 4)
        assert len(set(row["references"])) == len(row["references"])
        sentences = re.findall(r"(.+?)\[(\d)\]\.(?: |$)", row["answer"])
        assert sentences
        several += len(sentences) > 1
        for sentence, number in sentences:
            assert row["references"][int(number) - 1] == f"{sentence}."
    assert several > 10


def test_triviaqa_answers_survive_lm_evals_stops(folder):
    for row in rows("triviaqa", "test", folder):
        assert row["answer"]["value"] in row["answer"]["aliases"]
        assert not set("\n.,") & set(row["answer"]["value"])


def test_families_follow_their_pool():
    pool = Pool("validation", seed=1, use="test")
    made = [
        *choice_tasks(pool, tasks.SUBJECTS, 40),
        *problem_tasks(pool, 5),
        *closed_tasks(pool, 20),
        *grounded_tasks(pool, 20),
    ]
    splits = {fact.key: fact.split for fact in world.facts()}
    splits |= {f"{fact.entity.kind}:{fact.entity.name}:kind": fact.split for fact in world.facts()}
    splits |= {problem.question: problem.split for problem in world.problems(1)}
    assert {splits[key] for task in made for key in task.keys} == {"validation"}
    assert all(task.answer in LETTERS for task in made if task.family == "choice")
    assert choice_tasks(pool, ["chemical_symbols"], 1000) and not choice_tasks(pool, ["chemical_symbols"], 1)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        Pool("dev", seed=0, use="test")


def test_files_are_the_same_in_another_process(folder, tmp_path):
    """Byte for byte, under another hash seed: no order of a set gets into the data."""
    code = "import sys; from pathlib import Path; from experiments.data import facts; "
    code += "facts.build(Path(sys.argv[1]), 0)"
    root = Path(__file__).resolve().parents[1]
    environment = {"PYTHONHASHSEED": "12345", "PATH": "", "PYTHONPATH": str(root), "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, cwd=tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == {name: sha256(tmp_path / name) for name in manifest}


def test_seeds_ask_different_questions_about_the_same_split():
    one, other = (facts.mixture("alpaca", seed) for seed in (0, 1))
    assert [task.question for task in one] != [task.question for task in other]
