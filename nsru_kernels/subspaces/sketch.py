"""RetainSketch: the top eigenvectors of XᵀX from one pass over X, in O(K·L) memory."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from nsru_kernels.checks import check_dense, check_mask, check_range
from nsru_kernels.dispatch.precision import full_float32
from nsru_kernels.nn.subspace import RetainSubspace
from nsru_kernels.ops.sketch import energy_limit, update_sketch
from nsru_kernels.ops.sketch.reference import token_energy
from nsru_kernels.subspaces.distributed import all_reduce_sketch
from nsru_kernels.subspaces.factors import eigen_moment, left_singular, nystrom_factor, rotate

_logger = logging.getLogger("nsru_kernels")

# fp32 accumulators join the fp64 masters after this many batches: a few massive channels put
# λ_1/λ_Q above 1e6, where a longer fp32 sum would lose the small directions.
_FOLD_EVERY = 256
# Largest ‖X‖² of one batch: beyond it _FOLD_EVERY batches could overflow fp32.
_MAX_BATCH_ENERGY = energy_limit(torch.float32)
# Below this ‖X‖² squares of entries may vanish in fp32: such a batch is lifted, unless so much is
# held already that it does not count.
MIN_ENERGY = 2.0**-60


class RetainSketch:
    """Streaming estimate of the uncentred second moment XᵀX of a linear layer's input.

    Recursive Nyström. With a test matrix Ω [K, L], Y = Σ Xᵀ S and H = Σ Sᵀ S for S = round(X Ω),
    the estimate Y H⁻¹ Yᵀ is positive semi-definite and never above XᵀX, so its eigenvalues are a
    certified lower bound of the captured energy. Every `refresh_every` tokens Ω is replaced by an
    orthonormal basis of the estimate, which brings the residual energy at L = Q + 64 from about
    1.2 times the optimum to 1.03. Refreshes happen at fixed token counts (batches are split there),
    so the way a stream is cut into batches does not matter.

    Sketches of parts of a stream merge. On the benchmark's spectra the residual energy is then at
    most 1.05 times that of one sketch of the whole stream, for two to eight parts; what is not
    certified as captured grows by at most 1.05 for two parts and 1.1 for eight.

    When L > K/4 the K x K second moment itself is exact and cheaper; `route` then is "covariance"
    instead of "nystrom", and every rank up to K is available.

    Args:
        in_features: K.
        width: L, the wanted rank plus oversampling; rank + 64 is a good choice.
        refresh_every: tokens between refreshes; None means 16·L, and L, 2·L, 4·L and 8·L at first,
            when any basis is better than random signs. A refresh takes 10·K·L² FLOP in fp64, 16 %
            of the FLOP of 16·L tokens.
        seed: of the random test matrix.
        device: where activations will arrive; None means CPU.

    Examples:
        >>> sketch = RetainSketch(256, 32)
        >>> sketch.update(torch.randn(8, 100, 256), mask=torch.rand(8, 100) > 0.1)
        >>> sketch.finalize(rank=16).basis.shape
        torch.Size([256, 16])
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        *,
        refresh_every: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("in_features", in_features), ("width", width)):
            check_range(f"RetainSketch: {name}", value, "must be ≥ 1", whole=True)
        if refresh_every is not None and refresh_every < width:
            raise ValueError(
                f"RetainSketch: refresh_every must be at least width={width} tokens, got "
                f"{refresh_every}; fewer tokens cannot fill the sketch. None means 16·width."
            )
        self.in_features = in_features
        self.width = width
        self.refresh_every = 16 * width if refresh_every is None else refresh_every
        self._early = refresh_every is None
        self.seed = seed
        # Through a tensor, so that "cuda" becomes the "cuda:0" that activations report.
        self.device = torch.empty(0, device="cpu" if device is None else device).device
        self.route = "covariance" if 4 * width > in_features else "nystrom"
        _logger.debug("RetainSketch: K=%d, L=%d: %s route", in_features, width, self.route)
        self.trace = 0.0
        self.tokens = 0
        self.refreshes = 0
        self.segment_tokens = 0  # since the last refresh
        self.pending = 0  # batches in the fp32 accumulators
        if self.route == "covariance":
            self._fp64 = {"moment": self._zeros(in_features, in_features)}
        else:
            self._fp64 = {"y": self._zeros(in_features, width), "h": self._zeros(width, width)}
            signs_KL = torch.randint(
                0, 2, (in_features, width), generator=self._generator(), device="cpu"
            )
            # A power of two near K^-1/2: exact in bf16, and |x Ω| is of the size of ‖x‖, so that
            # rounding S to fp16 does not overflow.
            scale = 2.0 ** -round(math.log2(in_features) / 2)
            self._omega_KL = ((2 * signs_KL - 1) * scale).to(self.device, torch.bfloat16)
        self._fp32 = {name: value.float() for name, value in self._fp64.items()}

    def __repr__(self) -> str:
        return (
            f"RetainSketch(in_features={self.in_features}, width={self.width}, "
            f"route={self.route!r}, tokens={self.tokens}, device={str(self.device)!r})"
        )

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch of activations: XᵀX += Σ xᵀ x over the tokens that `mask` keeps.

        Args:
            x: [..., K], any floating dtype.
            mask: [...] like x without its last dimension; bool, or whole numbers as in
                `attention_mask`: 0 leaves the token out, which may hold anything, NaN included.

        Raises:
            TypeError: x is not floating.
            ValueError: shape or device do not fit, mask holds fractions or negative numbers, or a
                kept token has NaN or infinite entries.
                The sketch is then as it was before the call.

        Activations of any size are taken: tiny ones are scaled for the sums, by a power of two.
        """
        x_MK, keep_M, count = self._tokens_of(x, mask)
        if count == 0:
            return
        one_pass = self.route == "nystrom" and count <= self._room()
        if one_pass:  # the op leaves the accumulators alone where the energy is bad
            total = self._add(x_MK, keep_M).item()
        else:  # a refresh cannot be undone, so the whole batch is looked at before the first
            x_MK, keep_M = _compact(x_MK, keep_M), None
            total = _token_energy(x_MK).sum().item()
        if not total < _MAX_BATCH_ENERGY:
            raise ValueError(_describe_bad_tokens(_compact(x_MK, keep_M)))
        lift = 1.0
        if max(total, self.trace) < MIN_ENERGY:
            x_MK, lift = lifted(_compact(x_MK, keep_M))
            total = _token_energy(x_MK).sum().item() / lift**2
        if lift != 1.0:
            for accumulator in self._fp32.values():  # they hold no more than what vanished
                accumulator.zero_()
        if one_pass and lift == 1.0:
            self._count_tokens(count)
        elif self.route == "covariance":
            wide_MK = x_MK.float()
            with full_float32(x_MK.device):
                self._fp32["moment"].addmm_(wide_MK.T, wide_MK)
            self._count_batch(lift)
        else:
            while x_MK.shape[0]:
                room = self._room()
                part_MK, x_MK = x_MK[:room], x_MK[room:]
                self._add(part_MK, None)
                self._count_tokens(part_MK.shape[0], lift)
        self.trace += total
        self.tokens += count

    def merge(self, other: RetainSketch) -> RetainSketch:
        """XᵀX += that of `other`; `other` stays as it is.

        Nyström factors are put side by side and shrunk to the top L directions, so the result still
        never exceeds the summed second moment.

        Returns: self.
        Raises: ValueError: in_features or width differ.
        """
        if (other.in_features, other.width) != (self.in_features, self.width):
            raise ValueError(
                f"merge: sketches must have equal in_features and width, got {self!r} and "
                f"{other!r}."
            )
        if other.tokens:
            trace, tokens = self.trace + other.trace, self.tokens + other.tokens
            if self.route == "covariance":
                moment_KK = self.moment() + other.moment().to(self.device)
                self.restart_from_moment(moment_KK, trace, tokens)
            else:
                factor_KF = torch.cat([self.factor(), other.factor().to(self.device)], dim=1)
                self.restart_from_factor(factor_KF, trace, tokens)
        return self

    @torch.no_grad()
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Merge the sketches of all ranks of `group`; every rank ends with the same sketch.

        Call it once, after the last `update`: a second call would count every token again. Ranks
        may hold different numbers of tokens, none included. Nyström factors travel pairwise up a
        tree, which takes log2(ranks) messages of K·L numbers.

        Raises:
            RuntimeError: no process group is initialised.
            ValueError: in_features or width differ between ranks (raised on all of them).
        """
        all_reduce_sketch(self, group)

    def finalize(self, rank: int | None = None, energy: float | None = None) -> RetainSubspace:
        """The retain subspace seen so far; the sketch can go on afterwards.

        Args:
            rank: Q directions.
            energy: the smallest rank whose certified energy reaches this share of the trace.
                Without either, every direction that the sketch holds.

        Returns: a RetainSubspace; its `rank_limited` says that the request could not be met.
        Raises: ValueError: no tokens, both arguments, or a rank beyond the width.
        """
        if self.tokens == 0:
            raise ValueError("finalize: the sketch holds no tokens; update() it first.")
        limit = self.in_features if self.route == "covariance" else self.width
        if rank is not None and rank > limit:
            raise ValueError(
                f"finalize: rank={rank} is beyond what the sketch holds ({limit}, {self.route} "
                f"route); make it with width={rank + 64}."
            )
        if self.route == "covariance":
            basis_KL, eigenvalues = eigen_moment(self.moment())
        else:
            basis_KL, eigenvalues = left_singular(self.factor())
        whole = RetainSubspace(
            basis_KL.float(), eigenvalues.cpu(), trace=self.trace, tokens=self.tokens
        )
        return whole if rank is None and energy is None else whole.truncate(rank, energy)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit-identically; ints, floats and copies of tensors."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _CONFIG + _COUNTERS}
        state |= {f"{name}.fp64": value.clone() for name, value in self._fp64.items()}
        state |= {f"{name}.fp32": value.clone() for name, value in self._fp32.items()}
        if self.route == "nystrom":
            state["omega"] = self._omega_KL.clone()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state by one from `state_dict()` of a sketch made with the same arguments.

        Raises:
            ValueError: missing or unknown entries, another configuration, or wrong shapes. The
                sketch is then as it was before the call.
        """
        mine = self.state_dict()
        if mine.keys() != state.keys():
            raise ValueError(
                f"load_state_dict: entries must be {sorted(mine)}, got {sorted(state)}; the state "
                f"is of another route or version."
            )
        for name, value in mine.items():
            if name in _CONFIG and state[name] != value:
                raise ValueError(
                    f"load_state_dict: {name} is {state[name]} in the state but {value} here; make "
                    f"the sketch with the arguments of the saved one."
                )
            if isinstance(value, Tensor):
                theirs = torch.as_tensor(state[name])
                if theirs.shape != value.shape or theirs.dtype != value.dtype:
                    raise ValueError(
                        f"load_state_dict: {name} must be {tuple(value.shape)} {value.dtype}, got "
                        f"{tuple(theirs.shape)} {theirs.dtype}."
                    )
        for name in _COUNTERS:
            setattr(self, name, state[name])
        for kind, accumulators in (("fp64", self._fp64), ("fp32", self._fp32)):
            for name, accumulator in accumulators.items():
                accumulator.copy_(state[f"{name}.{kind}"])
        if self.route == "nystrom":
            self._omega_KL.copy_(state["omega"])

    def moment(self) -> Tensor:
        """XᵀX [K, K] in fp64 (covariance route)."""
        return self._fp64["moment"] + self._fp32["moment"]

    def factor(self) -> Tensor:
        """F [K, at most L] in fp64 with F Fᵀ the estimate of XᵀX (Nyström route)."""
        y_KL, h_LL = (self._fp64[name] + self._fp32[name] for name in ("y", "h"))
        return nystrom_factor(y_KL, h_LL)

    def restart_from_moment(self, moment_KK: Tensor, trace: float, tokens: int) -> None:
        """Make the state stand for a given second moment (covariance route)."""
        self._fp64["moment"].copy_(moment_KK)
        self._fp32["moment"].zero_()
        self.pending = 0
        self.trace, self.tokens = trace, tokens

    def restart_from_factor(self, factor_KF: Tensor, trace: float, tokens: int) -> None:
        """Make the state stand for the top L directions of F Fᵀ (Nyström route)."""
        self._restart(factor_KF.to(self.device))
        self.trace, self.tokens = trace, tokens

    def _tokens_of(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """x as [M, K], which rows to keep (None for all of them), and how many these are."""
        check_dense("update", x=x)
        if not x.is_floating_point():
            raise TypeError(f"update: x must have a floating dtype, got {x.dtype}.")
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"update: x must be [..., K={self.in_features}], got {tuple(x.shape)}."
            )
        if x.device != self.device:
            raise ValueError(
                f"update: x is on {x.device} but the sketch on {self.device}; make the sketch with "
                f"device={str(x.device)!r}."
            )
        x_MK = x.reshape(-1, self.in_features)
        rows = x_MK.shape[0]
        if mask is None:
            return x_MK, None, rows
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"update: mask must be {tuple(x.shape[:-1])} like x without its last dimension, "
                f"got {tuple(mask.shape)}."
            )
        check_mask("update: mask", mask)
        keep_M = mask.reshape(-1).to(self.device, torch.bool)
        count = int(keep_M.sum())
        return x_MK, None if count == rows else keep_M, count

    def _add(self, x_MK: Tensor, keep_M: Tensor | None) -> Tensor:
        return update_sketch(x_MK, self._omega_KL, self._fp32["y"], self._fp32["h"], keep_M)

    def _room(self) -> int:
        """Tokens to the next refresh.

        Were the first as rare as the later ones, random signs would sketch a large part of a short
        stream or of what a rank sees, and a merge does not mend that.
        """
        earlier = max(0, 4 - self.refreshes) if self._early else 0
        return max(0, (self.refresh_every >> earlier) - self.segment_tokens)

    def _count_tokens(self, count: int, lift: float = 1.0) -> None:
        self._count_batch(lift)
        self.segment_tokens += count
        if not self._room():
            self._restart(self.factor())
            self.refreshes += 1

    def _count_batch(self, lift: float = 1.0) -> None:
        self.pending += 1
        if self.pending == _FOLD_EVERY or lift != 1.0:
            self._fold(lift)

    def _fold(self, lift: float = 1.0) -> None:
        """Empty the fp32 accumulators of what was lifted by this factor."""
        for name, master in self._fp64.items():
            master.add_(self._fp32[name], alpha=lift**-2)
            self._fp32[name].zero_()
        self.pending = 0

    def _restart(self, factor_KF: Tensor) -> None:
        """Make Ω a basis of the factor's top L directions, and let the state stand for them.

        The factor's columns act as L rows of data whose second moment is the estimate so far.
        """
        factor_KF = rotate(factor_KF)[:, : self.width]
        basis_KF = factor_KF / torch.linalg.vector_norm(factor_KF, dim=0)
        missing = self.width - basis_KF.shape[1]
        if missing:
            # Directions not seen yet: random, and blind to those already held, so that massive
            # directions do not drown in the rounding of S what these should find.
            fresh_KF = torch.randn(
                self.in_features,
                missing,
                dtype=torch.float64,
                generator=self._generator(),
                device="cpu",
            ).to(self.device)
            fresh_KF -= basis_KF @ (basis_KF.T @ fresh_KF)
            basis_KF = torch.cat([basis_KF, torch.linalg.qr(fresh_KF).Q], dim=1)
        self._omega_KL = basis_KF.to(torch.bfloat16)
        s_FL = factor_KF.T @ self._omega_KL.double()
        self._fp64 = {"y": factor_KF @ s_FL, "h": s_FL.T @ s_FL}
        for accumulator in self._fp32.values():
            accumulator.zero_()
        self.segment_tokens = self.pending = 0

    def _generator(self) -> torch.Generator:
        # On the CPU for every device, and derived from the count, so that a resumed run agrees.
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.refreshes)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)


_CONFIG = ("in_features", "width", "refresh_every", "seed", "route")
_COUNTERS = ("trace", "tokens", "refreshes", "segment_tokens", "pending")


def lifted(x_MK: Tensor) -> tuple[Tensor, float]:
    """x times a power of two that brings its largest entry near 1, in fp32 at most, and that power.

    Raises: ValueError: its squares vanish in fp64, too.
    """
    largest = x_MK.abs().max().item()
    if not largest:
        return x_MK, 1.0
    if largest < 2.0**-500:
        raise ValueError(
            f"x is {largest:.3g} at most, and its squares vanish in fp64; scale the activations up "
            "(the subspace does not depend on the scale)."
        )
    lift = 2.0 ** -math.frexp(largest)[1]
    dtype = torch.float32 if x_MK.dtype == torch.float64 else x_MK.dtype
    return (x_MK.double() * lift).to(dtype), lift


def _compact(x_MK: Tensor, keep_M: Tensor | None) -> Tensor:
    return x_MK if keep_M is None else x_MK[keep_M]


def _token_energy(x_MK: Tensor) -> Tensor:
    return token_energy(x_MK.float())


def _describe_bad_tokens(x_MK: Tensor) -> str:
    bad_M = ~x_MK.isfinite().all(dim=1)
    count = int(bad_M.sum())
    if count:
        return (
            f"update: x has NaN or infinite entries in {count} of {x_MK.shape[0]} kept tokens "
            f"(first: {int(bad_M.int().argmax())}); mask them, or check the model for overflow."
        )
    return (
        f"update: the squared norm of x, {_token_energy(x_MK).max().item():.3g} for one token, "
        f"overflows fp32 accumulators; scale the activations down (the subspace does not depend on "
        f"the scale)."
    )
