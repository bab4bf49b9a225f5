"""A run that was disturbed from outside: how it is told from a mistake of its user or of ours, and its exit code.

A rank that dies shows on the others as an error of whatever they were waiting in. PyTorch has no one class for it: what its store
and its sockets raise is certain, but `DistBackendError` is all that NCCL may dislike. So the words of its libraries decide; what
they do not know is taken for a bug and keeps its traceback.
"""

from collections.abc import Iterable, Iterator

import torch.distributed as dist

BUG = 1  # exit code: ours, with its traceback
LOST = 4  # exit code: start the same command again, and the run continues from its newest complete checkpoint

# Of gloo, of its sockets, of NCCL, and of TCPStore.
WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Read error",
    "Write error",
    "Socket closed",
    "Timed out waiting",
    "recvValue failed",
    "sendBytes failed",
    "retrieving ncclUniqueId",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)

# Of NCCL, which also says it of this process's own sockets, memory and devices.
AMBIGUOUS = ("ncclSystemError",)


class Lost(Exception):
    """This run was disturbed from outside: a rank does not come, or is gone. The message is one line."""


def is_of_a_lost_peer(error: BaseException) -> bool:
    """Whether an error came from the loss of another rank, or of the link to it."""
    return any(_is_of_the_store(part) or _says_one_of(WORDS + AMBIGUOUS, part) for part in _parts(error))


def is_ambiguous(error: BaseException) -> bool:
    """Whether an error of a lost peer may as well be this process's own, so that its traceback must be seen."""
    parts = list(_parts(error))
    return any(_says_one_of(AMBIGUOUS, part) for part in parts) and not any(_says_one_of(WORDS, part) for part in parts)


def first_line(error: BaseException) -> str:
    """What a library said first, without the place in its source."""
    line = (str(error).strip().splitlines() or [""])[0]
    if line.startswith("[/"):
        line = line.partition("] ")[2]
    return f"{type(error).__name__}: {line.partition('. This is typically')[0]}"


def _is_of_the_store(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) and not isinstance(error, dist.DistBackendError)


def _says_one_of(words: Iterable[str], error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _parts(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and those that a checkpoint's save collected from its ranks."""
    yield error
    if error.__cause__ is not None:
        yield from _parts(error.__cause__)
    for cause, _ in getattr(error, "failures", {}).values():
        yield from _parts(cause)
