"""The order in which examples are seen."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.examples import order


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=8, max_size=200),
    batches=st.integers(1, 60),
    batch=st.integers(1, 8),
    seed=st.integers(0, 3),
    group=st.booleans(),
)
def test_every_epoch_sees_every_example_at_most_once(lengths, batches, batch, seed, group):
    seen = order(lengths, batches, batch, seed, group)
    assert seen.shape == (batches * batch,)
    whole = len(lengths) // batch * batch
    for start in range(0, len(seen), whole):
        epoch = seen[start : start + whole]
        assert len(set(epoch.tolist())) == len(epoch)
    for rows in np.asarray(lengths)[seen].reshape(-1, batch):
        assert (np.diff(rows) <= 0).all()  # longest first


def test_the_order_depends_on_the_seed_alone_and_a_longer_run_begins_alike():
    lengths = list(range(1, 101))
    short, long = order(lengths, 10, 4, 0, True), order(lengths, 40, 4, 0, True)
    assert (long[:40] == short).all()
    assert (order(lengths, 10, 4, 1, True) != short).any()
    assert set(long[:100]) == set(range(100)) and (long[100:] != long[:60]).any()  # a new permutation every epoch


def test_grouping_by_length_saves_padding():
    lengths = np.random.default_rng(0).integers(1, 500, 400)

    def padded(group):
        rows = lengths[order(lengths.tolist(), 50, 8, 0, group)].reshape(-1, 8)
        return (rows.max(1) * 8).sum() / rows.sum()

    assert padded(True) < 1.05 < padded(False)
