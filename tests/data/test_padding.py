# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset

from trl_diffusion.data.buckets import BucketSampler
from trl_diffusion.data.padding import (
    PaddedRows,
    PaddedSampler,
    PaddedStream,
    PaddingCollator,
    as_padding,
    count_rows,
    mean_over_rows,
)


def rows(number: int = 7) -> Dataset:
    return Dataset.from_list([{"id": str(index), "value": 10 * index} for index in range(number)])


def collate(examples: list[dict]) -> dict:
    assert all(example.keys() == {"id", "value"} for example in examples)  # no collator sees a mark
    return {
        "id": [example["id"] for example in examples],
        "value": torch.tensor([example["value"] for example in examples]),
    }


def loader(dataset, sampler, batch_size: int, process_index: int, num_processes: int, num_workers: int = 0):
    """What Accelerate makes of padded rows, or of a padded stream, for one process."""
    multiple = batch_size * num_processes
    padded = PaddedStream(dataset, multiple) if sampler is None else PaddedRows(dataset)
    plain = torch.utils.data.DataLoader(
        padded,
        batch_size=batch_size,
        sampler=None if sampler is None else PaddedSampler(sampler, multiple, lambda: 0),
        collate_fn=PaddingCollator(collate),
        num_workers=num_workers,
    )
    return prepare_data_loader(
        plain, num_processes=num_processes, process_index=process_index, dispatch_batches=False, put_on_device=False
    )


def real_rows(batch: dict) -> list[int]:
    return [int(row) for row, skip in zip(batch["id"], batch["is_padding"].tolist(), strict=True) if not skip]


# ---- The order ----


@pytest.mark.parametrize(
    ("number", "multiple", "padding"), [(7, 4, 1), (8, 4, 0), (1, 4, 3), (9, 4, 3), (7, 1, 0), (3, 8, 5)]
)
def test_the_order_ends_with_its_last_row_as_padding(number, multiple, padding):
    """The other sampler's order first, and padding up to the next multiple only, as many places as the length says."""
    order = list(range(number))[::-1]
    places = list(PaddedSampler(order, multiple, lambda: 0))
    assert places == order + [~0] * padding
    assert len(PaddedSampler(order, multiple, lambda: 0)) == len(places)
    assert len(places) % multiple == 0


@pytest.mark.parametrize("data_seed", [None, 3])
def test_rows_are_shuffled_as_in_one_process(data_seed):
    """In every epoch, the order that Accelerate gives one process, whatever was drawn from PyTorch's generator before."""
    torch.manual_seed(5)
    plain = torch.utils.data.DataLoader(range(20), sampler=torch.utils.data.RandomSampler(range(20)))
    alone = prepare_data_loader(
        plain, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=data_seed
    )
    epoch = 0
    sampler = PaddedSampler(torch.utils.data.RandomSampler(range(20)), 8, lambda: epoch, data_seed)
    orders = set()
    for epoch in (0, 1, 2, 1):
        alone.set_epoch(epoch)
        expected = [row.item() for row in alone]
        torch.rand(7)
        places = list(sampler)
        assert places[:20] == expected and places[20:] == [~expected[-1]] * 4
        orders.add(tuple(places))
    assert len(orders) == 3


def test_padding_of_buckets_is_whole_batches_of_one_size():
    """Three batches of two on two processes: the fourth is padding, of the size of the third."""
    buckets = [(1, 1)] * 2 + [(1, 2)] * 4
    places = list(PaddedSampler(BucketSampler(buckets, 2, 0, lambda: 0), 4, lambda: 0))
    assert len(places) == 8 and sorted(places[:6]) == list(range(6))
    assert places[6] == places[7] == ~places[5]


# ---- Rows and streams ----


def test_a_place_below_zero_is_a_row_as_padding():
    """`~row` reads the row `row`, marked; a place above reads it as it is; the length is that of the rows."""
    padded = PaddedRows(rows(3))
    assert len(padded) == 3
    assert padded[2] == {"id": "2", "value": 20}
    assert padded.__getitems__([1, ~0, ~1]) == [
        {"id": "1", "value": 10},
        {"id": "0", "value": 0, "_is_padding": True},
        {"id": "1", "value": 10, "_is_padding": True},
    ]


@pytest.mark.parametrize(("number", "multiple", "padding"), [(7, 4, 1), (8, 4, 0), (1, 4, 3), (7, 1, 0)])
def test_a_stream_ends_with_its_last_row_as_padding(number, multiple, padding):
    """Every row once and in order, then the last one, marked, up to the next multiple."""
    read = list(PaddedStream(rows(number).to_iterable_dataset(), multiple))
    assert read[:number] == rows(number).to_list()
    assert read[number:] == [{**rows(number)[number - 1], "_is_padding": True}] * padding


def test_a_stream_without_rows_has_no_padding():
    """There is no row to repeat."""
    assert list(PaddedStream(rows(4).to_iterable_dataset().filter(lambda row: False), 4)) == []


def test_a_stream_is_shuffled_anew_in_every_epoch():
    """As the stream itself, which is told the epoch."""
    stream = rows(20).to_iterable_dataset().shuffle(seed=0, buffer_size=20)
    padded, orders = PaddedStream(stream, 8), []
    for epoch in (0, 1):
        padded.set_epoch(epoch)
        orders.append([row["id"] for row in padded][:20])
        stream.set_epoch(epoch)
        assert orders[-1] == [row["id"] for row in stream]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


# ---- What processes read ----


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 2, 3, 7, 8, 12])
@pytest.mark.parametrize("kind", ["memory", "stream", "sharded stream"])
def test_processes_read_equally_many_full_batches_and_every_row_once(kind, number, batch_size):
    """Micro-batch by micro-batch, two processes read what one with a batch twice as large does."""
    dataset = rows(number)
    if kind != "memory":
        dataset = dataset.to_iterable_dataset(num_shards=min(number, 3) if kind == "sharded stream" else 1)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(number)).tolist()
    sampler = order if kind == "memory" else None
    first, second = (list(loader(dataset, sampler, batch_size, index, 2)) for index in (0, 1))
    alone = list(loader(dataset, sampler, 2 * batch_size, 0, 1))
    assert all(len(batch["id"]) == len(batch["value"]) == batch_size for batch in first + second)
    both = [real_rows(a) + real_rows(b) for a, b in zip(first, second, strict=True)]
    assert both == [real_rows(batch) for batch in alone]
    assert sum(both, []) == (order if kind == "memory" else list(range(number)))
    assert count_rows(first) + count_rows(second) == count_rows(alone) == number


def test_workers_of_a_data_loader_each_pad_what_they_read():
    """Two workers with a file each, of five and two rows: both processes read equally many batches, every row once."""
    stream = rows().to_iterable_dataset(num_shards=2)
    shards = [[int(row["id"]) for row in stream.shard(2, index)] for index in (0, 1)]
    assert sorted(map(len, shards)) == [3, 4]
    first, second = (list(loader(stream, None, 2, index, 2, num_workers=2)) for index in (0, 1))
    both = [real_rows(a) + real_rows(b) for a, b in zip(first, second, strict=True)]
    assert both == [shards[0][:4], shards[1][:4]]
    assert sorted(sum(both, [])) == list(range(7))


def test_a_run_that_resumes_within_an_epoch_reads_the_rest_of_it():
    """In both processes, in that epoch's order."""
    for index in (0, 1):
        sampler = torch.utils.data.RandomSampler(range(7))
        whole = [batch["id"] for batch in loader(rows(), sampler, 1, index, 2)]
        rest = [batch["id"] for batch in skip_first_batches(loader(rows(), sampler, 1, index, 2), 3)]
        assert len(whole) == 4 and rest == whole[3:]


# ---- What counts ----


def test_a_batch_knows_its_padding():
    """The collator sees rows without marks, and the batch has one flag a row."""
    padded = PaddedRows(rows(3))
    batch = PaddingCollator(collate)(padded.__getitems__([0, 2, ~2]))
    assert batch["id"] == ["0", "2", "2"] and batch["value"].tolist() == [0, 20, 20]
    assert batch["is_padding"].tolist() == [False, False, True]


def test_rows_are_counted_without_padding():
    """A batch that names no padding has none; one that is padding again counts nothing."""
    unmarked = collate([rows(3)[0], rows(3)[1]])
    marked = unmarked | {"is_padding": torch.tensor([False, True])}
    assert count_rows([unmarked, unmarked]) == 4
    assert count_rows([unmarked, marked]) == 3
    assert count_rows([marked, as_padding(unmarked), as_padding(marked)]) == 1
    assert count_rows([]) == 0


def test_shares_add_up_to_the_mean_over_rows():
    """Two processes with two micro-batches each, by hand: (1 + 2 + 3 + 4 + 5) / 5, as gradients are summed and averaged."""
    micro_batches = [  # (losses, padding) of process 0, then 1
        [([1.0, 2.0], [False, False]), ([5.0, 7.0], [False, True])],
        [([3.0, 4.0], [False, False]), ([7.0, 7.0], [True, True])],
    ]
    shares = [
        sum(mean_over_rows(torch.tensor(losses), torch.tensor(padding), torch.tensor(5), 2) for losses, padding in own)
        for own in micro_batches
    ]
    assert torch.stack(shares).mean().item() == pytest.approx(15 / 5)
    assert mean_over_rows(torch.tensor([7.0, 7.0]), torch.tensor([True, True]), torch.tensor(5), 2) == 0


def test_without_a_step_the_share_is_the_mean_of_the_batch():
    """Of its rows that are no padding; of nothing it is zero."""
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert mean_over_rows(losses) == losses.mean()
    assert mean_over_rows(losses, torch.tensor([False, True, False])) == 3.5
    assert mean_over_rows(losses, torch.tensor([True, True, True])) == 0


def test_padding_has_no_gradient():
    """Also where its loss is infinite; a row's is its weight in the mean."""
    losses = torch.tensor([1.0, float("inf"), 3.0], requires_grad=True)
    mean_over_rows(losses, torch.tensor([False, True, False]), 4, 2).backward()
    assert losses.grad.tolist() == [0.5, 0.0, 0.5]
