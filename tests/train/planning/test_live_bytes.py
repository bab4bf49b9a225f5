"""What is alive in a step, counted by storages."""

import gc

import torch

from train.planning.simulation.live_bytes import LiveBytes


def test_storages_are_counted_while_they_live():
    kept = torch.zeros(100)  # 400 bytes of state
    live = LiveBytes()
    state = live.note([kept])
    with live:
        a = kept + 1  # + 400
        b = torch.cat((a, a))  # + 800
        view = b[:10]
        del a, b  # − 400: the view keeps b's storage
        gc.collect()
        live.start()
        c = view * 2  # + 40
        del view, c  # − 840
        d = kept * 3  # + 400
    assert live.peak(state) == (1240, 840)
    del d


def test_storages_that_are_resized_are_followed():
    """As FSDP frees and allocates what it has gathered."""
    before = torch.UntypedStorage.resize_
    gathered, live = torch.zeros(100), LiveBytes()
    with live:
        live.note([gathered])  # 400 bytes
        gathered.untyped_storage().resize_(0)
        other = torch.ones(50)  # 200
        gathered.untyped_storage().resize_(800)
    assert live.now == 1000
    assert live.peak(set()).everything == 1000
    assert torch.UntypedStorage.resize_ is before
    del other
