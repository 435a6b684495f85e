"""The ways to cut a static adapter to a lower rank, against plain matrices; and that nothing stays behind."""

import pytest
import torch
from tiny import adapted, tokens
from torch.testing import assert_close

from qdylora import CUTS, at_rank, cut, gate_of, lora_layers


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=["constant", "alpha_over_sqrt_b"])
def model(request, cache):
    return adapted("llama", 32, cache, scale=request.param)


def deltas(model, rank):
    """What every layer adds to its weight at `rank`."""
    zeros = {name: torch.zeros_like(layer.get_base_layer().weight) for name, layer in lora_layers(model).items()}
    gate = gate_of(model)
    return {name: gate.plus_delta(layer, "default", zeros[name], rank) for name, layer in lora_layers(model).items()}


@torch.no_grad()
def logits(model):
    return model.eval()(tokens()).logits


@pytest.mark.parametrize("rank", range(1, 9))
def test_svd_is_the_best_approximation_at_every_rank(model, rank):
    whole = deltas(model, 8)
    with cut(model, "svd"):
        found = deltas(model, rank)
    for name, full in whole.items():
        U, S, Vh = torch.linalg.svd(full.double())
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert_close(found[name].double(), best, rtol=0, atol=1e-5 * float(S[0]))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_truncation_keeps_the_first_rows_and_rescales_if_asked(model, rank):
    plain = deltas(model, rank)
    with cut(model, "truncate"):
        same = deltas(model, rank)
    gate = gate_of(model)
    factor = (16 / rank) / gate.scale_at(rank)
    with cut(model, "truncate_alpha_over_b"):
        scaled = deltas(model, rank)
    for name in plain:
        assert_close(same[name], plain[name], rtol=0, atol=0)
        assert_close(scaled[name], factor * plain[name])


@pytest.mark.parametrize("how", CUTS)
def test_ranks_per_row_of_a_batch_are_cut_the_same_way(model, how):
    """The gate keeps masks for ranks per row: those of another scale must not be used."""
    batch = tokens()
    with at_rank(model, [2] * len(batch)):
        logits(model)  # masks of the scale trained with
        with cut(model, how):
            by_row = logits(model)
    with cut(model, how), at_rank(model, 2):
        assert_close(by_row, logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", CUTS)
def test_afterwards_the_adapter_is_as_before_even_after_an_error(model, how):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with at_rank(model, 3):
        want = logits(model)
    scale = gate_of(model).scale
    with pytest.raises(RuntimeError, match="stop"), cut(model, how):
        raise RuntimeError("stop")
    assert gate_of(model).scale == scale
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with at_rank(model, 3):
        assert torch.equal(logits(model), want)


def test_an_unknown_way_is_refused(model):
    with (
        pytest.raises(ValueError, match="cut is 'magic'; choose one of truncate, truncate_alpha_over_b, svd"),
        cut(model, "magic"),
    ):
        pass
