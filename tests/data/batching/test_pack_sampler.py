import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moka_pl.data.batching.report import epoch_report
from moka_pl.data.batching.samplers import PackSampler, TokenSampler, TrainSampler, filler

CAPACITY = 50
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)
SETTINGS = settings(max_examples=60, deadline=None)
KINDS = st.sampled_from(["packs", "tokens"])


def make(kind, lengths, size, world=1, rank=0, epoch=0, seed=7):
    if kind == "packs":
        sampler = PackSampler(lengths, size, world, rank, seed, capacity=CAPACITY)
    else:
        sampler = TokenSampler(lengths, size * CAPACITY, world, rank, seed, multiple=5)
    sampler.set_epoch(epoch)
    return sampler


def flat(batch):
    return [index for entry in batch for index in (entry if isinstance(entry, list) else [entry])]


@SETTINGS
@given(LENGTHS, st.integers(1, 4), st.integers(1, 4), KINDS, st.integers(0, 3))
def test_every_example_once_and_equal_shares(lengths, size, world, kind, epoch):
    ranks = [list(make(kind, lengths, size, world, rank, epoch)) for rank in range(world)]
    # The same number of batches in every epoch: schedules count them before training.
    assert {len(batches) for batches in ranks} == {len(make(kind, lengths, size, world))}
    for shares in zip(*ranks, strict=True):
        assert len({len(share) for share in shares}) == 1
    seen = [index for batches in ranks for batch in batches for index in flat(batch)]
    assert sorted(index for index in seen if index >= 0) == list(range(len(lengths)))
    fillers = [index for index in seen if index < 0]
    assert len(fillers) < world
    for batches in ranks:
        for batch in batches:
            if kind == "packs":
                assert len(batch) <= size
                assert all(
                    sum(lengths[i if i >= 0 else filler(i)] for i in pack) <= CAPACITY for pack in batch
                )
            else:
                longest = max(lengths[i if i >= 0 else filler(i)] for i in batch)
                assert -(-longest // 5) * 5 * len(batch) <= size * CAPACITY


@SETTINGS
@given(LENGTHS, st.integers(0, 3))
def test_same_packs_for_every_world(lengths, epoch):
    alone = list(make("packs", lengths, 4, epoch=epoch))
    for world in (2, 4):
        ranks = [list(make("packs", lengths, 4 // world, world, rank, epoch)) for rank in range(world)]
        joined = [
            [pack for column in zip(*shares, strict=True) for pack in column if pack[0] >= 0]
            for shares in zip(*ranks, strict=True)
        ]
        assert joined == alone


@SETTINGS
@given(KINDS, st.integers(1, 3))
def test_epochs_and_seeds_differ_and_repeat(kind, size):
    lengths = [1 + 7 * i % 25 for i in range(100)]

    def order(seed, epoch):
        return list(make(kind, lengths, size, seed=seed, epoch=epoch))

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(first != second for i, first in enumerate(orders) for second in orders[:i])
    assert order(1, 1) == orders[-1]
    # Neighbours change, too.
    if kind == "packs":
        assert {frozenset(p) for b in orders[0] for p in b} != {frozenset(p) for b in orders[1] for p in b}


def test_skip_is_used_once():
    for kind in ("packs", "tokens"):
        sampler = make(kind, [20] * 30, 2)
        everything = list(sampler)
        sampler.skip = 2
        assert list(sampler) == everything[2:]
        assert list(sampler) == everything


def test_an_example_longer_than_a_batch():
    with pytest.raises(ValueError, match="at least the longest example, 64, got 32"):
        TokenSampler([8, 64], 32)


def test_reports_what_an_epoch_holds():
    lengths = [10, 6, 30, 2, 12, 4]
    padded = epoch_report(TrainSampler(lengths, 2, bucket=False))
    assert (padded.batches, padded.rows, padded.examples, padded.tokens) == (3, 6, 6, 64)
    batches = list(TrainSampler(lengths, 2, bucket=False))
    widths = [-(-max(lengths[i] for i in batch) // 8) * 8 for batch in batches]
    assert padded.padded_tokens == 2 * sum(widths)
    packed = epoch_report(PackSampler(lengths, 2, capacity=32))
    assert (packed.batches, packed.rows, packed.padded_tokens, packed.widest) == (1, 2, 64, 32)
    assert packed.padding_share == 0
    assert "6 examples packed into 2 rows in 1 batches" in str(packed)
    # Ranks pad their own shares.
    two = epoch_report(TrainSampler([8, 16], 1, num_replicas=2))
    assert (two.batches, two.padded_tokens) == (1, 24)
