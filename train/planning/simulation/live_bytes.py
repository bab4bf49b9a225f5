"""The bytes of live tensors through a step, on any device and without an allocator that counts; and what they are for.

Every tensor that an operation reads or writes is noted by its storage when it is first seen, and again when the storage is freed,
or resized, as FSDP does with what it gathers. Views share a storage and count once. What a kernel allocates for itself and frees
before it returns is not seen, nor what a library of communication keeps. Fake tensors count like real ones.

    live = StepBytes(engine)
    with live.watching():
        engine.launch(…)         finds what lasts from step to step
        live.start()
        engine.launch(…)
    live.at_peak()               {kind: bytes}

| kind          | storages                                                                                                 |
|---------------|----------------------------------------------------------------------------------------------------------|
| parameters    | of parameters (FSDP: this rank's shards) and buffers                                                     |
| moments       | of the optimizer's state                                                                                 |
| gradients     | what is, or becomes, some parameter's `grad`, or FSDP's sum of it: the head's from its first token on    |
| gathered      | made while FSDP gathers: what arrives, and the parameters that are copied out of it                      |
| communication | made while gradients are reduced (DDP: buckets, where sums lie beside them); rows and states of other    |
|               | ranks until they are taken                                                                               |
| activations   | all others: kept for backward passes, or at work                                                         |
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

import parallel.overlap
from parallel.ddp import DDPEngine
from parallel.expert import WAIT_FOR_ROWS
from parallel.pipeline import Stage

c10d = torch.ops._c10d_functional
MESSAGES = {c10d.all_to_all_single.default, c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default}
WAITS = {c10d.wait_tensor.default, WAIT_FOR_ROWS}
KINDS = ("parameters", "gradients", "moments", "gathered", "communication", "activations")


class Peak(NamedTuple):
    everything: int  # bytes
    without_state: int  # bytes, storages of parameters, gradients and optimizer state left out


class LiveBytes(TorchDispatchMode):
    """Use as a context manager around a step; `peak` afterwards says how much was alive at once since `start`."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}  # address of a live storage → its number
        self.sizes: dict[int, int] = {}  # number of a live storage → its bytes
        self.events: list[tuple[int, int]] = []  # (number, bytes allocated or, negative, freed)
        self.first_event = 0
        self._watchers: list[Any] = []  # weak references to storages, by their numbers

    def __enter__(self) -> "LiveBytes":
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = _and_then(self._resize, self._resized)  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # asks again, of the local tensors
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self.note(tree_leaves((args, kwargs, result)))
        return result

    def note(self, values: Iterable[Any]) -> set[int]:
        """Count the tensors among `values` from here on. Returns the numbers of their storages."""
        tensors = (_local(value) for value in values if isinstance(value, Tensor))
        return {self._number(tensor.untyped_storage()) for tensor in tensors if not _is_meta(tensor)}

    def start(self) -> None:
        """`peak` shall look at what happens from here on, on top of what is alive."""
        self.first_event = len(self.events)

    @property
    def now(self) -> int:
        """Bytes that are alive, of all that has been noted."""
        return sum(self.sizes.values())

    def peak(self, state: set[int]) -> Peak:
        """The largest sums since `start`, the second without the storages numbered in `state`; each at a moment of its own."""
        live = without_state = 0
        largest = [0, 0]
        for index, (number, size) in enumerate(self.events):
            live += size
            without_state += 0 if number in state else size
            if index >= self.first_event - 1:
                largest = [max(largest[0], live), max(largest[1], without_state)]
        return Peak(*largest)

    def _number(self, storage: torch.UntypedStorage) -> int:
        address = storage._cdata
        number = self.numbers.get(address)
        if number is None:
            number = self.numbers[address] = len(self._watchers)
            self.sizes[number] = 0
            self._watchers.append(weakref.ref(storage, partial(self._freed, address, number)))
            self._change(number, storage.nbytes())
        return number

    def _change(self, number: int, size: int) -> None:
        if change := size - self.sizes[number]:
            self.sizes[number] = size
            self.events.append((number, change))

    def _resized(self, storage: torch.UntypedStorage, *_: Any) -> None:
        self._change(self._number(storage), storage.nbytes())

    def _freed(self, address: int, number: int, _: Any) -> None:
        del self.numbers[address]
        self._change(number, 0)
        del self.sizes[number]
        self._watchers[number] = None


class StepBytes(LiveBytes):
    """Live bytes of an engine's steps, by kind.

    Args:
        engine: made by `parallel.build.build_engine`, but for DeepSpeed's.
    """

    def __init__(self, engine: Any):
        super().__init__()
        self.engine = engine
        self.making = "activations"  # what storages are that are first seen now
        self.born: dict[int, str] = {}  # what storages were when they were first seen, by their numbers
        self.owned: dict[int, str] = {}  # what some turn out to have been all the time
        self.has_sums = False  # whether a micro-batch of the step has left gradients
        self.taken: dict[int, int] = {}  # number of events before a message was taken

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the engine's steps inside."""
        engine = self.engine
        self.own("parameters", [*engine.model.parameters(), *engine.model.buffers()])
        self._own_moments()
        with ExitStack() as stack:
            for owner, name, wrap in self._wrappers():
                stack.enter_context(replaced(owner, name, wrap(getattr(owner, name))))
            stack.enter_context(self)
            yield

    def own(self, kind: str, values: Iterable[Any]) -> None:
        """These storages are of this kind all their lives."""
        self.owned |= dict.fromkeys(self.note(values), kind)

    def take(self, values: Iterable[Any]) -> None:
        """These messages have arrived: from here on they are activations."""
        self.taken |= dict.fromkeys(self.note(values), len(self.events))

    def at_peak(self) -> dict[str, int]:
        """Bytes by kind when most was alive since `start`, or at all."""
        live, most, largest = Counter[str](), Counter[str](), -1
        taken = sorted(((at, number) for number, at in self.taken.items()), reverse=True)
        kinds, sizes = self.born | self.owned, Counter[int]()
        for index, (number, change) in enumerate(self.events):
            while taken and taken[-1][0] <= index:
                _, message = taken.pop()
                live[kinds[message]] -= sizes[message]
                live["activations"] += sizes[message]
                kinds[message] = "activations"
            sizes[number] += change
            live[kinds[number]] += change
            if index >= self.first_event - 1 and (total := live.total()) > largest:
                largest, most = total, live.copy()
        return {kind: most[kind] for kind in KINDS}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MESSAGES:
            with self._makes("communication"):
                return super().__torch_dispatch__(func, types, args, kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func in WAITS:
            self.take((*args, result))
        return result

    def _number(self, storage: torch.UntypedStorage) -> int:
        number = super()._number(storage)
        self.born.setdefault(number, self.making)
        return number

    @contextmanager
    def _makes(self, kind: str) -> Iterator[None]:
        outer, self.making = self.making, kind
        try:
            yield
        finally:
            self.making = outer

    def _wrappers(self) -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
        """(Owner of a function, its name, what to put around it)."""
        yield FSDPParamGroup, "unshard", self._making("gathered")
        yield FSDPParamGroup, "wait_for_unshard", self._making("gathered")
        yield FSDPParamGroup, "post_backward", self._reducing(lambda group: group.fsdp_params)
        for name in ("accumulate_unsharded_grad_if_needed", "to_accumulated_grad_if_needed"):
            yield FSDPParam, name, self._reducing(lambda parameter: [parameter])
        yield Stage, "_receive", self._making("communication")
        yield Stage, "forward_one_chunk", self._taking("incoming")
        yield Stage, "backward_one_chunk", self._taking("of_outgoing")
        yield DDPEngine, "_sum_gradients", self._making("communication")
        yield parallel.overlap, "_as_here", _with_modes
        yield self.engine, "backward", self._summing
        yield self.engine, "update", self._updating

    def _making(self, kind: str) -> Callable[[Any], Any]:
        def wrap(run: Any) -> Any:
            def making(*args: Any, **kwargs: Any) -> Any:
                with self._makes(kind):
                    return run(*args, **kwargs)

            return making

        return wrap

    def _reducing(self, parameters_of: Callable[[Any], Iterable[FSDPParam]]) -> Callable[[Any], Any]:
        def wrap(run: Any) -> Any:
            def reducing(group: Any, *args: Any) -> None:
                self.own("gradients", _gradients(parameters_of(group)))
                with self._makes("communication"):
                    run(group, *args)
                self.own("gradients", _gradients(parameters_of(group)))

            return reducing

        return wrap

    def _taking(self, name: str) -> Callable[[Any], Any]:
        def wrap(run: Any) -> Any:
            def taking(stage: Stage, chunk: int, *args: Any, **kwargs: Any) -> Any:
                self.take([getattr(stage, name).get(chunk)])
                return run(stage, chunk, *args, **kwargs)

            return taking

        return wrap

    def _summing(self, run: Any) -> Any:
        def backward(loss: Tensor, is_last: bool) -> None:
            run(loss, is_last)
            if not is_last:
                self.own("gradients", self.engine.gradients().values())
            elif getattr(self.engine, "replicas", None) and self.has_sums:
                self.own("communication", self.engine.gradients().values())  # DDP's buckets
            self.has_sums = not is_last

        return backward

    def _updating(self, run: Any) -> Any:
        def update(*args: Any) -> None:
            self.owned = dict.fromkeys(self.note(self.engine.gradients().values()), "gradients") | self.owned
            run(*args)
            self._own_moments()

        return update

    def _own_moments(self) -> None:
        for state in self.engine.optimizer.state.values():
            self.own("moments", (tensor for tensor in state.values() if tensor.dim()))  # not the counts of steps


def _gradients(parameters: Iterable[FSDPParam]) -> Iterator[Tensor | None]:
    """Of whole parameters, their sums, and of shards."""
    for parameter in parameters:
        yield parameter.sharded_param.grad
        if hasattr(parameter, "_unsharded_param"):
            yield from (parameter._unsharded_param.grad, parameter.unsharded_accumulated_grad)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _with_modes(as_here: Any) -> Any:
    """A thread of its own, as a chunk has that overlaps another, has no modes: give it those of this one."""

    def with_modes(run: Callable[[], None]) -> Callable[[], None]:
        modes = _get_current_dispatch_mode_stack()

        def there() -> None:
            with ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(_again(mode) if isinstance(mode, LiveBytes) else mode)
                run()

        there_as_here: Callable[[], None] = as_here(there)
        return there_as_here

    return with_modes


@contextmanager
def _again(live: LiveBytes) -> Iterator[None]:
    """Storages that are resized are followed already."""
    TorchDispatchMode.__enter__(live)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(live, None, None, None)


def _is_meta(tensor: Tensor) -> bool:
    """Without memory for good; a fake tensor's `is_meta` would ask the modes."""
    device: torch.device | None = getattr(tensor, "fake_device", None)
    return tensor.is_meta if device is None else device.type == "meta"


def _and_then(run: Any, look: Any) -> Any:
    """`run`, and a look at what it was called with."""

    def both(*args: Any) -> Any:
        result = run(*args)
        look(*args)
        return result

    return both


@contextmanager
def replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    """Let an attribute of a class or an object be another one inside."""
    had, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before) if had else delattr(owner, name)
