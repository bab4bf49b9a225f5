"""The ranks of a run as a person knows them: rank, host, process."""

from collections.abc import Sequence
from typing import NamedTuple


class Member(NamedTuple):
    """One process of a run."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


def in_words(members: Sequence[Member]) -> str:
    """Few by rank, host and process; many by ranks and hosts: `ranks 0-3, 5 (node-a), 8-15 (node-b)`."""
    if len(members) <= 4:
        return " and ".join(map(str, members))
    hosts = dict.fromkeys(member.host for member in members)
    return "ranks " + ", ".join(f"{spans([m.rank for m in members if m.host == host])} ({host})" for host in hosts)


def spans(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] as `0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def ranks_in_words(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {spans(ranks)}"
