"""Messages on their way to other ranks, each held no longer than until it has been taken.

PyTorch's runtime of pipelines keeps every message of a step until its end: one state more for each micro-batch and boundary. NCCL
says of a message whether it is gone. gloo does not, and a message that is forgotten
before never arrives, so there a thread waits for each.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor


class Outbox:
    """Sends within a group from one device."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group = group
        self.waiter = ThreadPoolExecutor(1, "outbox") if device.type == "cpu" else None
        self.posted: list[tuple[dist.Work, Future[bool] | None]] = []  # with whoever waits for it

    def send(self, tensor: Tensor, to: int) -> None:
        """Let a tensor set off to a rank of the group; it must not be written to any more."""
        self.posted = [one for one in self.posted if not _is_gone(*one)]
        work = dist.isend(tensor.contiguous(), group=self.group, group_dst=to)
        assert work is not None
        self.posted.append((work, self.waiter.submit(work.wait) if self.waiter else None))

    def wait(self) -> None:
        """Until all have been taken; raises what went wrong."""
        for work, waiting in self.posted:
            waiting.result() if waiting else work.wait()
        self.posted = []


def _is_gone(work: dist.Work, waiting: Future[bool] | None) -> bool:
    return waiting.done() if waiting else work.is_completed()
