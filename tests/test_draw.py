"""The draw of ranks against closed forms, and what it is keyed by."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import chisquare
from tiny import adapted

from qdylora import Draw, DrawCallback, gate_of

POWERS = (1, 2, 4, 8, 16, 32, 64)
KINDS = {
    "uniform": Draw(),
    "uniform from 5": Draw(r_max=20, r_min=5),
    "list": Draw(kind="list", ranks=POWERS),
    "geometric": Draw(kind="geometric"),
    "geometric from 5": Draw(kind="geometric", r_max=20, r_min=5, p=0.3),
    "fixed": Draw(kind="fixed"),
}


def by_name(draws):
    return pytest.mark.parametrize("draw", draws.values(), ids=draws.keys())


def slow_probability(draw: Draw, b: int) -> float:
    if b < draw.r_min:
        return 0.0
    n = draw.r_max - draw.r_min + 1
    if draw.kind == "uniform":
        return 1 / n
    if draw.kind == "list":
        return draw.ranks.count(b) / len(draw.ranks)
    if draw.kind == "geometric":  # given that it is at most r_max
        return draw.p * (1 - draw.p) ** (b - draw.r_min) / (1 - (1 - draw.p) ** n)
    return float(b == draw.r_max)


@by_name(KINDS)
def test_probabilities_equal_the_closed_form(draw):
    want = [slow_probability(draw, b) for b in range(1, draw.r_max + 1)]
    assert_allclose(draw.probabilities(), want, rtol=1e-12)
    assert draw.probabilities().sum() == pytest.approx(1, abs=1e-12)


def test_a_rank_listed_twice_is_drawn_twice_as_often():
    assert_allclose(Draw(r_max=4, kind="list", ranks=(2, 2, 4)).probabilities(), [0, 2 / 3, 0, 1 / 3])


@pytest.mark.parametrize(
    ("draw", "want"),
    [
        (Draw(), [1.000, 0.984, 0.953, 0.891, 0.766, 0.516, 0.016]),
        (Draw(kind="list", ranks=POWERS), [1.000, 0.857, 0.714, 0.571, 0.429, 0.286, 0.143]),
        # papers.md 1.2 prints 0.007 for row 32; it is 0.85^31 (1 - 0.85^33) / (1 - 0.85^64) = 0.00646.
        (Draw(kind="geometric", p=0.15), [1.000, 0.850, 0.614, 0.321, 0.087, 0.006, 0.000]),
    ],
    ids=["uniform", "powers of two", "geometric"],
)
def test_update_probabilities_of_rows_1_2_4_to_64(draw, want):
    """Prefix mode, to the three decimals of the table in papers.md 1.2."""
    assert_allclose(draw.update_probability()[np.array(POWERS) - 1], want, atol=5e-4)


@pytest.mark.parametrize("from_step", [0, 1000])
@pytest.mark.parametrize("frozen", [False, True])
def test_updates_of_a_row_are_those_expected_of_the_draw(frozen, from_step):
    """Anchored shares and steps before the first draw included, against counting over real draws."""
    shares = {"at_r_max": 0.25, "at_r_min": 0.125}
    draw = Draw(6, 2, "geometric", per="sequence", p=0.4, **shares, from_step=from_step, seed=3)
    steps, rows = 3000, 16
    count = np.zeros(6)
    for step in range(steps):
        for b in draw.ranks_of_step(step, 1, rows)[0]:
            count[(b - 1 if frozen else 0) : b] += 1
    assert_allclose(count / (steps * rows), draw.expected_updates(steps, frozen) / steps, atol=0.01)
    assert_allclose(draw.expected_updates(500, frozen)[-1], 500 if from_step else 500 * draw.update_probability()[-1])


def test_before_the_first_draw_every_row_is_at_r_max_and_later_draws_are_as_ever():
    late, early = Draw(per="sequence", at_r_max=0.5, from_step=7), Draw(per="sequence", at_r_max=0.5)
    assert all((late.ranks_of_step(step, 2, 4) == 64).all() for step in range(7))
    assert all((late.ranks_of_step(step, 2, 4) == early.ranks_of_step(step, 2, 4)).all() for step in range(7, 20))


@pytest.mark.parametrize("bad", [{"from_step": -1}, {"kind": "fixed", "from_step": 1}])
def test_a_first_draw_before_all_steps_or_where_nothing_is_drawn_is_refused(bad):
    with pytest.raises(ValueError, match="it must be at least 0, and 0 where nothing is drawn"):
        Draw(**bad)


def pooled_chi_square(draw: Draw, ranks: np.ndarray) -> float:
    """p-value of `ranks`, shape (n,), under p_B, with ranks expected fewer than five times put together."""
    expected = draw.probabilities() * len(ranks)
    seen = np.bincount(ranks, minlength=draw.r_max + 1)[1:]
    assert not seen[expected == 0].any()
    common, rare = expected >= 5, (expected > 0) & (expected < 5)
    seen, expected = (np.append(x[common], x[rare].sum()) if rare.any() else x[common] for x in (seen, expected))
    return chisquare(seen, expected).pvalue


@by_name({name: KINDS[name] for name in ("uniform", "list", "geometric from 5")})
def test_20_000_steps_follow_the_distribution(draw):
    ranks = np.array([draw.ranks_of_step(step, 1, 1)[0, 0] for step in range(20_000)])
    assert pooled_chi_square(draw, ranks) > 1e-3


@pytest.mark.parametrize("per", ["micro_batch", "sequence"])
def test_20_000_draws_inside_steps_follow_the_distribution(per):
    draw = Draw(per=per)
    micro, rows = (100, 3) if per == "micro_batch" else (10, 10)
    steps = [draw.ranks_of_step(step, micro, rows) for step in range(200)]
    ranks = np.concatenate([r[:, 0] if per == "micro_batch" else r.ravel() for r in steps])
    assert len(ranks) == 20_000
    assert pooled_chi_square(draw, ranks) > 1e-3


def test_fixed_is_always_r_max():
    assert (Draw(r_max=7, kind="fixed", per="sequence").ranks_of_step(5, 3, 4) == 7).all()


def test_how_often_a_rank_is_drawn():
    own = Draw(per="process").ranks_of_step(1, 6, 5, processes=2)  # micro-batch i is process i % 2's
    assert (own == np.tile(own[:2, :1], (3, 5))).all() and own[0, 0] != own[1, 0]
    assert (Draw(per="process").ranks_of_step(1, 6, 5) == Draw().ranks_of_step(1, 6, 5)).all()
    step, micro, sequence = (Draw(per=p).ranks_of_step(1, 6, 5) for p in ("step", "micro_batch", "sequence"))
    assert step.shape == micro.shape == sequence.shape == (6, 5)
    assert len(np.unique(step)) == 1
    assert all(len(np.unique(row)) == 1 for row in micro) and len(np.unique(micro[:, 0])) > 1
    assert all(len(np.unique(row)) > 1 for row in sequence)


@pytest.mark.parametrize("per", ["step", "micro_batch", "sequence"])
def test_a_draw_depends_on_seed_and_step_alone(per):
    def ranks(seed, step):
        return Draw(per=per, seed=seed).ranks_of_step(step, 4, 3).tolist()

    forwards = [ranks(0, step) for step in range(50)]
    used = Draw(per=per)
    for step in reversed(range(50)):  # as after a resume, and whatever was drawn before by the same object
        used.ranks_of_step(step, 2, 9)
        assert used.ranks_of_step(step, 4, 3).tolist() == forwards[step]
    assert forwards != [ranks(1, step) for step in range(50)]
    assert forwards[1:] != forwards[:-1]
    assert [ranks(i, 7) for i in range(20)] != [ranks(7, i) for i in range(20)]


def test_the_global_generators_are_neither_read_nor_changed():
    draw = Draw(per="sequence", at_r_max=0.25)

    def states():
        name, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), (name, keys.tolist(), *rest), random.getstate()

    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = states()
        drawn.append(draw.ranks_of_step(3, 4, 8))
        assert states() == before
    assert_array_equal(*drawn)


@pytest.mark.parametrize("per", ["step", "micro_batch", "sequence"])
def test_ranks_do_not_depend_on_the_number_of_processes(per, tmp_path):
    """1 process x accumulation 4 against 2 processes x accumulation 2. The Trainer's processes take micro-batches in
    turn, so the m-th of process p is the (2m + p)-th of one process."""
    model = adapted("llama", 32, tmp_path)

    def ranks_of(process: int, processes: int) -> list:
        args = SimpleNamespace(
            gradient_accumulation_steps=4 // processes,
            world_size=processes,
            process_index=process,
            per_device_train_batch_size=3,
        )
        callback, seen = DrawCallback(Draw(r_max=8, per=per, seed=5)), []
        for step in range(10):
            state = SimpleNamespace(global_step=step)
            callback.on_step_begin(args, state, None, model=model)
            seen.append([gate_of(model).rank])
            for _ in range(args.gradient_accumulation_steps - 1):
                callback.on_substep_end(args, state, None, model=model)
                seen[-1].append(gate_of(model).rank)
        return seen

    alone, first, second = ranks_of(0, 1), ranks_of(0, 2), ranks_of(1, 2)
    assert alone == [[a, b, c, d] for (a, c), (b, d) in zip(first, second, strict=True)]
    assert len({str(step) for step in alone}) > 1


@pytest.mark.parametrize(
    ("top", "bottom", "counts"), [(0.25, 0, (2, 0)), (0.25, 0.25, (2, 2)), (0, 0.5, (0, 4)), (0.5, 0.5, (4, 4))]
)
def test_anchored_shares_are_exact_in_every_step_and_move_about(top, bottom, counts):
    # Drawn ranks are from the list {5}, so that a rank of 8 or 2 is an anchor.
    draw = Draw(r_max=8, r_min=2, kind="list", ranks=(5,), per="sequence", at_r_max=top, at_r_min=bottom)
    steps = np.array([draw.ranks_of_step(step, 4, 2) for step in range(200)])
    for ranks in steps:
        assert ((ranks == 8).sum(), (ranks == 2).sum()) == counts
        assert (ranks == 5).sum() == 8 - sum(counts)
    for rank, count in zip((8, 2), counts, strict=True):
        places = (steps == rank).mean(axis=0)  # of each place in the step, how often the anchor was there
        assert_allclose(places, count / 8, atol=0.15)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"r_min": 0}, "r_min is 0 and r_max 64"),
        ({"r_min": 9, "r_max": 8}, "r_min is 9 and r_max 8"),
        ({"r_max": 0}, "r_min is 1 and r_max 0"),
        ({"kind": "unifrom"}, "draw.kind is 'unifrom'; choose one of uniform, list, geometric, fixed"),
        ({"per": "batch"}, "draw.per is 'batch'; choose one of step, process, micro_batch, sequence"),
        ({"kind": "list"}, r"draw.ranks is \[\]"),
        ({"kind": "list", "ranks": (1, 65)}, r"draw.ranks is \[1, 65\]; kind 'list' needs ranks from 1 to 64"),
        ({"kind": "list", "ranks": (0, 2)}, r"draw.ranks is \[0, 2\]"),
        ({"kind": "list", "ranks": (2, 8), "r_min": 4}, r"draw.ranks is \[2, 8\]; kind 'list' needs ranks from 4"),
        ({"kind": "list", "ranks": (1, 2.5)}, r"draw.ranks is \[1, 2.5\]"),
        ({"seed": -1}, "draw.seed is -1"),
        ({"kind": "geometric", "p": 0}, "draw.p is 0; 0 < p < 1 is needed"),
        ({"kind": "geometric", "p": 1}, "draw.p is 1"),
        ({"per": "sequence", "at_r_max": -0.1}, "draw.at_r_max is -0.1"),
        ({"per": "sequence", "at_r_max": 0.6, "at_r_min": 0.6}, "at_r_max is 0.6 and draw.at_r_min 0.6"),
        ({"at_r_max": 0.25}, "draw.per is 'step'; anchored rows need per = sequence"),
        ({"per": "micro_batch", "at_r_min": 0.25}, "draw.per is 'micro_batch'; anchored rows need"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Draw(**settings)
