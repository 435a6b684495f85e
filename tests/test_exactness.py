"""Real questions, SmolLM2-135M in 4 and 32 bits: the same answers as stock lm-eval on the exported adapter, in float32.

`make test-exact` asks more questions at more ranks (`--exact`).
"""

import pytest

from eval.benchmarks import Settings, load
from experiments.against_stock import R_MAX, Subject, max_abs_dlogp, only, outcomes, outcomes_of_all_ranks

SUBJECTS = [
    *("abstract_algebra", "anatomy", "astronomy", "college_medicine", "econometrics", "formal_logic", "global_facts"),
    *("high_school_physics", "jurisprudence", "marketing", "moral_disputes", "world_religions"),
]


@pytest.fixture(params=[4, 32], ids=["4 bits", "32 bits"])
def subject(request):
    return Subject(bits=request.param)


@pytest.fixture
def questions(request):
    """(ranks, MMLU subjects, questions of each, questions of GSM8K, of TriviaQA)"""
    whole = request.config.getoption("--exact")
    return ([1, 8, R_MAX], SUBJECTS, 3, 40, 40) if whole else ([1, R_MAX], SUBJECTS[:2], 1, 1, 6)


def compared(subject, folder, ranks, task, batch_size):
    """Our outcomes and stock lm-eval's, at each rank."""
    ours = outcomes_of_all_ranks(subject.ours(subject.any_rank(folder), ranks, progress=False), task)
    for rank in ranks:
        yield ours[rank], outcomes(subject.stock(folder, rank, batch_size), task)


def test_mmlu_loglikelihoods(subject, questions, shared, tmp_path):
    ranks, subjects, each, *_ = questions
    task = load("mmlu", "test", Settings(5, shared / "data", limit=57 * each))
    task = only(task, [f"mmlu_{name}" for name in subjects])
    seen = set()
    for ours, stock in compared(subject, tmp_path, ranks, task, 2):
        assert len(ours) == each * len(subjects)
        assert max_abs_dlogp(ours, stock) <= 1e-4
        for key in ours:
            choice = [max(range(4), key=lambda i: side[key][i][0][0]) for side in (ours, stock)]
            assert choice[0] == choice[1]
        seen.add(tuple(ours[key][0][0][0] for key in sorted(ours)))
    assert len(seen) == len(ranks)  # the ranks answer differently


@pytest.mark.parametrize("name", ["gsm8k", "triviaqa"])
def test_generated_answers(name, subject, questions, shared, tmp_path):
    ranks, n = questions[0], questions[3 if name == "gsm8k" else 4]
    task = load(name, "test", Settings(5, shared / "data", limit=n))
    for ours, stock in compared(subject, tmp_path, ranks, task, 8):
        assert len(ours) == n
        assert ours == stock
