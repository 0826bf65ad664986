import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from moka_pl.data.batching.samplers import EvalSampler, TrainSampler, filler

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)
SETTINGS = settings(max_examples=100, deadline=None)


def make(kind, lengths, batch_size, world, rank, epoch=0):
    if kind == "eval":
        return EvalSampler(lengths, batch_size, world, rank)
    sampler = TrainSampler(lengths, batch_size, world, rank, seed=7, bucket=kind == "bucket")
    sampler.set_epoch(epoch)
    return sampler


def interleave(shares):
    """The global batch of which the ranks hold these shares."""
    return [index for column in zip(*shares, strict=True) for index in column if index >= 0]


@SETTINGS
@given(
    LENGTHS,
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["plain", "bucket", "eval"]),
    st.integers(0, 3),
)
def test_every_example_once_and_equal_shares(lengths, batch_size, world, kind, epoch):
    ranks = [list(make(kind, lengths, batch_size, world, rank, epoch)) for rank in range(world)]
    sampler = make(kind, lengths, batch_size, world, 0)
    assert isinstance(sampler, DistributedSampler)
    assert (
        {len(batches) for batches in ranks}
        == {len(sampler)}
        == {math.ceil(len(lengths) / (batch_size * world))}
    )
    for shares in zip(*ranks, strict=True):
        assert len({len(share) for share in shares}) == 1
        assert 1 <= len(shares[0]) <= batch_size
    seen = [index for batches in ranks for batch in batches for index in batch if index >= 0]
    assert sorted(seen) == list(range(len(lengths)))
    fillers = [index for batches in ranks for batch in batches for index in batch if index < 0]
    assert len(fillers) < world
    assert all(0 <= filler(index) < len(lengths) for index in fillers)


@SETTINGS
@given(LENGTHS, st.sampled_from(["plain", "bucket", "eval"]), st.integers(0, 3))
def test_same_global_batches_for_every_world(lengths, kind, epoch):
    alone = list(make(kind, lengths, 4, 1, 0, epoch))
    for world in (2, 4):
        ranks = [make(kind, lengths, 4 // world, world, rank, epoch) for rank in range(world)]
        assert [interleave(shares) for shares in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("bucket", [True, False])
def test_epochs_and_seeds_differ_and_repeat(bucket):
    lengths = list(range(1, 101))

    def order(seed, epoch):
        sampler = TrainSampler(lengths, 4, seed=seed, bucket=bucket)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(first != second for i, first in enumerate(orders) for second in orders[:i])
    assert order(1, 1) == orders[-1]


def test_buckets_hold_similar_lengths():
    lengths = [(37 * i) % 199 for i in range(400)]
    spread = {}
    for bucket in (True, False):
        batches = list(TrainSampler(lengths, 4, bucket=bucket))
        spread[bucket] = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches)
    assert spread[True] < spread[False] / 10


def test_evaluation_starts_with_the_largest():
    lengths = [3, 9, 1, 7, 7, 2, 8]
    batches = list(EvalSampler(lengths, 3))
    assert [[lengths[i] for i in batch] for batch in batches] == [[9, 8, 7], [7, 3, 2], [1]]


def test_evaluation_puts_the_batch_with_most_padded_tokens_first():
    lengths, padded_tokens = [9, 8, 7, 6, 1], [18, 16, 70, 60, 1]
    assert list(EvalSampler(lengths, 2, padded_tokens=padded_tokens)) == [[2, 3], [0, 1], [4]]


def test_skip_is_used_once():
    sampler = TrainSampler([5] * 10, 2)
    everything = list(sampler)
    sampler.skip = 3
    assert list(sampler) == everything[3:]
    assert list(sampler) == everything


def test_wrong_batch_size():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        TrainSampler([1], 0)
