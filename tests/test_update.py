"""What an optimizer does to the ranks, against slow optimizers written row by row."""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from tiny import adapted, tokens
from torch.testing import assert_close

from qdylora import gate_of, grade_updates, mask_updates, set_rank
from qdylora.adapter import factors
from qdylora.update import rates
from tests.commands import inside

R_MAX = 8
RANKS = [3, 8, 1, 5, 2, 8, 4]  # the first step, which creates the state, is at b < r_max
LR, DECAY, MOMENTUM = 1e-3, 0.1, 0.9


class SlowAdamW:
    """Loshchilov and Hutter's AdamW, one row at a time. `state` as torch and as bitsandbytes call it."""

    keys = (("exp_avg", "state1"), ("exp_avg_sq", "state2"))

    def __init__(self):
        self.t = 0  # one step count per tensor: it goes on for rows that stay untouched

    def update(self, p, grad, m, v):
        p = p * (1 - LR * DECAY)
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad * grad
        m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
        return p - LR * m_hat / (v_hat.sqrt() + 1e-8), m, v


class SlowSGD:
    """Heavy-ball momentum with weight decay in the gradient, one row at a time."""

    keys = (("momentum_buffer",),)

    def __init__(self):
        self.t = 0

    def update(self, p, grad, buffer):
        buffer = MOMENTUM * buffer + grad + DECAY * p
        return p - LR * buffer, buffer


class SlowOptimizer:
    """One tensor's rows: rows[i] is (p, state...) of row i, in float64. With `masked`, rows above b are not visited;
    with `graded`, row i of B goes in proportion to 1 / (i + 1) of its way."""

    def __init__(self, rule, p: torch.Tensor, axis: int, masked: bool = False, graded: bool = False):
        self.rule, self.axis, self.masked = rule, axis, masked
        harmonic = sum(1 / (i + 1) for i in range(p.shape[axis]))
        self.rates = [p.shape[axis] / harmonic / (i + 1) if graded and axis == 1 else 1 for i in range(p.shape[axis])]
        zero = torch.zeros_like(p.select(axis, 0), dtype=torch.float64)
        self.rows = [
            (p.detach().select(axis, i).double().clone(), *(zero.clone() for _ in rule.keys))
            for i in range(p.shape[axis])
        ]

    def step(self, grad: torch.Tensor, b: int) -> None:
        self.rule.t += 1
        for i in range(len(self.rows)):
            if self.masked and i >= b:
                continue
            p, *state = self.rows[i]
            moved, *state = self.rule.update(p, grad.select(self.axis, i).double(), *state)
            self.rows[i] = p + self.rates[i] * (moved - p), *state

    def tensor(self, k: int) -> torch.Tensor:
        """The weight (k = 0) or the k-th state, in the parameter's shape."""
        return torch.stack([row[k] for row in self.rows], dim=self.axis).float()


ADAMW = {"lr": LR, "weight_decay": DECAY}
OPTIMIZERS = {
    "torch AdamW": (SlowAdamW, lambda p: torch.optim.AdamW(p, **ADAMW)),
    "torch AdamW, one tensor at a time": (SlowAdamW, lambda p: torch.optim.AdamW(p, **ADAMW, foreach=False)),
    "torch AdamW, fused": (SlowAdamW, lambda p: torch.optim.AdamW(p, **ADAMW, fused=True)),
    "torch SGD": (SlowSGD, lambda p: torch.optim.SGD(p, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)),
    "bitsandbytes AdamW32bit": (SlowAdamW, lambda p: bnb.optim.AdamW32bit(p, **ADAMW)),
    "bitsandbytes PagedAdamW32bit": (SlowAdamW, lambda p: bnb.optim.PagedAdamW32bit(p, **ADAMW)),
}
every_optimizer = pytest.mark.parametrize(("slow_rule", "make"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def rank_axis(name: str) -> int:
    return 0 if "lora_A" in name else 1


def backward(model, b: int, seed: int) -> None:
    set_rank(model, b)
    model.zero_grad()
    ids = tokens(seed=seed)
    model(input_ids=ids, labels=ids).loss.backward()


def assert_near(got: torch.Tensor, want: torch.Tensor, where: str) -> None:
    """To float32 rounding of the tensor's largest entry (the squares in Adam's state are tiny)."""
    atol = 1e-6 * float(want.abs().max())
    assert_close(got, want, rtol=1e-6, atol=atol, msg=lambda message: f"{where}: {message}")


def assert_equals_slow(model, optimizer, slow_rule, **kind: bool) -> None:
    params = trainable(model)
    slow = {name: SlowOptimizer(slow_rule(), p, rank_axis(name), **kind) for name, p in params.items()}
    for step, b in enumerate(RANKS):
        backward(model, b, seed=step)
        grads = {name: p.grad.clone() for name, p in params.items()}
        optimizer.step()
        for name, p in params.items():
            slow[name].step(grads[name], b)
            assert_near(p.data, slow[name].tensor(0), f"{name} after step {step}")
            state = optimizer.state[p]
            for k, names in enumerate(slow_rule.keys, start=1):
                got = next(state[key] for key in names if key in state)
                assert_near(got, slow[name].tensor(k), f"{'/'.join(names)} of {name} after step {step}")
            if "step" in state:
                assert int(state["step"]) == step + 1


@every_optimizer
def test_masked_equals_the_slow_optimizer_that_visits_rows_up_to_b_only(slow_rule, make, tmp_path):
    model = adapted("llama", 32, tmp_path)
    optimizer = make(trainable(model).values())
    mask_updates(optimizer, model, lambda: gate_of(model).rank)
    assert_equals_slow(model, optimizer, slow_rule, masked=True)


@every_optimizer
def test_drift_equals_the_slow_optimizer_that_visits_every_row(slow_rule, make, tmp_path):
    model = adapted("llama", 32, tmp_path)
    assert_equals_slow(model, make(trainable(model).values()), slow_rule)


@every_optimizer
def test_graded_equals_the_slow_optimizer_with_a_rate_for_every_rank(slow_rule, make, tmp_path):
    model = adapted("llama", 32, tmp_path)
    optimizer = make(trainable(model).values())
    grade_updates(optimizer, model)
    assert_equals_slow(model, optimizer, slow_rule, graded=True)


def test_graded_steps_of_an_8_bit_optimizer_go_in_proportion_to_its_own(tmp_path):
    def stepped(graded: bool) -> torch.Tensor:
        model = adapted("llama", 32, tmp_path, r_max=64)  # B is (64, 64), the smallest that is kept in 8 bits
        optimizer = bnb.optim.AdamW8bit(trainable(model).values(), lr=LR)
        if graded:
            grade_updates(optimizer, model)
        start = next(factors(model))[1].detach().clone()
        backward(model, 64, seed=0)
        optimizer.step()
        return next(factors(model))[1].detach() - start

    assert_close(stepped(graded=True), stepped(graded=False) * rates(64).float(), rtol=1e-4, atol=1e-7)


def test_graded_adam_trains_as_if_the_entries_of_the_gate_were_scaled(tmp_path):
    """W = B diag(rates) A, all of B learning at one rate, is the same W after every step."""
    model = adapted("llama", 32, tmp_path).double()
    A, B = next(factors(model))
    x, y = (torch.randn(20, n, dtype=torch.float64, generator=torch.manual_seed(0)) for n in (A.shape[1], B.shape[0]))
    diagonal = rates(R_MAX)
    scaled_A, scaled_B = A.detach().clone().requires_grad_(), (B.detach() / diagonal).requires_grad_()
    adam = {"lr": LR, "eps": 0, "weight_decay": 0}
    graded, scaled = torch.optim.AdamW([A, B], **adam), torch.optim.AdamW([scaled_A, scaled_B], **adam)
    grade_updates(graded, model)
    for _ in range(5):
        (x @ A.T @ B.T - y).square().mean().backward()
        (x @ scaled_A.T @ (scaled_B * diagonal).T - y).square().mean().backward()
        for optimizer in (graded, scaled):
            optimizer.step()
            optimizer.zero_grad()
        assert_close(B @ A, (scaled_B * diagonal) @ scaled_A, rtol=1e-9, atol=1e-12)
    assert (B.detach() / (scaled_B * diagonal) - 1).abs().max() < 1e-9


def changes_above_b(model, optimizer) -> list[bool]:
    """For each step of RANKS, whether any weight above b changed in it, bit for bit."""
    changed = []
    for step, b in enumerate(RANKS):
        backward(model, b, seed=step)
        before = {name: p.detach().clone() for name, p in trainable(model).items()}
        optimizer.step()
        moved = {name: (p != before[name]).movedim(rank_axis(name), 0) for name, p in trainable(model).items()}
        assert any(rows[:b].any() for rows in moved.values())
        changed.append(any(bool(rows[b:].any()) for rows in moved.values()))
    return changed


@every_optimizer
def test_masked_leaves_every_bit_above_b(slow_rule, make, tmp_path):
    model = adapted("llama", 32, tmp_path)
    optimizer = make(trainable(model).values())
    mask_updates(optimizer, model, lambda: gate_of(model).rank)
    assert not any(changes_above_b(model, optimizer))


def test_drift_moves_rows_above_b_by_momentum_alone(tmp_path):
    """The default, without weight decay: once a row has had a gradient it goes on moving when it has none."""
    model = adapted("llama", 32, tmp_path)
    changed = changes_above_b(model, torch.optim.AdamW(trainable(model).values(), lr=LR, weight_decay=0))
    assert changed == [b < R_MAX and R_MAX in RANKS[:step] for step, b in enumerate(RANKS)]


def test_with_a_rank_per_row_the_largest_of_them_counts(tmp_path):
    model = adapted("llama", 32, tmp_path)
    optimizer = torch.optim.AdamW(trainable(model).values(), **ADAMW)
    mask_updates(optimizer, model, lambda: max(gate_of(model).rank))
    backward(model, [2, 5, 1], seed=0)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer.step()
    for name, p in trainable(model).items():
        rows = (p != before[name]).movedim(rank_axis(name), 0)
        assert rows[:5].flatten(1).any(1).all() and not rows[5:].any(), name


def test_parameters_other_than_the_adapter_step_as_usual(tmp_path):
    model = adapted("llama", 32, tmp_path)
    norm = model.get_base_model().model.norm.weight.requires_grad_()
    optimizer = torch.optim.AdamW(trainable(model).values(), **ADAMW)
    mask_updates(optimizer, model, lambda: gate_of(model).rank)
    slow = SlowOptimizer(SlowAdamW(), norm[None], axis=0)
    for step, b in enumerate(RANKS):
        backward(model, b, seed=step)
        slow.step(norm.grad[None], b)
        optimizer.step()
    assert_near(norm.data, slow.tensor(0)[0], "norm")


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_8_bit_optimizers_are_refused(name, tmp_path):
    # r_max 64: A is (64, 64), the smallest tensor that bitsandbytes keeps in 8 bits.
    model = adapted("llama", 32, tmp_path, r_max=64)
    optimizer = getattr(bnb.optim, name)(trainable(model).values(), lr=LR)
    with pytest.raises(
        ValueError, match="'masked', but an 8-bit optimizer's state cannot be cut by rank; choose a 32-bit"
    ):
        mask_updates(optimizer, model, lambda: gate_of(model).rank)


def test_a_cell_is_trained_with_graded_rates_and_cut_from_end_to_end(tmp_path):
    code = ("scale=smoke", "table=rivals_long", "data=gsm8k", "method=qlora_graded", "ranks.cuts=[svd]", "tracker=none")
    done = inside("experiments.run", *code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (cell,) = (tmp_path / "outputs/smoke/rivals_long").iterdir()
    columns = [
        B.norm(dim=0) for name, B in load_file(cell / "adapter/adapter_model.safetensors").items() if "_B." in name
    ]
    moved = torch.stack(columns).mean(dim=0)  # from zero, by rank
    assert 32 < moved[0] / moved[-1] < 128 and moved[:8].mean() > 4 * moved[-8:].mean()
    record = json.loads((cell / "record.json").read_text())
    losses = record["cuts"]["svd"]["heldout"]["ranks"]
    assert losses["64"]["value"] == pytest.approx(record["heldout"]["ranks"]["64"]["value"], rel=1e-3)
