"""Carry out a decision on a model, and take all of it back."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apt_model.core.errors import CapacityError, InputError
from apt_model.core.policy import FollowsPolicy, Policy
from apt_model.core.system.cpu import CpuDevice
from apt_model.core.system.cuda import CudaDevice
from apt_model.core.system.device import Device
from apt_model.layers.fp4_experts import FP4Experts, unpack_experts
from apt_model.optimization.blocks import blocks_of
from apt_model.optimization.convert import packed_of, places_of
from apt_model.optimization.convert_plan import Candidate, is_conv1d
from apt_model.optimization.decision import Decision, castable
from apt_model.optimization.fp4_config import FP4Config
from apt_model.optimization.graphs import Graphs, is_plain
from apt_model.optimization.recompute import Recompute
from apt_model.optimization.vgpu_stack import VGPUStack
from apt_model.optimization.wrapped import WrappedForward
from apt_model.vgpu.blob import set_values

LOG = logging.getLogger(__name__)


class _Kept(NamedTuple):
    """What a tensor of the model was."""

    tensor: Tensor
    """The parameter or buffer itself."""
    device: torch.device
    dtype: torch.dtype
    values: Tensor | None
    """Its values in host memory, where a cast loses some."""

    def back(self) -> Tensor:
        """The values to put back: those that were there, unless something else has been written since."""
        now = self.tensor.data
        if self.values is not None and torch.equal(self.values.to(now.dtype), now.cpu()):
            return self.values.to(self.device)
        return now.to(self.device, self.dtype)


class Optimized:
    """A model under a decision, until `undo`.

    Args:
        model: is changed in place.
        policy: that the decision follows.
        restorable: keep what casts and 4 bits lose in host memory, so that `undo` gives back every bit.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, decision: Decision, device: Device, *, restorable: bool
    ) -> None:
        self.decision = decision
        self.graphs: Graphs | None = None
        self.recompute: Recompute | None = None
        self.stack: VGPUStack | None = None
        self._restorable = restorable
        self._undo = contextlib.ExitStack()
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                self._apply(model, policy, decision, device)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Give the model back as it was; where nothing was kept, weights stay in the bits that they have now."""
        with torch.inference_mode(mode=False), torch.no_grad():
            self._undo.close()

    def stats(self) -> dict[str, Any]:
        """What has happened since."""
        found: dict[str, Any] = {"model": self.decision.model, "mode": self.decision.mode}
        if self.graphs is not None:
            found["graphs"] = {
                "recorded": len(self.graphs), "replays": self.graphs.replays, "plain_calls": self.graphs.plain_calls,
                "refused": sorted(set(self.graphs.refused.values())),
            }  # fmt: skip
        if self.recompute is not None:
            found["recompute"] = {
                "shapes": len(self.recompute.decided), "recomputed": sum(self.recompute.decided.values()),
                "saved_bytes": max(self.recompute.saved_bytes.values(), default=None),
            }  # fmt: skip
        if self.stack is not None:
            found["vgpu"] = self.stack.stats()
        return found

    def _apply(self, model: nn.Module, policy: Policy, decision: Decision, device: Device) -> None:
        follows = isinstance(model, FollowsPolicy)
        if follows:
            self._follow(model, policy)
        if decision.purpose == "inference" and decision.mode in ("speed", "full"):
            self._freeze(model)
        if decision.quantized or decision.precision.endswith("weights") or decision.moves:
            self._check_room(model, decision)
        self._quantize(model, decision, device)
        self._move(model, decision, device)
        if decision.levels:
            self.stack = VGPUStack({"levels": list(decision.levels)})
            self._undo.callback(self.stack.close)
            self.stack.attach(model)
        blocks = blocks_of(model)
        if decision.compiles:
            self._compile(blocks)
        self._wrap(model, blocks, policy, decision, device, follows=follows)

    def _follow(self, model: Any, policy: Policy) -> None:
        before = getattr(model, "policy", None)
        model.apply_policy(policy)
        self._undo.callback(model.apply_policy, before)

    def _freeze(self, model: nn.Module) -> None:
        modes = [(module, module.training) for module in model.modules()]
        grads = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def back() -> None:
            for module, training in modes:
                module.training = training
            for parameter in grads:
                parameter.requires_grad_()

        self._undo.callback(back)
        model.eval()
        for parameter in grads:
            parameter.requires_grad_(False)

    def _check_room(self, model: nn.Module, decision: Decision) -> None:
        """Raise `CapacityError` where host memory has no room for what is to be kept."""
        if not self._restorable:
            return
        cast = castable(model).values() if decision.precision.endswith("weights") else ()
        lost = {id(each): each for each in cast}
        lost |= {id(held): held for each in decision.quantized for held in map(each.module.get_parameter, each.weights)}
        need = sum(each.nbytes for each in lost.values() if each.device.type != "cpu")
        need += decision.weight_bytes if decision.levels or not decision.moves else 0
        free = CpuDevice().free_memory()
        if need > free:
            raise CapacityError(
                f"vb.optimize: to give every bit back, {need} bytes of host memory are needed, and {free} are free",
                state="the model is as it was",
                remedy="vb.optimize(model, restorable=False), after which vb.disable() leaves the weights as they are",
            )

    def _quantize(self, model: nn.Module, decision: Decision, device: Device) -> None:
        places = places_of(model)
        for each in decision.quantized:
            parents = places[id(each.module)]
            kept = self._quantized(each, parents, device, stays=decision.moves)
            if kept is not None:
                self._undo.callback(kept)

    def _quantized(
        self, each: Candidate, parents: list[tuple[nn.Module, str]], device: Device, *, stays: bool
    ) -> Callable[[], None] | None:
        """Put a layer into 4 bits, on the device that computes; returns what takes it back."""
        module = each.module
        held = {name: module.get_parameter(name) for name in each.weights}
        before = {name: (parameter, parameter.data, parameter.requires_grad) for name, parameter in held.items()}
        home = next(iter(held.values())).device
        for parameter in held.values():
            set_values(parameter, parameter.data.to(device.device))
        try:
            new = packed_of(module, FP4Config())
        except InputError as error:
            for parameter, data, _ in before.values():
                set_values(parameter, data)
            LOG.warning("%s stays as it is: %s", each.name, error.message)
            return None
        plain = isinstance(module, nn.Linear) or is_conv1d(module)
        for parent, name in parents if plain else ():
            setattr(parent, name, new)
        if not stays:
            new.to(home)
        originals = {
            name: (parameter, data.cpu() if self._restorable else None, home, grad)
            for name, (parameter, data, grad) in before.items()
        }
        if plain:
            for parameter in held.values():  # the old layer is kept, without its values
                parameter.data = parameter.data.new_empty(0)
        if not self._restorable:
            return None

        def back() -> None:
            if not plain:
                assert isinstance(new, FP4Experts)
                unpack_experts(new, None)
            for name, (parameter, values, where, grad) in originals.items():
                assert values is not None
                set_values(parameter, values.to(where))
                parameter.requires_grad_(grad)
                module.register_parameter(name, parameter)
            for parent, name in parents if plain else ():
                setattr(parent, name, module)

        return back

    def _move(self, model: nn.Module, decision: Decision, device: Device) -> None:
        """Cast and move; what is taken back is the place, and the values that the cast lost."""
        dtype = {"bf16 weights": torch.bfloat16, "fp32 weights": torch.float32}.get(decision.precision)
        cast = castable(model) if dtype is not None else {}
        lasting = _lasting_buffers(model) if dtype is not None else set()
        kept = []
        for held in dict.fromkeys([*model.parameters(), *model.buffers()]):
            to = dtype if id(held) in cast or (id(held) in lasting and held.dtype == torch.float32) else None
            to = None if to == held.dtype else to
            values = held.data.cpu() if to is not None and self._restorable else None
            was = (held.device, held.dtype)
            if to is None and not decision.moves:
                continue
            set_values(held, held.data.to(device=device.device if decision.moves else None, dtype=to))
            kept.append(_Kept(held, *was, values))

        def back() -> None:
            for each in kept:
                if self._restorable or each.dtype == each.tensor.dtype:
                    set_values(each.tensor, each.back())

        self._undo.callback(back)

    def _compile(self, blocks: list[nn.Module]) -> None:
        for block in blocks:
            if block._compiled_call_impl is None:  # noqa: SLF001 - nn.Module has no other way to ask
                block.compile(dynamic=True)
                self._undo.callback(_uncompile, block)
                block._compiled_call_impl = _WherePlain(block)  # noqa: SLF001

    def _wrap(
        self, model: nn.Module, blocks: list[nn.Module], policy: Policy, decision: Decision, device: Device, *,
        follows: bool,
    ) -> None:  # fmt: skip
        casts = decision.precision == "bf16 autocast" and not follows
        inputs = _input_dtype(model) if decision.precision.endswith("weights") else None
        if decision.recompute != "off" and not follows:
            self.recompute = Recompute(model, blocks, policy, device)
            self._undo.callback(self.recompute.undo)
        forward = _Forward(model, device, autocast=casts, inputs=inputs, recompute=self.recompute)
        self._undo.callback(forward.undo)
        forward.optimized = self
        if decision.compiles:
            forward.blocks = blocks
        if decision.graphs:
            assert isinstance(device, CudaDevice)
            self.graphs = forward.graphs = Graphs(model, forward.run, device)
            self._undo.callback(self.graphs.clear)


class _Forward(WrappedForward):
    """The forward of an optimised model."""

    def __init__(
        self,
        model: nn.Module,
        device: Device,
        *,
        autocast: bool,
        inputs: torch.dtype | None,
        recompute: Recompute | None,
    ) -> None:
        super().__init__(model)
        self.kind, self.autocast, self.inputs, self.recompute = device.kind, autocast, inputs, recompute
        self.blocks: list[nn.Module] = []
        """Those that are compiled."""
        self.graphs: Graphs | None = None
        self.optimized: Optimized | None = None
        """Lives as long as the model does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward gives."""
        if self.inputs is not None:
            args = tuple(map(self._cast, args))
            kwargs = {name: self._cast(value) for name, value in kwargs.items()}
        return self.run(*args, **kwargs) if self.graphs is None else self.graphs(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The same without a graph."""
        casting = self.autocast and not torch.is_autocast_enabled(self.kind)
        with torch.autocast(self.kind, torch.bfloat16) if casting else contextlib.nullcontext():
            if self.recompute is not None:
                return self.recompute(self._compiled, args, kwargs)
            return self._compiled(*args, **kwargs)

    def _compiled(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; where torch.compile fails its blocks are run as they are, from then on."""
        if not self.blocks:
            return self.inner(*args, **kwargs)
        try:
            return self.inner(*args, **kwargs)
        except Exception as error:
            from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 - only after an error
            from torch._inductor.exc import InductorError  # noqa: PLC0415

            if not isinstance(error, (TorchDynamoException, InductorError)):
                raise
            first = str(error).strip().splitlines()[0]
            LOG.warning("torch.compile of the blocks failed, they are run without it: %s", first)
            for block in self.blocks:
                _uncompile(block)
            self.blocks = []
        return self.inner(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(self.inputs) if floats else value


class _WherePlain:
    """A block's compiled call for tensors and plain values; with anything else, such as a cache, the block as it is.

    torch.compile makes a program for each state of each layer's cache, which takes minutes and saves nothing.
    """

    def __init__(self, block: nn.Module) -> None:
        self.plain: Callable[..., Any] = block._call_impl  # noqa: SLF001
        self.compiled: Any = block._compiled_call_impl  # noqa: SLF001

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiles = is_plain(args) and is_plain(kwargs)
        return self.compiled(*args, **kwargs) if compiles else self.plain(*args, **kwargs)


def _uncompile(block: nn.Module) -> None:
    block._compiled_call_impl = None  # noqa: SLF001 - what `compile` sets


def _lasting_buffers(model: nn.Module) -> set[int]:
    """Those that a state dict has, by id."""
    return {
        id(buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set  # noqa: SLF001 - nn.Module has no other way to ask
    }


def _input_dtype(model: nn.Module) -> torch.dtype | None:
    return next((each.dtype for each in model.parameters() if each.is_floating_point() and each.itemsize > 1), None)
