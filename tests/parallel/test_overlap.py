"""A forward and a backward pass that take turns give what they give one after the other, and compute while tokens travel."""

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.flops import Recompute
from model.layers import split_backward
from model.moe import MoE
from model.ops.weight_gradient import put_aside
from model.transformer import Transformer
from parallel.expert import WAIT_FOR_ROWS, AllToAllDispatcher
from parallel.overlap import Turns, meanwhile
from parallel.recompute import MATRIX_PRODUCTS, apply_recompute
from tests.small_model import small_model

SET_OFF = torch.ops._c10d_functional.all_to_all_single.default
Log = list[tuple[str, str]]  # which side, and what it did


def speaker(said: list[str], words: str, fails: bool = False) -> Callable[[], str]:
    """Says a word each turn."""

    def speak() -> str:
        for word in words.split():
            said.append(word)
            meanwhile()
        if fails:
            raise KeyError(words)
        return words

    return speak


@pytest.mark.parametrize(
    ("forward", "backward", "said"),
    [("1 2 3", "a b c", "1 a 2 b 3 c"), ("1", "a b c", "1 a b c"), ("1 2 3", "a", "1 a 2 3"), ("", "a b", "a b")],
)
def test_two_sides_take_turns_until_one_has_ended(forward: str, backward: str, said: str) -> None:
    turns = Turns()
    for _ in range(2):
        order: list[str] = []
        assert turns.run(speaker(order, forward), speaker(order, backward)) == (forward, backward)
        assert " ".join(order) == said


def test_a_pass_alone_has_nobody_to_hand_over_to() -> None:
    assert speaker([], "1 2")() == "1 2"


@pytest.mark.parametrize(
    ("forward", "backward", "fails", "said"),
    [
        ("1 2", "a b c", "forward", "1 a 2 b"),
        ("1 2 3", "a", "backward", "1 a 2"),
        ("1", "a b", "backward", "1 a b"),
        ("", "a b", "forward", ""),
        ("1 2", "a b", "forward backward", "1 a 2 b"),
    ],
)
def test_an_error_of_either_side_ends_both_and_is_raised(forward: str, backward: str, fails: str, said: str) -> None:
    """The other side stops where it would next wait; the first error counts."""
    turns, order = Turns(), list[str]()
    with pytest.raises(KeyError):
        turns.run(speaker(order, forward, "forward" in fails), speaker(order, backward, "backward" in fails))
    assert " ".join(order) == said
    assert turns.run(speaker([], "1"), speaker([], "a")) == ("1", "a")


class Watch(TorchDispatchMode):
    """Logs one side's products, and its rows as they set off and have arrived."""

    def __init__(self, log: Log, side: str):
        super().__init__()
        self.log, self.side = log, side

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SET_OFF:
            what = "rows" if args[0].dim() == 2 and args[0].dtype is not torch.int64 else "numbers"
            self.log.append((self.side, f"{what} set off"))
        out = func(*args, **(kwargs or {}))
        if func is WAIT_FOR_ROWS:
            self.log.append((self.side, "rows arrived"))
        elif func in MATRIX_PRODUCTS:
            self.log.append((self.side, "product"))
        return out


class Together:
    """Runs a forward and a backward pass, by turns or one after the other."""

    def __init__(self, overlapped: bool):
        self.turns = Turns() if overlapped else None
        self.log: Log = []

    def run(self, forward: Callable[[], Tensor], backward: Callable[[], None]) -> Tensor:
        def watched(side: str, run: Callable[[], Any]) -> Any:
            with Watch(self.log, side):
                made = run()
            self.log.append((side, "ended"))
            return made

        passes = (lambda: watched("forward", forward)), (lambda: watched("backward", backward))
        made, _ = self.turns.run(*passes) if self.turns else [run() for run in passes]
        return made


def stage(seed: int, recompute: Recompute) -> Transformer:
    """A model whose experts are spread over the two ranks."""
    model = small_model(seed)
    for layer in model.modules():
        if isinstance(layer, MoE):
            experts = layer.gate.config.n_routed_experts
            for name, parameter in list(layer.experts.named_parameters()):
                mine = parameter.detach().chunk(dist.get_world_size())[dist.get_rank()]
                setattr(layer.experts, name, nn.Parameter(mine.clone()))
            layer.dispatcher = AllToAllDispatcher(experts, dist.group.WORLD)
    apply_recompute(model, recompute)
    split_backward(model)
    return model


def loss_of(model: Transformer, batch: int) -> Tensor:
    draw = torch.Generator().manual_seed(2 * batch + dist.get_rank())
    tokens = torch.randint(0, 96, (2, 12), generator=draw)
    losses = model(tokens, torch.zeros_like(tokens)).losses
    return losses.objective(losses.counts, 2, 0.3, 1e-4)


def train(recompute: Recompute, overlapped: bool) -> tuple[list[Tensor], Log]:
    """Losses and gradients of two stages, whose passes overlap with each other's."""
    one, other = stage(1, recompute), stage(2, recompute)
    together = Together(overlapped)
    first = loss_of(one, 0)
    second = together.run(lambda: loss_of(other, 1), first.backward)
    with put_aside() as later:
        third = together.run(lambda: loss_of(one, 2), second.backward)
    later.run()
    third.backward()
    gradients = [p.grad for model in (one, other) for p in model.parameters() if p.grad is not None]
    return [first.detach(), second.detach(), third.detach(), *gradients], together.log


def compare(recompute: Recompute) -> tuple[list[bool], Log]:
    (expected, _), (found, log) = train(recompute, overlapped=False), train(recompute, overlapped=True)
    return [torch.equal(a, b) for a, b in zip(found, expected, strict=True)], log


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_passes_that_overlap_have_the_bits_of_passes_one_after_the_other(workers: Any, recompute: Recompute) -> None:
    """And ranks issue the same collectives in the same order, and whenever rows travel the other side computes."""
    (same, log), (also_same, other_log) = workers.run(2, compare, recompute)
    assert len(same) > 100 and all(same) and all(also_same)
    assert log == other_log
    for _ in range(2):
        end = next(i for i, (_, what) in enumerate(log) if what == "ended")
        met = meetings(log[:end])
        # The backward pass begins with the head, whose products were made in the forward pass.
        assert len(met) > 8 and sum(products == 0 for products in met) <= 1, met
        log = log[log.index((("backward" if log[end][0] == "forward" else "forward"), "ended"), end) + 1 :]
    assert not log


def meetings(log: Log) -> list[int]:
    """How many products the other side has computed each time that rows were on their way."""
    found = []
    for i, (side, what) in enumerate(log):
        if what == "rows set off" and (side, "rows arrived") in log[i:]:
            on_their_way = log[i : log.index((side, "rows arrived"), i)]
            found.append(sum(who != side and event == "product" for who, event in on_their_way))
    return found


def fail() -> list[str]:
    """What is raised where one of the passes fails in its last layer, on both ranks; and a run after that."""
    one, other = stage(1, "none"), stage(2, "none")
    turns, raised = Turns(), []
    for side in ("forward", "backward"):
        loss = loss_of(one, 0)

        def refuse(*_: Any, side: str = side) -> NoReturn:
            raise KeyError(side)

        if side == "forward":
            hook = other.model.layers[-1].mlp.experts.register_forward_hook(refuse)
        else:
            hook = one.model.layers[1].mlp.experts.down_proj.register_hook(refuse)
        try:
            turns.run(lambda: loss_of(other, 1), loss.backward)
        except KeyError as error:
            raised += error.args
        hook.remove()
    loss, _ = turns.run(lambda: loss_of(other, 1), loss_of(one, 0).backward)
    assert torch.equal(loss, loss_of(other, 1))
    return raised


def test_an_error_inside_a_pass_is_raised_and_nobody_hangs(workers: Any) -> None:
    assert workers.run(2, fail) == [["forward", "backward"]] * 2
