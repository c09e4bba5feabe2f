"""The memory of CKD: teacher embeddings of earlier regions, from every process."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import pad


class RegionQueue(nn.Module):
    """The last ``size`` teacher embeddings and the pictures they come from, in registered buffers.

    The embeddings are kept as the teacher made them and projected when they are used, so that they never go stale.

    Args:
        size: rows kept, 0 for none.
        channels: D of the teacher's embedding.
    """

    embeddings: Tensor
    image_ids: Tensor
    written: Tensor

    def __init__(self, *, size: int, channels: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("embeddings", torch.zeros(size, channels))
        self.register_buffer("image_ids", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))  # rows ever written

    def rows(self) -> tuple[Tensor, Tensor]:
        """A copy of the filled rows: embeddings (Q, D) and image ids (Q,).

        A copy, because a step's graph keeps them until its backward, and ``add`` writes before that.
        """
        filled = min(int(self.written), self.size)
        return self.embeddings[:filled].clone(), self.image_ids[:filled].clone()

    @torch.no_grad()
    def add(self, embeddings: Tensor, image_ids: Tensor) -> None:
        """Remembers (R, D) embeddings of regions of (R,) pictures, and those of every other process.

        Every process must call this at every step, with any number of rows (0 too): the processes exchange how many
        rows each has before the rows themselves.
        """
        if not self.size:
            return
        embeddings, image_ids = gather_rows(embeddings.detach().float()), gather_rows(image_ids)
        embeddings, image_ids = embeddings[-self.size :], image_ids[-self.size :]
        start = int(self.written) % self.size
        position = (start + torch.arange(len(embeddings), device=embeddings.device)) % self.size
        self.embeddings[position] = embeddings
        self.image_ids[position] = image_ids
        self.written += len(embeddings)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of every process, in the order of their ranks; counts may differ. (R_p, ...) -> (sum of R_p, ...)."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    world = distributed.get_world_size()
    counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(world)]
    distributed.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    most = max(int(count) for count in counts)
    padded = pad(rows, (0, 0) * (rows.dim() - 1) + (0, most - len(rows)))
    parts = [torch.zeros_like(padded) for _ in range(world)]
    distributed.all_gather(parts, padded.contiguous())
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
