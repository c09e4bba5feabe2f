"""CKD's memory: a ring in registered buffers with the same rows on every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import run_in_two_processes

from gdetkd_cli.distill.distiller import Distiller, WeightedTerm
from gdetkd_cli.methods.adapters import RunningNormalizer
from gdetkd_cli.methods.processes import gather_rows
from gdetkd_cli.methods.queue import RegionQueue


def add(queue: RegionQueue, *values: int) -> None:
    """Adds one row (v, v) of image 10 v for each value v."""
    rows = torch.tensor(values, dtype=torch.float32)
    queue.add(rows[:, None].repeat(1, 2), 10 * torch.tensor(values, dtype=torch.int64))


def list_values(queue: RegionQueue) -> list[float]:
    """The values of the filled rows, in the order of the buffer."""
    embeddings, image_ids = queue.rows()
    assert embeddings.shape == (len(image_ids), 2)
    assert torch.equal(embeddings[:, 0], embeddings[:, 1])
    assert torch.equal(10 * embeddings[:, 0].long(), image_ids)
    return embeddings[:, 0].tolist()


def test_fills_up_then_overwrites_the_oldest() -> None:
    queue = RegionQueue(size=4, channels=2)
    assert list_values(queue) == []
    add(queue, 1, 2, 3)
    assert list_values(queue) == [1, 2, 3]
    add(queue, 4, 5, 6)  # 4 fills the ring, 5 and 6 take the places of 1 and 2
    assert list_values(queue) == [5, 6, 3, 4]
    add(queue, 7, 8, 9)
    assert list_values(queue) == [9, 6, 7, 8]


def test_more_rows_than_there_is_room_for() -> None:
    queue = RegionQueue(size=3, channels=2)
    add(queue, 1)
    add(queue, 2, 3, 4, 5, 6)
    assert sorted(list_values(queue)) == [4, 5, 6]  # the last ones
    add(queue, 7)
    assert sorted(list_values(queue)) == [5, 6, 7]


def test_every_row_count_keeps_the_latest() -> None:
    for count in range(1, 8):
        queue = RegionQueue(size=5, channels=2)
        latest: list[int] = []
        for start in range(0, 3 * count, count):
            values = list(range(start, start + count))
            add(queue, *values)
            latest = (latest + values)[-5:]
            assert sorted(list_values(queue)) == sorted(latest)


def test_no_rows() -> None:
    queue = RegionQueue(size=3, channels=2)
    add(queue)
    assert list_values(queue) == []
    add(queue, 1, 2)
    add(queue)
    assert list_values(queue) == [1, 2]


def test_size_0_remembers_nothing() -> None:
    queue = RegionQueue(size=0, channels=2)
    add(queue, 1, 2)

    assert list_values(queue) == []
    assert queue.rows()[0].shape == (0, 2)


def test_rows_is_a_copy() -> None:
    """A step's graph reads the rows in its backward, after ``add`` overwrote them."""
    queue = RegionQueue(size=2, channels=2)
    add(queue, 1, 2)
    embeddings, image_ids = queue.rows()
    add(queue, 3, 4)

    assert embeddings[:, 0].tolist() == [1, 2]
    assert image_ids.tolist() == [10, 20]


def test_rows_are_kept_in_float32_without_gradient() -> None:
    queue = RegionQueue(size=2, channels=2)
    queue.add(torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True), torch.tensor([1]))
    embeddings, _ = queue.rows()

    assert embeddings.dtype == torch.float32
    assert not embeddings.requires_grad
    assert not list(queue.parameters())


def test_is_saved_with_the_run() -> None:
    queue, restored = RegionQueue(size=4, channels=2), RegionQueue(size=4, channels=2)
    add(queue, 1, 2, 3)
    add(queue, 4, 5)
    restored.load_state_dict(queue.state_dict())
    assert list_values(restored) == list_values(queue)

    add(queue, 6)
    add(restored, 6)
    assert list_values(restored) == list_values(queue) == [5, 6, 3, 4]


def test_gather_rows_of_one_process() -> None:
    rows = torch.ones(2, 3)

    assert gather_rows(rows) is rows


@pytest.mark.parametrize("counts", [(0, 3), (2, 1), (0, 0)])
def test_gather_rows_of_unequal_processes(counts: tuple[int, int], tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(counts[rank]) + 10 * rank
        return gather_rows(rows), gather_rows(rows[:, None].float().repeat(1, 2))

    expected = [*range(counts[0]), *range(10, 10 + counts[1])]
    for numbers, rows in run_in_two_processes(work, tmp_path):
        assert numbers.dtype == torch.int64
        assert numbers.tolist() == expected
        assert rows.tolist() == [[value, value] for value in expected]


def test_every_process_remembers_the_same(tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Tensor, Tensor]:
        queue = RegionQueue(size=4, channels=2)
        add(queue, *([] if rank == 0 else [1, 2, 3]))
        add(queue, *([4] if rank == 0 else [5]))
        return queue.rows()

    for embeddings, image_ids in run_in_two_processes(work, tmp_path):
        assert embeddings[:, 0].tolist() == [5, 2, 3, 4]
        assert image_ids.tolist() == [50, 20, 30, 40]


def test_the_count_comes_from_the_checkpoint() -> None:
    """The host has its own count of rows; loading a queue must replace it by the file's."""
    full, other = RegionQueue(size=3, channels=2), nn.ModuleDict({"queue": RegionQueue(size=3, channels=2)})
    add(full, 1, 2, 3, 4)
    add(other["queue"], 9)
    other.load_state_dict({f"queue.{name}": value for name, value in full.state_dict().items()})
    add(other["queue"], 5)

    assert list_values(other["queue"]) == [5, 3, 4]


def test_ddp_leaves_the_queue_alone_and_broadcasts_statistics(tmp_path: Path) -> None:
    """The processes start with different values: DDP broadcasts statistics but not the queue."""

    class Detector:
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    class Forwarding(Distiller):
        def forward(self, batch: Any) -> Any:
            return self.student(batch).sum()

    def work(rank: int) -> tuple[Tensor, Tensor]:
        memory = nn.Module()
        memory.queue = RegionQueue(size=4, channels=2)
        memory.normalizer = RunningNormalizer(channels=2, per_channel=True)
        terms = {"ckd": WeightedTerm(memory, 1.0)}
        distiller = Forwarding(student=Detector(), teacher=None, terms=terms)  # type: ignore[arg-type]
        wrapped = DistributedDataParallel(distiller)
        memory.queue.embeddings.fill_(rank)
        memory.normalizer.mean.fill_(rank)
        Detector.module[1].running_mean.fill_(rank)  # type: ignore[union-attr, operator]
        wrapped(torch.zeros(3, 2)).backward()
        before = Detector.module[1].running_mean  # both saw the same rows since
        return memory.queue.embeddings, torch.stack([memory.normalizer.mean, before])  # type: ignore[list-item]

    (queue0, statistics0), (queue1, statistics1) = run_in_two_processes(work, tmp_path)
    assert torch.equal(queue0, torch.zeros(4, 2))
    assert torch.equal(queue1, torch.ones(4, 2))
    assert torch.equal(statistics0, statistics1)
