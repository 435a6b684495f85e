"""Ranks are sorted without a change of what the model computes, and training goes on as if they had not been."""

import json

import bitsandbytes as bnb
import pytest
import torch
from test_callback import DATA, arguments, weights
from tiny import adapted, tokens
from torch.testing import assert_close
from transformers import Trainer

from qdylora import Draw, DrawCallback, at_rank, cut, gate_of, sort_ranks
from qdylora.adapter import factors
from qdylora.cut import svd_factors
from qdylora.sort import sorting_turn
from tests.commands import inside

R_MAX, STEPS = 8, 6


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def model(cache):
    """An adapter scaled alpha/r_max in float64."""
    model = adapted("llama", 32, cache).double()
    gate_of(model).scale = "constant"
    return model


def trained(model, optimizer, steps):
    for step in range(steps):
        ids = tokens(batch=4, length=9, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def products(model) -> list[torch.Tensor]:
    return [(B @ A).detach().clone() for A, B in factors(model)]


@torch.no_grad()
def logits(model, b):
    with at_rank(model, b):
        return model.eval()(tokens()).logits


def test_at_r_max_nothing_changes_and_lower_ranks_come_near_the_svd(model):
    trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2), STEPS)
    before = {b: logits(model, b) for b in (1, 2, R_MAX)}
    with cut(model, "svd"):
        best = {b: logits(model, b) for b in (1, 2, R_MAX)}
    sort_ranks(model)
    assert_close(logits(model, R_MAX), before[R_MAX], rtol=0, atol=1e-9)
    for b in (1, 2):
        assert (logits(model, b) - best[b]).norm() < 0.5 * (before[b] - best[b]).norm()


@pytest.mark.parametrize("out", [5, 30])
def test_prefixes_are_the_best_approximations_where_the_rows_of_a_are_orthogonal(out):
    A = 3 * torch.linalg.qr(torch.randn(20, R_MAX, dtype=torch.float64, generator=torch.manual_seed(0))).Q.T
    B = torch.randn(out, R_MAX, dtype=torch.float64, generator=torch.manual_seed(1))
    turn = sorting_turn(A, B)
    assert_close(turn @ turn.T, torch.eye(R_MAX, dtype=torch.float64))
    for b in range(1, R_MAX + 1):
        best_A, best_B = svd_factors(A, B, 1, b, 1)
        assert_close((B @ turn.T)[:, :b] @ (turn @ A)[:b], best_B @ best_A, rtol=0, atol=1e-9)


@torch.no_grad()
def test_an_untrained_adapter_stays_one(model):
    for _, B in factors(model):
        B.zero_()
    sort_ranks(model)
    assert all(product.count_nonzero() == 0 for product in products(model))


def test_momentum_is_turned_with_its_ranks(cache, model):
    """The steps of SGD with momentum are the same in any turned basis: sorted in between, they end at the same B A."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    trained(trained(model, sgd, STEPS), sgd, STEPS)
    other = adapted("llama", 32, cache).double()
    gate_of(other).scale = "constant"
    sgd = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    trained(other, sgd, STEPS)
    columns = [B.norm(dim=0) for _, B in factors(other)]
    sort_ranks(other, sgd)
    assert not any(
        torch.allclose(B.norm(dim=0), before) for (_, B), before in zip(factors(other), columns, strict=True)
    )
    trained(other, sgd, STEPS)
    for got, want in zip(products(other), products(model), strict=True):
        assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("names", [("exp_avg", "exp_avg_sq"), ("state1", "state2")])
def test_adams_averages_are_turned_rank_by_rank(names, model):
    """Against loops: average i of the sorted ranks is the sum over j of R[i, j] m[j], and of R[i, j]^2 v[j]."""
    kind = torch.optim.AdamW if names[0] == "exp_avg" else bnb.optim.AdamW32bit
    model.float()
    optimizer = kind(model.parameters(), lr=1e-2)
    trained(model, optimizer, STEPS)
    A, B = next(factors(model))
    turn = sorting_turn(A.detach(), B.detach()).float()
    before = [{name: optimizer.state[p][name].clone() for name in names} for p in (A, B)]
    steps = [int(optimizer.state[p]["step"]) for p in (A, B)]
    sort_ranks(model, optimizer)
    for p, states in zip((A, B), before, strict=True):
        for name, power in zip(names, (1, 2), strict=True):
            rows = states[name] if p is A else states[name].T
            want = torch.stack([sum(turn[i, j] ** power * rows[j] for j in range(R_MAX)) for i in range(R_MAX)])
            got = optimizer.state[p][name]
            assert_close(got if p is A else got.T, want, rtol=1e-4, atol=1e-9)
    assert [int(optimizer.state[p]["step"]) for p in (A, B)] == steps == [STEPS, STEPS]


def test_an_8_bit_optimizer_is_refused(model):
    with pytest.raises(ValueError, match="8-bit optimizer's state cannot be sorted"):
        sort_ranks(model, bnb.optim.AdamW8bit(model.parameters()))


def constant(cache):
    model = adapted("llama", 32, cache)
    gate_of(model).scale = "constant"
    return model


def test_training_is_at_r_max_then_sorts_then_draws_and_resumes_in_between(cache, tmp_path):
    draw = Draw(r_max=R_MAX, per="sequence", at_r_max=0.5, from_step=4, seed=3)
    args = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    whole = constant(cache)
    callback = DrawCallback(draw)
    Trainer(whole, arguments(tmp_path / "whole", **args), train_dataset=DATA, callbacks=[callback]).train()

    plain = constant(cache)
    fixed = DrawCallback(Draw(r_max=R_MAX, kind="fixed"))
    Trainer(plain, arguments(tmp_path / "plain", max_steps=4), train_dataset=DATA, callbacks=[fixed]).train()
    for step in (4, 6):  # before the ranks are sorted, and after
        resumed = constant(cache)
        trainer = Trainer(
            resumed, arguments(tmp_path / "whole", **args), train_dataset=DATA, callbacks=[DrawCallback(draw)]
        )
        if step == 4:
            trainer._load_from_checkpoint(str(tmp_path / "whole/checkpoint-4"))
            assert all(torch.equal(w, weights(plain)[name]) for name, w in weights(resumed).items())
        trainer.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(resumed).items())


def test_an_8_bit_optimizer_is_refused_before_the_first_step(cache, tmp_path):
    draw = DrawCallback(Draw(r_max=R_MAX, from_step=2))
    args = arguments(tmp_path, max_steps=4, optim="adamw_bnb_8bit")
    with pytest.raises(ValueError, match="8-bit optimizer's state cannot be sorted"):
        Trainer(constant(cache), args, train_dataset=DATA, callbacks=[draw]).train()


def test_a_scale_that_differs_from_rank_to_rank_is_refused(cache, tmp_path):
    draw = DrawCallback(Draw(r_max=R_MAX, from_step=2))
    trainer = Trainer(
        adapted("llama", 32, cache), arguments(tmp_path, max_steps=4), train_dataset=DATA, callbacks=[draw]
    )
    with pytest.raises(ValueError, match=r"draw\.from_step is 2, but the adapter's scale is 'alpha_over_b'"):
        trainer.train()


def test_a_cell_is_trained_so_from_end_to_end(tmp_path):
    """Of four steps the last is drawn; what each row learned from is what the draw says."""
    code = ("scale=smoke", "table=rivals_long", "data=gsm8k", "method=qdylora_sorted", "budget.steps=4", "tracker=none")
    done = inside("experiments.run", *code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (cell,) = (tmp_path / "outputs/smoke/rivals_long").iterdir()
    ranks = [json.loads(line)["ranks"] for line in (cell / "log.jsonl").read_text().splitlines()]
    assert ranks[:3] == [[64] * 4] * 3 and ranks[3].count(64) == 2
    record = json.loads((cell / "record.json").read_text())
    assert record["updates"][0] == 16 and record["updates"][-1] == record["expected_updates"][-1] == 14
    assert record["heldout"]["ranks"].keys() == {"1", "2", "4", "8", "16", "32", "64"}
