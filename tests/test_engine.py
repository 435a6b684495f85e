"""All ranks in one pass against one sequence at a time, in float32; and against stock lm-eval."""

import random

import lm_eval
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft.tuners.lora.layer import LoraLayer
from tiny import CONFIGS, adapted

from eval import engine as engine_module
from eval.benchmarks import Settings, load
from eval.dequantize import dequantized
from eval.engine import AllRanks
from eval.lm import RankedLM
from eval.merge import merged, worth_merging
from eval.plan import BRANCHES, batches, divide, group_by_trunk, join, lay_out, pack
from eval.score import answer
from experiments.data.sources import release_root
from qdylora import at_rank, gate_of, set_rank
from qdylora.base import byte_tokenizer

RANKS = [1, 2, 5, 8]
STOPS = {1, 7, 9, 20, 40, 80, 100}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=[("llama", 32), ("llama", 4), ("falcon", 32), ("falcon", 4)], ids=str)
def model(request, cache):
    return adapted(*request.param, cache).eval()


def engine(model, **kwargs) -> AllRanks:
    return AllRanks(model, RANKS, progress=False, **kwargs)


def slow_loglikelihood(model, context, continuation) -> tuple[float, bool]:
    """One sequence through the ordinary forward pass, token by token."""
    with torch.no_grad():
        logp = model(torch.tensor([list(context) + list(continuation)])).logits[0].log_softmax(-1)
    positions = range(len(context) - 1, len(context) + len(continuation) - 1)
    total = sum(logp[p, t].item() for p, t in zip(positions, continuation, strict=True))
    return total, all(logp[p].argmax().item() == t for p, t in zip(positions, continuation, strict=True))


def slow_generate(model, prompt, most) -> list[int]:
    """Greedy decoding without any cache."""
    ids, new = list(prompt), []
    while len(new) < most and not (new and new[-1] in STOPS):
        with torch.no_grad():
            new.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        ids.append(new[-1])
    return new


token = st.integers(2, 257)
trunks = st.lists(st.lists(token, max_size=90), min_size=1, max_size=3)
requests = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.lists(token, min_size=1, max_size=8),
        st.lists(st.lists(token, min_size=1, max_size=3), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=12, deadline=None)
@given(trunks=trunks, requests=requests, budget=st.sampled_from([64, 500, 8192]))
def test_random_prompts_with_random_shared_prefixes(model, trunks, requests, budget):
    pairs = [
        (trunks[which % len(trunks)] + own, continuation)
        for which, own, continuations in requests
        for continuation in continuations
    ]
    logps, greedy = engine(model, budget=budget).loglikelihood(pairs)
    for k, b in enumerate(RANKS):
        set_rank(model, b)
        for i, pair in enumerate(pairs):
            want, want_greedy = slow_loglikelihood(model, *pair)
            assert logps[i, k] == pytest.approx(want, abs=2e-5)
            assert greedy[i, k] == want_greedy


def test_long_continuations_of_one_context(model):
    """They go into rows of their own, also behind a context of one token."""
    rng = random.Random(0)
    pairs = [
        (context, [rng.randrange(2, 258) for _ in range(n)]) for context in ([5], [6, 7, 8]) for n in (90, 3, 50, 1)
    ]
    logps, _ = engine(model).loglikelihood(pairs)
    set_rank(model, RANKS[-1])
    want = [slow_loglikelihood(model, *pair)[0] for pair in pairs]
    assert logps[:, -1] == pytest.approx(want, abs=5e-4)


@pytest.mark.parametrize(("budget", "memory"), [(64, 0), (64, 2**20), (8192, 2**40)])
def test_generation_token_for_token(model, budget, memory, monkeypatch):
    monkeypatch.setattr(engine_module, "free_memory", lambda device: memory)  # one row at a time, a few, or all
    rng = random.Random(0)
    trunk = [rng.randrange(2, 258) for _ in range(120)]
    prompts = [trunk + [rng.randrange(2, 258) for _ in range(rng.randint(1, 30))] for _ in range(5)]
    prompts += [[rng.randrange(2, 258) for _ in range(n)] for n in (1, 17)]
    answers = engine(model, budget=budget).generate(prompts, 12, lambda new: new[-1] in STOPS)
    for k, b in enumerate(RANKS):
        set_rank(model, b)
        assert [a[k] for a in answers] == [slow_generate(model, p, 12) for p in prompts]


def test_a_shared_prefix_is_computed_once(model):
    trunk, e = list(range(2, 202)), engine(model)
    e.loglikelihood([([*trunk, 5, i], [t]) for i in range(10, 30) for t in (3, 4)])
    assert e.computed_tokens == len(RANKS) * (201 + 20)


def test_memory_that_runs_out_halves_the_budget_and_changes_nothing(model, monkeypatch):
    pairs = [([i % 9 + 2] * 20, [3]) for i in range(40)]
    want, _ = engine(model).loglikelihood(pairs)
    e = engine(model, budget=4096)
    whole = engine_module.forward

    def scarce(base, cache, ids, positions, mask):
        if ids.numel() > 150:
            raise MemoryError
        return whole(base, cache, ids, positions, mask)

    monkeypatch.setattr(engine_module, "forward", scarce)
    got, _ = e.loglikelihood(pairs)
    assert e.budget == 128
    assert got == pytest.approx(want, abs=1e-5)


def test_the_gate_and_the_mode_are_as_before(model):
    model.train()
    with at_rank(model, [3, 4]):
        engine(model).loglikelihood([([5, 6], [7])])
        assert gate_of(model).rank == (3, 4) and model.training
    model.eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_unpacking_the_base_once_changes_no_number(family, cache, monkeypatch):
    model = adapted(family, 4, cache).eval()
    pairs = [([5, 6, i], [7, 8]) for i in range(2, 9)]
    want, _ = engine(model).loglikelihood(pairs)
    with dequantized(model, "always") as done:
        assert done
        merged_too, _ = engine(model).loglikelihood(pairs)
        monkeypatch.setattr(engine_module, "worth_merging", lambda model: False)
        got, _ = engine(model).loglikelihood(pairs)
    again, _ = engine(model).loglikelihood(pairs)
    assert (got == want).all() and (again == want).all()
    assert merged_too == pytest.approx(want, abs=2e-5)
    with dequantized(model, "never") as done:
        assert not done


def test_with_the_adapter_switched_off_the_base_is_scored(model):
    pair = ([5, 6, 9], [7, 8])
    adapted_too, _ = slow_loglikelihood(model, *pair)
    with dequantized(model, "always"), model.disable_adapter():  # in float32, where the adapter would be merged
        want, _ = slow_loglikelihood(model, *pair)
        got, _ = engine(model).loglikelihood([pair])
    assert got == pytest.approx(want, abs=2e-5) and abs(want - adapted_too) > 1e-2


def test_an_adapter_is_merged_only_into_float32_where_there_is_room(cache, monkeypatch):
    assert worth_merging(adapted("llama", 32, cache))
    assert not worth_merging(adapted("llama", 4, cache))
    assert not worth_merging(adapted("llama", 32, cache).bfloat16())
    monkeypatch.setattr("eval.merge.free_memory", lambda device: 2**16)
    assert not worth_merging(adapted("llama", 32, cache))


def test_after_merging_the_model_is_as_before_even_after_an_error(cache):
    model = adapted("llama", 32, cache)
    before = dict(model.named_modules())
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="stop"), merged(model, 5):
        assert not any(isinstance(module, LoraLayer) for module in model.modules())
        raise RuntimeError("stop")
    assert dict(model.named_modules()) == before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


# Against stock lm-eval ---------------------------------------------------------------------------------------


def instance(kind: str, *args) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


CONTEXTS = [
    "",
    "A",
    "Question: one?\nAnswer:",
    "Question: two?\nAnswer: ",
    "shots\n\n" * 20 + "Question: three?\nAnswer:",
]
CONTINUATIONS = [" A", " B", " yes, it is", "x"]


@pytest.mark.parametrize("adds_bos", [False, True], ids=["no bos", "bos"])
def test_loglikelihoods_equal_lm_eval(model, adds_bos):
    """Empty and one-token contexts, trailing spaces, a BOS token, contexts too long for the model."""
    tokenizer = byte_tokenizer()
    requests = [instance("loglikelihood", c, t) for c in CONTEXTS for t in CONTINUATIONS]
    stock = HFLM(pretrained=model.get_base_model(), tokenizer=tokenizer, batch_size=3, add_bos_token=adds_bos)
    ranked = RankedLM(engine(model), tokenizer, add_bos_token=adds_bos)
    for lm in (stock, ranked):
        lm._max_length = 100
    for b in RANKS:
        set_rank(model, b)
        want = stock.loglikelihood(requests, disable_tqdm=True)
        got = ranked.view(b).loglikelihood(requests)
        assert [g for _, g in got] == [g for _, g in want]
        assert [p for p, _ in got] == pytest.approx([p for p, _ in want], abs=1e-4)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_generations_equal_lm_eval(model, do_sample):
    tokenizer = byte_tokenizer()
    kwargs = {"until": ["e", "\n"], "max_gen_toks": 9, "do_sample": do_sample, "temperature": 1.0 * do_sample}
    requests = [instance("generate_until", c, kwargs) for c in CONTEXTS[1:]]
    stock = HFLM(pretrained=model.get_base_model(), tokenizer=tokenizer, batch_size=3)
    ranked = RankedLM(engine(model), tokenizer)
    ranked.batch_size_per_gpu = 3
    torch.manual_seed(0)
    want = []
    for b in RANKS:
        with at_rank(model, b):
            want.append(stock.generate_until(requests, disable_tqdm=True))
    torch.manual_seed(0)
    assert [ranked.view(b).generate_until(requests) for b in RANKS] == want


def test_a_model_whose_prefix_cannot_be_shared_takes_the_plain_road(cache, monkeypatch, caplog):
    monkeypatch.setitem(CONFIGS, "alibi", CONFIGS["falcon"] | {"alibi": True})
    model = adapted("alibi", 32, cache).eval()
    tokenizer = byte_tokenizer()
    ranked = RankedLM(engine(model), tokenizer)
    assert "prefixes cannot be shared" in caplog.text
    stock = HFLM(pretrained=model.get_base_model(), tokenizer=tokenizer, batch_size=8)
    requests = [instance("loglikelihood", c, t) for c in CONTEXTS[1:] for t in CONTINUATIONS]
    generations = [instance("generate_until", c, {"until": ["\n"], "max_gen_toks": 5}) for c in CONTEXTS[1:]]
    rolling = [instance("loglikelihood_rolling", "some text")]
    for b in RANKS:
        with at_rank(model, b):
            assert ranked.view(b).loglikelihood(requests) == stock.loglikelihood(requests, disable_tqdm=True)
            assert ranked.view(b).generate_until(generations) == stock.generate_until(generations, disable_tqdm=True)
            assert ranked.view(b).loglikelihood_rolling(rolling) == stock.loglikelihood_rolling(rolling, True)


# Plans -------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12).map(tuple), min_size=1, max_size=30, unique=True))
def test_every_context_is_in_one_group_and_keeps_a_token_of_its_own(contexts):
    groups = group_by_trunk(contexts)
    assert sorted(i for g in groups for i in g.members) == list(range(len(contexts)))
    for g in groups:
        for i in g.members:
            assert contexts[i][: len(g.trunk)] == g.trunk and len(contexts[i]) > len(g.trunk)


def test_subjects_get_trunks_of_their_own_where_that_saves_tokens():
    start = tuple(range(20))
    contexts = [(*start, *[100 + s] * 300, 200, q) for s in range(3) for q in range(30)]
    groups = group_by_trunk(contexts)
    assert sorted(len(g.trunk) for g in groups) == [321, 321, 321]
    assert [len(g.members) for g in groups] == [30, 30, 30]


def test_a_row_shares_its_context_between_continuations():
    row = lay_out((1, 2, 3, 4), 2, [(9,), (8, 7), (8, 6), (5, 4, 3)])
    assert row.tokens == (3, 4, 8, 5, 4)
    assert row.positions == (2, 3, 4, 4, 5)
    assert row.reads == ((1,), (1, 2), (1, 2), (1, 3, 4))


def test_rows_side_by_side_do_not_see_one_another():
    rows = [lay_out((1, 2, 3), 1, [(8, 7)]), lay_out((1, 4), 1, [(9,)])]
    row = join(rows)
    assert row.tokens == (2, 3, 8, 4) and row.positions == (1, 2, 3, 1)
    assert row.blocks == ((0, 2, 0, 0), (2, 3, 0, 2), (3, 4, 3, 3))
    assert row.reads == ((1, 2), (3,))


@given(st.lists(st.integers(1, 300), max_size=60))
def test_packed_rows_are_no_longer_than_the_longest(lengths):
    packed = pack(lengths)
    assert sorted(i for together in packed for i in together) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in together) for together in packed]
    assert all(size <= max(lengths) for size in sizes)
    # If not, the shortest of the last would have gone beside one of the others.
    assert all(size + lengths[packed[-1][-1]] > max(lengths) for size in sizes[:-1])


def test_rows_take_continuations_up_to_their_limit():
    one, long = (1,), (1,) * BRANCHES
    assert divide(5, [one] * 100) == [list(range(100))]  # a single token needs no branch
    assert divide(5, [long, long, one, long]) == [[0], [1, 2], [3]]
    assert divide(2 * BRANCHES, [long, long, one, long]) == [[0, 1, 2], [3]]
    assert divide(1, [(1,) * 999]) == [[0]]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 7), st.integers(1, 400))
def test_batches_hold_everything_once_within_the_budget(lengths, each, budget):
    made = batches(lengths, each, budget)
    assert sorted(i for b in made for i in b) == list(range(len(lengths)))
    for b in made:
        assert len(b) == 1 or len(b) * max(lengths[i] for i in b) * each <= budget


def test_answers_are_remembered_by_all_they_depend_on(model):
    ranked = RankedLM(engine(model), byte_tokenizer())
    short = instance("generate_until", "A", {"until": [], "max_gen_toks": 1})
    long = instance("generate_until", "A", {"until": [], "max_gen_toks": 6})
    (one,), (six,) = ranked.view(1).generate_until([short]), ranked.view(1).generate_until([long])
    assert six.startswith(one) and len(six) > len(one)


@pytest.mark.parametrize("name", ["gsm8k", "triviaqa"])
def test_what_is_answered_in_one_go_is_what_every_rank_is_asked(model, generated_root, name):
    """lm-eval draws few-shot examples anew whenever it builds requests."""
    root = release_root("generated", generated_root, 0)
    task = load(name, "test", Settings(3, root, limit=2, fewshot="random"))
    ranked = RankedLM(engine(model), byte_tokenizer())
    answer(ranked, [task])
    known = dict(ranked._answers)
    for b in RANKS:
        lm_eval.evaluate(ranked.view(b), task.ready(), bootstrap_iters=1)
    assert ranked._answers == known and len(known) == 2


def test_the_first_examples_are_the_same_for_every_question(generated_root):
    root = release_root("generated", generated_root, 0)
    prompts = {}
    for how in ("first", "random"):
        (part,) = load("gsm8k", "test", Settings(2, root, limit=5, fewshot=how)).ready()["tasks"].values()
        part.build_all_requests()
        prompts[how] = {instance.args[0].rsplit("Question:", 1)[0] for instance in part.instances}
    assert len(prompts["first"]) == 1 and len(prompts["random"]) == 5
