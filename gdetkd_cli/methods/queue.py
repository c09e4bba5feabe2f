"""CKD's memory: teacher embeddings of earlier regions, from every process.

Shapes: R regions of one process's batch, Q remembered rows, D embedding channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gdetkd_cli.memory import check_memory
from gdetkd_cli.methods.processes import gather_counts, gather_rows


class RegionQueue(nn.Module):
    """The last ``size`` teacher embeddings and the ids of their images, in registered buffers.

    It stores the teacher's own embeddings, which are projected at use and so never go stale. Every process adds the
    same rows, so the buffers are equal without a broadcast.

    Args:
        size: rows kept, 0 for none.
        channels: D of the teacher's embedding.
    """

    embeddings: Tensor
    image_ids: Tensor
    written: Tensor

    def __init__(self, *, size: int, channels: int) -> None:
        super().__init__()
        check_memory(f"distill.ckd.queue: {size} embeddings of {channels} channels", size * channels * 4)
        self.size = size
        self.register_buffer("embeddings", torch.zeros(size, channels))
        self.register_buffer("image_ids", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # rows ever written
        # The same number on the host, so that reading it does not wait for the device; None: read the buffer.
        self._count: int | None = 0
        self.register_load_state_dict_post_hook(_forget_count)  # type: ignore[no-untyped-call]  # torch's

    def rows(self) -> tuple[Tensor, Tensor]:
        """A copy of the filled rows: embeddings (Q, D) and image ids (Q,).

        It is a copy because a step's graph needs the rows until its backward, and ``add`` overwrites them before.
        """
        filled = min(self._count_written(), self.size)
        return self.embeddings[:filled].clone(), self.image_ids[:filled].clone()

    @torch.no_grad()
    def add(self, embeddings: Tensor, image_ids: Tensor) -> None:
        """Adds (R, D) embeddings of regions with their (R,) image ids, from all processes.

        Every process must call this at every step, even with 0 rows: the processes exchange their numbers of rows, then
        the rows.
        """
        if not self.size:
            return
        counts = gather_counts(len(embeddings), embeddings.device)
        embeddings = gather_rows(embeddings.detach().float(), counts)[-self.size :]
        image_ids = gather_rows(image_ids, counts)[-self.size :]
        written = self._count_written()
        position = (written % self.size + torch.arange(len(embeddings), device=embeddings.device)) % self.size
        self.embeddings[position] = embeddings
        self.image_ids[position] = image_ids
        self.written += len(embeddings)
        self._count = written + len(embeddings)

    def _count_written(self) -> int:
        if self._count is None:
            self._count = int(self.written)
        return self._count


def _forget_count(queue: nn.Module, _: Any) -> None:
    """Forgets the host's count after a checkpoint replaced the buffer."""
    assert isinstance(queue, RegionQueue)
    queue._count = None
