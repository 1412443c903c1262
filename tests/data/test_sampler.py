from hypothesis import given
from hypothesis import strategies as st

from clip_lightning.data.sampler import EvalSampler, TrainSampler


@given(
    size=st.integers(1, 200),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_batches_are_the_same_for_any_ranks(size: int, batch_size: int, world_size: int, epoch: int) -> None:
    global_size = batch_size * world_size
    if size < global_size:
        return
    alone = TrainSampler(size, global_size, seed=5)
    ranks = [TrainSampler(size, batch_size, seed=5, rank=r, world_size=world_size) for r in range(world_size)]
    for sampler in (alone, *ranks):
        sampler.set_epoch(epoch)
    expected = list(alone)
    assert len(expected) == len(alone) == size // global_size * global_size
    assert {pair[0] for pair in expected} == {epoch}
    assert len({pair[1] for pair in expected}) == len(expected)
    shards = [list(sampler) for sampler in ranks]
    assert {len(shard) for shard in shards} == {len(sampler) for sampler in ranks}
    joined = [
        pair
        for batch in range(size // global_size)
        for shard in shards
        for pair in shard[batch * batch_size : (batch + 1) * batch_size]
    ]
    assert joined == expected


@given(start=st.integers(0, 6))
def test_the_order_depends_on_epoch_and_seed_and_can_be_resumed(start: int) -> None:
    sampler = TrainSampler(33, 3, seed=0, rank=1, world_size=2)
    first = list(sampler)
    sampler.start_batch = start
    assert len(sampler) == 15
    assert list(sampler) == first[start * 3 :] and sampler.start_batch == 0
    assert list(sampler) == first
    sampler.repeats = True
    sampler.set_epoch(1)
    assert list(sampler) == first
    sampler.repeats = False
    assert list(sampler) != first != list(TrainSampler(33, 3, seed=1, rank=1, world_size=2))


@given(size=st.integers(0, 30), world_size=st.integers(1, 7))
def test_evaluation_is_distributed_evenly(size: int, world_size: int) -> None:
    shards = [list(EvalSampler(size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(shard) for shard in shards} == {len(EvalSampler(size, world_size=world_size))}
    assert {index for shard in shards for index in shard} == set(range(size))
    assert sum(map(len, shards)) - size < world_size
    for rank, shard in enumerate(shards):
        own = list(range(rank, size, world_size))
        assert shard[: len(own)] == own
