"""Linears that read the same input, computed together; a linear by itself is a group of one.

Who belongs together is decided when the linears are swapped. The first member that is called with
some x computes the outputs of all; the others take theirs when they are called with the same
tensor, unchanged, in the same grad mode, autocast and stream. A member called with anything else
works alone. What PyTorch does not count, it does not see: writes through ``.data``, NumPy or
collectives between the calls of one group. For those ``swap_linears`` has ``siblings=False``.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nsru_kernels.checks import check_dense
from nsru_kernels.dispatch.config import requested_backend
from nsru_kernels.nn.projections import Projected, Projections, projection_key, steps
from nsru_kernels.nn.sharded import comes_and_goes, held, refuse_shards
from nsru_kernels.ops.linear import compute_dtype, few, projected_linears, projected_update
from nsru_kernels.ops.project.autograd import KeptProjection
from nsru_kernels.ops.project.gram import gram_inverse_of

if TYPE_CHECKING:
    from nsru_kernels.nn.linear import NSRULinear
    from nsru_kernels.nn.projections import Variables

    Operands = tuple[Tensor, Tensor | None, Tensor, Tensor, float]  # of one linear

_PLAIN = (Tensor, nn.Parameter)
_DROPOUT = "dropout draws a mask for each"
# The hooks that see what a forward saves; a non-reentrant checkpoint sets some of its own. PyTorch
# has no public way to ask for them.
_saving_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)


class LinearGroup:
    """Linears that read one input; its members share it.

    Attributes:
        projected: the members' projected adapters; see Projections.
        obstacle: why the members last worked alone; None where they did not.
    """

    def __init__(self, projections: Projections) -> None:
        self.projections = projections
        self.projected: Projected | None = None
        self.obstacle: str | None = None
        self._members: list[weakref.ref[NSRULinear]] = []
        projections.add(self)

    def __reduce__(self):
        # A copied or unpickled model makes new groups; modules add themselves.
        return LinearGroup, (self.projections,)

    def add(self, module: NSRULinear) -> int:
        """Make ``module`` the next member; returns its position."""
        self._members.append(weakref.ref(module))
        self.projected = None
        return len(self._members) - 1

    def modules(self) -> list[NSRULinear]:
        """The members; those that were replaced in the model are forgotten."""
        modules = [module for ref in self._members if (module := ref()) is not None]
        if len(modules) < len(self._members):
            self._members, self.projected = [], None
            for module in modules:
                module._position = self.add(module)
        return modules

    @property
    def backend(self) -> str:
        return self.modules()[0].backend

    def current(
        self, dtype: torch.dtype, lora_as: tuple[Tensor, ...], basis: Tensor | None
    ) -> Projected:
        """The members' projected adapters as they are now, ``lora_as`` on ``basis``."""
        known = self.projected
        if known is None or known.key != projection_key(dtype, lora_as, basis):
            known = self.projections.refresh(self, dtype)
        return known

    def call(self, module: NSRULinear, x: Tensor) -> Tensor:
        """The output of ``module`` for x [..., K]: taken, computed with all others, or alone."""
        if (y := self._of_few(module, x)) is not None:
            return y
        if len(self._members) == 1 or torch.compiler.is_compiling():
            return self.compute((module,), (module.operands(),), x)[0]
        waiting, position = _slot.waiting, module._position
        if (
            waiting is not None
            and waiting.group is self
            and position in waiting.outputs
            # What a checkpoint saves has to be computed inside it, also in its second forward.
            and waiting.hooks == _saving_hooks(True)
        ):
            y = waiting.take(position, module, x)
            return self.compute((module,), (module.operands(),), x)[0] if y is None else y
        modules = self.modules()
        operands = [m.operands() for m in modules]
        self.obstacle = self._obstacle_to(modules, operands, module, x)
        if self.obstacle is not None:
            return self.compute((module,), (module.operands(),), x)[0]
        _slot.waiting = None
        ys = self.compute(modules, operands, x)
        _slot.waiting = _Waiting(self, x, modules, operands, ys, position)
        return ys[position]

    def _of_few(self, module: NSRULinear, x: Tensor) -> Tensor | None:
        """The output for few tokens, each member by itself; None where it goes the usual way."""
        weight, bias, lora_a, lora_b, scaling = module.operands()
        if not few.fits(x, weight, module.rank) or module.backend not in few.BACKENDS:
            return None
        if module.dropout and module.training:
            return None
        basis = module._subspace[0]._buffers["basis"] if module._subspace else None
        key, known = projection_key(x.dtype, (lora_a,), basis), self.projected
        kept = known and known.variables.get(module._position)
        if not kept or kept[0] != key or kept[1] != scaling:
            variables = self._variables(module, x)
            if variables is None:
                return None
            kept = variables[module._position]
        return few.linear(x, weight, bias, kept[2], lora_b)

    def _variables(self, asked: NSRULinear, x: Tensor) -> Variables | None:
        """s Ā of each member as a variable of the graph; None where it cannot be kept."""
        modules = self.modules()
        if requested_backend(asked.backend) not in few.BACKENDS:
            return None
        if asked not in modules:  # a copy of one
            return None
        lora_as = tuple([held(m, "lora_A") for m in modules])
        for module, lora_a in zip(modules, lora_as, strict=True):
            if module._subspace != asked._subspace or module.backend != asked.backend:
                return None
            # Shards of FSDP and ZeRO; in inference mode edits are not counted.
            if type(lora_a) not in _PLAIN or lora_a.shape != (module.rank, module.in_features):
                return None
            if lora_a.is_inference() or lora_a.device != x.device or comes_and_goes(lora_a):
                return None
        basis = asked.basis
        known = self.current(x.dtype, lora_as, basis)
        scalings = [module.scaling for module in modules]
        kept = known.value, scalings, basis, gram_inverse_of(basis)
        with torch.inference_mode(False), torch.enable_grad():
            variables = KeptProjection.apply(kept, *lora_as)
        for i, (lora_a, variable) in enumerate(zip(lora_as, variables, strict=True)):
            known.variables[i] = projection_key(x.dtype, (lora_a,), basis), scalings[i], variable
        return known.variables

    def compute(
        self,
        modules: Sequence[NSRULinear],
        operands: Sequence[Operands],
        x: Tensor,
        frozen: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Outputs of these members; ``frozen`` is x Wᵀ + b of a single one that has it already."""
        dense = isinstance(x, Tensor) and x.layout is torch.strided
        if not dense or x.is_nested or x.is_quantized:
            check_dense("NSRULinear", x=x)
        first = modules[0]
        basis = first._subspace[0]._buffers["basis"] if first._subspace else None
        weights, biases, lora_as, lora_bs, scalings = zip(*operands, strict=True)
        projected = None
        together = len(modules) == len(self._members)
        # Where the graph is recorded it has to project by itself. So does a member out of its
        # group, for once; with dropout it always is, and takes its rows of what is kept.
        if (
            (together or self.obstacle == _DROPOUT)
            and not torch.compiler.is_compiling()
            and not x.is_meta
            and not lora_as[0].is_meta
            and self._members[first._position]() is first  # not a replica of DataParallel
            and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
            and not any(map(Tensor.is_inference, lora_as))  # whose edits are not counted
        ):
            device = x.device.type
            dtype = compute_dtype(x) if torch.is_autocast_enabled(device) else x.dtype
            members = modules if together else self.modules()
            of_all = lora_as if together else tuple([held(m, "lora_A") for m in members])
            projected = self.current(dtype, of_all, basis).value
            if not together:
                start = sum([m.rank for m in members[: first._position]])
                projected = projected[start : start + first.rank]
        dropout_p = first.dropout if first.training else 0.0
        if frozen is not None:
            update = projected_update(
                frozen, x, lora_as[0], lora_bs[0], basis, projected, scalings[0], dropout_p,
                first.backend,
            )  # fmt: skip
            return (update,)
        return projected_linears(
            x, weights, lora_as, lora_bs, basis, biases, projected, scalings, dropout_p,
            first.backend,
        )  # fmt: skip

    def _obstacle_to(
        self,
        modules: list[NSRULinear],
        operands: list[Operands],
        asked: NSRULinear,
        x: Tensor,
    ) -> str | None:
        """The reason against computing these together now; None if there is none."""
        if asked not in modules:
            return "not a member, but a copy of one"
        # Writes to an inference tensor are not counted, and a subclass may mean anything.
        if type(x) not in _PLAIN or x.is_inference():
            return "x cannot be watched"
        subspace, dtype, dropping = asked._subspace, operands[0][0].dtype, False
        for module, own in zip(modules, operands, strict=True):
            if not module.enabled or module._buffers["_unmerged_weight"] is not None:
                return "adapters are off or merged"
            if module._subspace != subspace or module.backend != asked.backend:
                return "different bases or backends"
            n, k, r = module.out_features, module.in_features, module.rank
            for tensor, shape in zip(own[:4], ((n, k), (n,), (r, k), (n, r)), strict=True):
                if tensor is None:
                    continue
                # FSDP and ZeRO hold shards, or nothing, until the module itself is called.
                if type(tensor) not in _PLAIN or tensor.shape != shape or comes_and_goes(tensor):
                    if module is asked:
                        refuse_shards(module)
                    return "weights are sharded"
                if tensor.is_inference():
                    return "edits of weights made in inference mode are not counted"
                if tensor.device != x.device:
                    return "on different devices"
            if own[0].dtype != dtype:
                return "weights of different dtypes"
            dropping = dropping or (module.dropout > 0 and module.training)
        return _DROPOUT if dropping else None


class _Waiting:
    """Outputs of a group that its members have yet to take."""

    def __init__(
        self,
        group: LinearGroup,
        x: Tensor,
        modules: list[NSRULinear],
        operands: list[Operands],
        ys: tuple[Tensor, ...],
        taken: int,
    ) -> None:
        self.group, self.context, self.hooks = group, _context(x), _saving_hooks(True)
        # With the tensors that the state names, so that nothing else gets their identities.
        self.outputs = {
            i: (ys[i], _state(modules[i], operands[i]), operands[i])
            for i in range(len(ys))
            if i != taken
        }
        # By a weak reference, so that no cycle delays the release of the outputs.
        self.x = weakref.ref(x, functools.partial(_release, weakref.ref(self)))

    def take(self, position: int, module: NSRULinear, x: Tensor) -> Tensor | None:
        """The output of ``module``, if it is still what would come out; None otherwise."""
        y, state, _ = self.outputs.pop(position)
        if not self.outputs:
            _slot.waiting = None
        if self.x() is not x or self.context != _context(x):
            return None
        if state != _state(module, module.operands()):
            return None
        # A backward that ran has freed what this one needs.
        return None if getattr(y.grad_fn, "spent", False) else y


class _Slot(threading.local):
    """The one group this thread is in the middle of, over all models: bounds what may stay."""

    waiting: _Waiting | None = None


_slot = _Slot()


def _release(waiting: weakref.ref[_Waiting], _: object) -> None:
    if (alive := waiting()) is not None:
        # The context names the graph that x came from.
        alive.outputs, alive.context = {}, ()


def _context(x: Tensor) -> tuple:
    """State that an output depends on besides the values of x and its module."""
    stream = None
    if x.is_cuda:
        stream = torch.cuda.current_stream(x.device), torch.cuda.is_current_stream_capturing()
    return (
        x._version,
        x.data_ptr(),
        x.shape,
        x.stride(),
        x.requires_grad,
        x.grad_fn,  # itself, not its identity, which another could get
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        not x.is_meta and torch.is_autocast_enabled(x.device.type) and compute_dtype(x),
        steps.count,
        stream,
    )


def _state(module: NSRULinear, operands: Operands) -> tuple:
    """State of a module that its output depends on."""
    basis = module._subspace[0]._buffers["basis"] if module._subspace else None
    state: list = [
        module.enabled,
        module._buffers["_unmerged_weight"] is None,
        module.training,
        module.dropout,
        module.alpha,
        module.rank,
        module.backend,
    ]
    for tensor in (*operands[:4], basis):
        if tensor is not None:
            version = 0 if tensor.is_inference() else tensor._version
            state += (id(tensor), tensor.data_ptr(), version, tensor.requires_grad)
    return tuple(state)
