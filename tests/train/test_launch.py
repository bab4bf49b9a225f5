"""What a process of a run asks of the system."""

import resource

import torch

from tests.processes import PROCESSES
from train.launch import keep_freed_memory

PAGES = 2**25 // resource.getpagesize()  # of a tensor of 32 MB


def new_pages() -> int:
    """Pages that the system hands out while ten tensors of 32 MB come and go."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _check() -> None:
    keep_freed_memory()
    new_pages()  # the heap grows once
    assert new_pages() < PAGES, "freed memory went back to the system"


def test_a_process_keeps_the_memory_of_freed_tensors() -> None:
    process = PROCESSES.Process(target=_check)
    process.start()
    process.join()
    assert process.exitcode == 0
