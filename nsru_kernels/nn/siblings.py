"""Siblings: linears that read the same x, found by watching their calls, then served together.

Who reads the same x is observed, never guessed. In a first forward each member works alone while
the handle notes which are called with the same tensor object in a row. From the next forward on the
first of them computes the outputs of all through ``nsru_linear_group`` and the others pick theirs
up, if nothing that PyTorch counts has changed in between. It does not count writes through
``.data`` or NumPy between the calls of siblings: for those, ``swap_linears(..., siblings=False)``.

Gradient checkpointing repeats a forward and expects it to save the same tensors. So the groups
change only while no checkpointed forward of the members waits for its backward, and calls from
inside a backward neither teach nor count as misses: a repeated forward may stop early.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from nsru_kernels.nn.sibling_state import context_of, obstacle, state_of, tensors_of
from nsru_kernels.ops.linear import compute_dtype
from nsru_kernels.ops.linear_group import projected_linear_group

if TYPE_CHECKING:
    from nsru_kernels.nn.linear import NSRULinear

    Member = weakref.ref[NSRULinear]
    Group = tuple[Member, ...]

# Absent this often when its group was computed, a member works alone for good. Once is forgiven:
# an exception between the calls looks the same.
_STRIKES = 2
# The hooks that see what a forward saves; non-reentrant checkpointing is one.
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_CANDIDATES = "candidates to be served together"
_DIFFERENT = "worked alone: called with different tensors"


class _Run(threading.local):
    """The members called in a row with one tensor in this thread; x is held weakly."""

    x: weakref.ref[Tensor] | None = None
    context: tuple = ()
    members: Group = ()


class _Pending:
    """Outputs of a group that its members have yet to pick up."""

    def __init__(self, siblings: Siblings, group: Group, x: Tensor, context: tuple):
        self.siblings, self.group, self.context = siblings, group, context
        # With the tensors that the state names, so that nothing else gets their identities.
        self.outputs: dict[Member, tuple[Tensor, tuple, tuple]] = {}
        # By a weak reference, so that no cycle delays the release of the outputs.
        self.x = weakref.ref(x, functools.partial(_drop_weakly, weakref.ref(self)))

    def drop(self) -> None:
        """Release what nobody fetched."""
        absent, self.outputs = tuple(self.outputs), {}
        if absent and not _in_backward(self.context):
            self.siblings._strike(absent)


class _Slot(threading.local):
    """The one group this thread is in the middle of, over all models: bounds what may stay."""

    pending: _Pending | None = None


_slot = _Slot()


class Siblings:
    """The handle that candidates share: linears of one parent, one width and one basis."""

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[NSRULinear, str] = weakref.WeakKeyDictionary()
        self._called: set[Member] = set()
        self._strikes: dict[Member, int] = {}
        self._wanted: list[Group] = []  # as observed
        self._groups: list[Group] = []  # in force; follows once no forward may be repeated
        self._served: set[Group] = set()
        self._reasons: dict[Group, str] = {}  # why a group worked alone the last time
        self._stacks: dict[Group, tuple[list[Tensor], Tensor]] = {}
        self._nodes: weakref.WeakSet[BackwardCFunction] = weakref.WeakSet()  # may be repeated
        self._nodes_lock = threading.RLock()
        self._run = _Run()

    def __reduce__(self):
        # A copied or unpickled model shares one new handle, which learns anew; modules add
        # themselves.
        return Siblings, ()

    def add(self, module: NSRULinear, name: str) -> None:
        """Make ``module`` a candidate; ``name`` is for the report."""
        self._names[module] = name

    def status(self) -> list[tuple[str, str]]:
        """(names, what happened to them so far), from the live state."""
        self._learn(self._run.members)
        lines: list[tuple[str, str]] = []
        rest = {weakref.ref(module): name for module, name in self._names.items()}
        for group in self._wanted:
            names = [rest.pop(member, "") for member in group]
            reason = self._reasons.get(group)
            if reason is not None:
                state = f"worked alone: {reason}"
            elif group in self._served:
                state = "served together"
            else:
                state = "read the same tensor, served together from the next forward on"
            lines.append(("+".join(names), state))
        for state in (_DIFFERENT, _CANDIDATES):
            names = [n for m, n in rest.items() if (m in self._called) == (state == _DIFFERENT)]
            if names:
                lines.append(("+".join(names), state))
        return lines

    def call(self, module: NSRULinear, x: Tensor) -> Tensor:
        """``module(x)``, for it alone or with those that will be called with this x too."""
        member = weakref.ref(module)
        # Writes to an inference tensor are not counted, and a subclass may mean anything.
        if type(x) not in (Tensor, nn.Parameter) or x.is_inference() or module not in self._names:
            return module.forward_alone(x)
        context = context_of(x)
        repeated = _in_backward(context)
        y = self._pick_up(member, module, x, context)
        if not repeated:
            self._observe(member, x, context)
        if y is not None:
            return y
        if self._wanted is not self._groups and self._settled():
            self._groups, self._stacks = self._wanted, {}
        group = next((group for group in self._groups if member in group), None)
        if group is None:
            return self._alone(module, x, repeated)
        modules = [m for m in (other() for other in group) if m is not None]
        reason = obstacle(modules, x) if len(modules) == len(group) else "a member is gone"
        if reason is not None:
            self._reasons[group] = reason
            return self._alone(module, x, repeated)
        return self._together(member, group, modules, x, context)

    def _pick_up(
        self, member: Member, module: NSRULinear, x: Tensor, context: tuple
    ) -> Tensor | None:
        """What a sibling's call computed for this one, if it is still what would come out."""
        pending = _slot.pending
        if pending is None or member not in pending.group:
            return None
        if member not in pending.outputs:
            pending.drop()  # its second call: another forward has begun
            return None
        y, state, _ = pending.outputs.pop(member)
        same = pending.x() is x and context == pending.context and state == state_of(module)
        if same and (y.grad_fn is None or _waits(y.grad_fn)):
            return y
        if not _in_backward(context):
            self._strike((member,))
        return None

    def _alone(self, module: NSRULinear, x: Tensor, repeated: bool) -> Tensor:
        y = module.forward_alone(x)
        if not repeated:
            self._note_node(y)
        return y

    def _together(
        self, member: Member, group: Group, modules: list[NSRULinear], x: Tensor, context: tuple
    ) -> Tensor:
        if _slot.pending is not None:
            _slot.pending.drop()
            _slot.pending = None
        ys = projected_linear_group(
            x,
            [m.weight for m in modules],
            [m.lora_A for m in modules],
            [m.lora_B for m in modules],
            modules[0].basis,
            [m.bias for m in modules],
            self._folded(group, modules, compute_dtype(x)),
            [m.scaling for m in modules],
            modules[0].backend,
        )
        self._served.add(group)
        self._reasons.pop(group, None)
        if not _in_backward(context):
            self._note_node(ys[0])
        pending = _Pending(self, group, x, context)
        for other, module, y in zip(group, modules, ys, strict=True):
            pending.outputs[other] = (y, state_of(module), tensors_of(module))
        y, *_ = pending.outputs.pop(member)
        _slot.pending = pending
        return y

    def _folded(self, group: Group, modules: list[NSRULinear], dtype: torch.dtype) -> Tensor | None:
        """The members' folds on top of each other, stacked again only when one of them changed."""
        parts = [module._folds.folded(module, dtype) for module in modules]
        folds = [part for part in parts if part is not None]
        if len(folds) < len(parts):
            return None
        known = self._stacks.get(group)
        if known is None or any(a is not b for a, b in zip(known[0], folds, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                known = self._stacks[group] = (folds, torch.cat(folds))
        return known[1]

    def _observe(self, member: Member, x: Tensor, context: tuple) -> None:
        run = self._run
        same = run.x is not None and run.x() is x and run.context == context
        if same and member not in run.members:
            run.members += (member,)
            return
        self._learn(run.members)
        self._called.add(member)
        run.x, run.context, run.members = weakref.ref(x), context, (member,)

    def _learn(self, run: Group) -> None:
        """Want ``run`` as a group, unless that contradicts another one."""
        self._called.update(run)
        found = tuple(member for member in run if self._strikes.get(member, 0) < _STRIKES)
        others = [group for group in self._wanted if not set(group) <= set(found)]
        if len(found) > 1 and not any(set(group) & set(found) for group in others):
            wanted = [*others, found]
            if {frozenset(group) for group in wanted} != {frozenset(g) for g in self._wanted}:
                self._wanted = wanted

    def _strike(self, absent: Group) -> None:
        """``absent`` did not call for outputs computed for them: their groups end."""
        for member in absent:
            self._strikes[member] = self._strikes.get(member, 0) + 1
        self._wanted = [group for group in self._wanted if not set(group) & set(absent)]

    def _note_node(self, y: Tensor) -> None:
        hooked = _saving_hooks is None or _saving_hooks(True) is not None
        if hooked and isinstance(y.grad_fn, BackwardCFunction):
            with self._nodes_lock:
                self._nodes.add(y.grad_fn)

    def _settled(self) -> bool:
        """Whether no forward waits for a backward that may repeat it."""
        with self._nodes_lock:
            return not any(_waits(node) for node in self._nodes)


def _drop_weakly(pending: weakref.ref[_Pending], _: object) -> None:
    if (alive := pending()) is not None:
        alive.drop()


def _in_backward(context: tuple) -> bool:
    return context[0] >= 0


def _waits(node: Any) -> bool:
    """Whether a backward can still come; does not unpack what was saved."""
    try:
        _ = node._raw_saved_tensors
    except RuntimeError:  # freed by a backward
        return False
    return True
