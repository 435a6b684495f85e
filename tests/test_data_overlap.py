"""Counting training rows that are also evaluation items."""

from experiments.data.overlap import count, evaluation_questions, normalized, questions


def test_normalized_ignores_case_punctuation_and_width():
    assert normalized("What's  the\nCAPITAL of Ｃhad?") == "what s the capital of chad"
    assert normalized("Straße") == normalized("STRASSE")
    assert normalized("2 + 2") != normalized("2 2")


def test_count_is_per_evaluation_set():
    training = ["Who is it?", "who is it", "What?", "?!"]
    evaluation = {"a/test": ["WHO IS IT"], "b/test": ["nothing", "..."], "c/test": []}
    assert count(training, evaluation) == {"a/test": 2, "b/test": 0, "c/test": 0}


def test_multiple_choice_is_compared_with_and_without_choices():
    row = {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": 0}
    known = {"mmlu/test": questions([row])}
    assert count(["which", "Which?\n(A) w\n(B) x\n(C) y\n(D) z", "Which? A. x"], known) == {"mmlu/test": 2}


def test_evaluation_questions_of_a_folder_with_some_benchmarks(shared):
    known = evaluation_questions(shared / "data")
    assert set(known) == {
        f"{name}/{split}" for name in ("mmlu", "gsm8k", "triviaqa") for split in ("validation", "test")
    }
    assert len(known["gsm8k/test"]) == 660
