"""Forwards recorded as CUDA graphs, a shape each: a replay costs the host one launch, whatever the model's kernels are.

A shape is recorded when it comes for the second time, so that one that comes once costs nothing. Token inputs ([B, L],
whole numbers) are padded to a bucket of sizes, so that a few graphs serve all: only where the outputs are proven not to
depend on what stands in the padding, bit for bit, with this model and these inputs. A model that fails that is recorded
at exact shapes. A graph that is not faster than the forward as it is is thrown away.
"""

import logging
import statistics
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from apt_model.core.system.cuda import CudaDevice

LOG = logging.getLogger(__name__)
# Graphs that a model keeps; the one that was used longest ago goes first.
MOST = 64
# Of the forward's time: above it a replay is not worth its memory.
_WORTH = 0.97
# Above it a forward is bound by the GPU, where padding costs what it saves.
_PADDED_WORTH = 0.7
# Relative difference of two runs whose kernels add in another order, in 16 bits.
_NEAR = 0.03
_TIMES = 3
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_WHOLE = (torch.int64, torch.int32, torch.bool)
# Of an output's dimensions, by leaf: "rows", "positions" or None for one of fixed size.
Roles = list[tuple[str | None, ...]]


class Sizes(NamedTuple):
    """Of token inputs."""

    rows: int
    positions: int


class Call(NamedTuple):
    """The arguments of a forward, taken apart."""

    leaves: list[Any]
    spec: pytree.TreeSpec
    family: Hashable
    """All but the sizes of its token inputs."""
    sizes: Sizes | None
    """Of its token inputs; None where there are other tensors too, or their sizes differ."""


class Graphs:
    """The recorded forwards of a model.

    Args:
        model: in evaluation mode, on `device`.
        forward: runs it.
        device: records them.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any], device: CudaDevice) -> None:
        self.model, self.forward, self.device = model, forward, device
        self.replays = self.plain_calls = 0
        self.refused: dict[Hashable, str] = {}
        """Why a shape is not recorded, by its key."""
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: Counter[Hashable] = Counter()
        self._roles: dict[Hashable, Roles | None] = {}
        self._padded: dict[Hashable, int] = {}
        """By family, how many dimensions of the inputs may be padded: 2 until it has failed, then rows, then none."""
        self._proven_families: set[Hashable] = set()
        self._lock = threading.Lock()
        self._ends = _ends(model)
        self._placed = _places(self._ends)
        self._stream: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of these inputs: by a graph where there is one, else as it is."""
        call = None if self.model.training or torch.compiler.is_compiling() else self._taken(args, kwargs)
        if call is None:
            self.plain_calls += 1
            return self.forward(*args, **kwargs)
        with self._lock:
            self._forget_moved()
            graph = self._known(call)
            if graph is not None:
                self.replays += 1
                return self._replay(graph, call)
            key, bucket = (call.family, call.sizes), (call.family, self._bucket(call))
            for each in {key, bucket}:
                self._seen[each] += 1
            wanted = [each for each in dict.fromkeys((bucket, key)) if self._wanted(each)]
            if wanted:
                return self._record(call, args, kwargs, wanted)
        self.plain_calls += 1
        return self.forward(*args, **kwargs)

    def _wanted(self, key: Hashable) -> bool:
        return self._seen[key] > 1 and key not in self.refused

    def clear(self) -> None:
        """Forget all graphs; their memory goes back to the allocator."""
        with self._lock:
            self._graphs.clear()
            self._seen.clear()

    def _taken(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """None for what cannot be recorded: what is no tensor or plain value, tensors elsewhere, gradients."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        kind, grad = self.device.kind, torch.is_grad_enabled()
        if grad and any(each.requires_grad for each in self.model.parameters()):
            return None
        tokens: list[torch.Size] = []
        about: list[Any] = []
        others = False
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device.type != kind or (grad and leaf.requires_grad) or type(leaf) is not Tensor:
                    return None
                token = leaf.dim() == 2 and leaf.dtype in _WHOLE
                tokens += [leaf.shape] if token else []
                others |= not token
                about.append((leaf.dtype, None if token else leaf.shape))
            elif isinstance(leaf, _PLAIN):
                about.append((type(leaf), leaf))
            else:
                return None
        sizes = Sizes(*tokens[0]) if tokens and not others and len(set(tokens)) == 1 and min(tokens[0]) > 0 else None
        if sizes is None:
            about.append(tuple(tokens))
        casting = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return Call(leaves, spec, (spec, tuple(about), casting), sizes)

    def _forget_moved(self) -> None:
        """Drop all graphs where the parameters are no longer where they were."""
        places = _places(self._ends)
        if places != self._placed:
            self._placed = places
            self._graphs.clear()
            self._seen.clear()

    def _bucket(self, call: Call) -> Sizes | None:
        padded = self._padded.get(call.family, 2)
        if call.sizes is None or not padded:
            return call.sizes
        rows, positions = call.sizes
        return Sizes(bucket_of(rows), bucket_of(positions) if padded > 1 else positions)

    def _known(self, call: Call) -> "_Graph | None":
        keys: list[Hashable] = [(call.family, call.sizes)]
        if call.family in self._proven_families:
            keys.append((call.family, self._bucket(call)))
        for key in keys:
            graph = self._graphs.get(key)
            if graph is not None:
                self._graphs.move_to_end(key)
                return graph
        return None

    def _replay(self, graph: "_Graph", call: Call) -> Any:
        stream = self.device.current_stream()
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)  # the memory of inputs and outputs is one for all streams
        self._stream = stream
        with torch.no_grad():
            graph.fill(call)
            graph.recorded.replay()
            out = graph.results(call, self._roles.get(call.family))
        return pytree.tree_unflatten(out, graph.out_spec)

    def _record(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: list[Any]) -> Any:
        """The forward, and from now on a graph of it under one of the keys wanted, or a reason under each."""
        self.plain_calls += 1
        with torch.no_grad():
            plain, plain_s = self._timed(lambda: self.forward(*args, **kwargs))
            leaves = pytree.tree_leaves(plain)
            fault = self._fault(leaves)
            for key in wanted:
                graph, why = self._graphs.get(key), fault
                if why is None and graph is None:
                    graph, why = self._made(call, key[1])
                if graph is not None:
                    why = self._unfit(graph, call, leaves, plain_s)
                if graph is not None and why is None:
                    self._keep(key, graph)
                    break
                self.refused[key] = str(why)
                LOG.info("%s, %s: no CUDA graph: %s", type(self.model).__name__, key[1], self.refused[key])
        return plain

    def _unfit(self, graph: "_Graph", call: Call, plain: Sequence[Any], plain_s: float) -> str | None:
        """Why `graph` is not to run `call`."""
        padded = graph.sizes != call.sizes
        if padded and not self._proven(graph, call, plain):
            self._padded[call.family] = 0 if self._roles[call.family] is None else self._padded.get(call.family, 2) - 1
            return "the outputs depend on what stands in the padding"
        found, replay_s = self._timed(lambda: self._replay(graph, call))
        if not self._near(pytree.tree_leaves(found), plain):
            name = type(self.model).__name__
            LOG.warning("%s, %s: a replay gives other numbers; it is run as it is", name, call.sizes)
            return "a replay gives other numbers"
        worth = replay_s < plain_s * (_PADDED_WORTH if padded else _WORTH)
        return None if worth else f"a replay takes {replay_s / plain_s:.2f} of the forward's time"

    def _keep(self, key: Hashable, graph: "_Graph") -> None:
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        while len(self._graphs) > MOST:
            self._graphs.popitem(last=False)

    def _fault(self, leaves: Sequence[Any]) -> str | None:
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.device.type != self.device.kind:
                return f"an output is on {leaf.device}"
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                return f"an output is a {type(leaf).__name__}"
        return None

    def _made(self, call: Call, sizes: Sizes | None) -> "tuple[_Graph | None, str | None]":
        pool = next((graph.recorded.pool for graph in self._graphs.values()), None)
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                return _Graph(self.device, self.forward, call, sizes, pool), None
        except Exception as error:  # noqa: BLE001 - whatever a model does that cannot be recorded: it runs as it is
            return None, f"{type(error).__name__}: {error}"[:200]

    def _outputs(self, graph: "_Graph", call: Call) -> list[Any]:
        return pytree.tree_leaves(self._replay(graph, call))

    def _proven(self, graph: "_Graph", call: Call, plain: Sequence[Any]) -> bool:
        """Whether the outputs are the forward's, and the same bits whatever the padding holds."""
        if call.family not in self._roles:
            self._roles[call.family] = self._found_roles(call, plain)
        roles = self._roles[call.family]
        if roles is None:
            return False
        first = self._outputs(graph, call)
        if not self._near(first, plain) or not graph.fill(call, other=True):
            return False
        graph.recorded.replay()
        second = graph.results(call, roles)
        pairs = zip(first, second, strict=True)
        proven = all(not isinstance(one, Tensor) or _same_bits(one, other) for one, other in pairs)
        if proven:
            self._proven_families.add(call.family)
        return proven

    def _found_roles(self, call: Call, plain: Sequence[Any]) -> Roles | None:
        """Which dimensions of the outputs follow which of the inputs: one row more, and half of the positions."""
        assert call.sizes is not None
        rows, positions = call.sizes
        half = max(1, positions // 2)
        more = [_map(leaf, lambda each: torch.cat([each, each[-1:]])) for leaf in call.leaves]
        less = [_map(leaf, lambda each: each[:, :half]) for leaf in call.leaves]
        found: list[tuple[str | None, ...]] = []
        try:
            others = [self._leaves_of(call, changed) for changed in (more, less)]
        except Exception as error:  # noqa: BLE001 - a model that takes no other sizes is not padded
            LOG.info("%s is not padded: %s", type(self.model).__name__, error)
            return None
        for mine, taller, shorter in zip(plain, *others, strict=True):
            if not isinstance(mine, Tensor):
                found.append(())
                continue
            roles: list[str | None] = []
            for size, tall, short in zip(mine.shape, taller.shape, shorter.shape, strict=True):
                if size == tall and size == short:
                    roles.append(None)
                elif (size, tall, short) == (rows, rows + 1, rows):
                    roles.append("rows")
                elif (size, tall, short) == (positions, positions, half):
                    roles.append("positions")
                else:
                    return None
            found.append(tuple(roles))
        return found

    def _leaves_of(self, call: Call, leaves: list[Any]) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        return pytree.tree_leaves(self.forward(*args, **kwargs))

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """What it gives, and its median seconds, host and device."""
        times, result = [], work()
        for _ in range(_TIMES):
            self.device.synchronize()
            begin = time.perf_counter()
            result = work()
            self.device.synchronize()
            times.append(time.perf_counter() - begin)
        return result, statistics.median(times)

    @staticmethod
    def _near(found: Sequence[Any], plain: Sequence[Any]) -> bool:
        if len(found) != len(plain):
            return False
        for mine, theirs in zip(found, plain, strict=True):
            if not isinstance(mine, Tensor):
                continue
            if mine.shape != theirs.shape:
                return False
            if mine.is_floating_point():
                gap = (mine.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-20)
                if not float(gap) <= _NEAR:
                    return False
        return True


class _Graph:
    """One recorded forward, and the memory of its inputs."""

    def __init__(
        self, device: CudaDevice, forward: Callable[..., Any], call: Call, sizes: Sizes | None, pool: Any
    ) -> None:
        self.sizes, self.out_spec = sizes, call.spec
        self.inputs = [
            _map(leaf, lambda each: each.new_zeros(each.shape if sizes is None else sizes)) for leaf in call.leaves
        ]
        self.fill(call)
        args, kwargs = pytree.tree_unflatten(self.inputs, call.spec)

        def work() -> list[Any]:
            out, self.out_spec = pytree.tree_flatten(forward(*args, **kwargs))
            return out

        self.recorded = device.record(work, pool)

    def fill(self, call: Call, *, other: bool = False) -> bool:
        """Bring a call's inputs in; with `other` the padding holds the largest token, and masks 0 as ever.

        Returns whether the padding then differs.
        """
        differs = False
        for held, leaf in zip(self.inputs, call.leaves, strict=True):
            if not isinstance(leaf, Tensor):
                continue
            if held.shape == leaf.shape:
                held.copy_(leaf)
                continue
            largest = int(leaf.max()) if other else 0
            differs |= largest > 1
            held.fill_(largest if largest > 1 else 0)
            held[: leaf.shape[0], : leaf.shape[1]].copy_(leaf)
        return differs

    def results(self, call: Call, roles: Roles | None) -> list[Any]:
        """Copies of what the last replay wrote, without padding."""
        cut = call.sizes != self.sizes
        return [
            _map(leaf, lambda each, number=number: _cut(each, call.sizes, roles[number]) if cut else each.clone())  # type: ignore[misc,index]
            for number, leaf in enumerate(self.recorded.result)
        ]


def is_plain(value: object) -> bool:
    """Whether it is a tensor or a plain value, or a tuple, list or dict of those."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return isinstance(value, (Tensor, *_PLAIN))


def bucket_of(size: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most half as much again."""
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def _map(leaf: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(leaf) if isinstance(leaf, Tensor) else leaf


def _cut(leaf: Tensor, sizes: Sizes | None, roles: tuple[str | None, ...]) -> Tensor:
    assert sizes is not None
    return leaf[tuple(slice(None if role is None else getattr(sizes, role)) for role in roles)].clone()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _ends(model: nn.Module) -> list[nn.Parameter]:
    """The first and the last parameter: what moves a model moves them."""
    held = list(model.parameters())
    return [held[0], held[-1]] if held else []


def _places(parameters: list[nn.Parameter]) -> tuple[int, ...]:
    return tuple(each.data_ptr() for each in parameters)
