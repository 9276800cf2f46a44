"""SubspaceSet: the retain subspaces of a model, their diagnostics and their folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nsru_kernels.files import check_fields, read_json, whole_folder
from nsru_kernels.nn.experts import NSRUExpertLinear
from nsru_kernels.nn.names import plain_name, unwrap
from nsru_kernels.nn.subspace import ENERGY_SLACK, RetainSubspace
from nsru_kernels.text_table import align_columns

_SCHEMA = 1
_INDEX = "index.json"
_SAMPLES = 1024
# Captured energy from which on nothing of the data is left outside.
ALL = 0.999
# Editability under which steps would have to be so large that other knowledge feels them.
LITTLE = 0.01


@dataclasses.dataclass
class InputDiagnostics:
    """One distinct linear input: what was retained of it, and what is left open for unlearning.

    Attributes:
        name: the first module that reads it.
        modules: every target module that reads it.
        in_features: K.
        rank: Q.
        captured_energy: Σ_{i<=Q} λ̂_i / trace, a certified lower bound.
        editability: ‖P x_f‖²/‖x_f‖² over the forget set, of unit tokens where these were asked for;
            None without one.
        rank_limited: the request could not be met with the directions that were found.
        tokens: retain tokens seen.
        spectrum: λ̂_i / trace of every direction of the sketch, also beyond Q.
        editability_by_rank: editability at rank 0, 1, ... len(spectrum); None without a forget set.
    """

    name: str
    modules: list[str]
    in_features: int
    rank: int
    captured_energy: float
    editability: float | None
    rank_limited: bool
    tokens: int
    spectrum: list[float]
    editability_by_rank: list[float] | None = None

    @property
    def room(self) -> float:
        """Editability; 1 where it was not measured."""
        return 1.0 if self.editability is None else self.editability

    @property
    def separation(self) -> float | None:
        """`separation` of this input; None without a forget set."""
        return separation(self.captured_energy, self.editability)


def separation(captured_energy: float, editability: float | None) -> float | None:
    """The openness of what is to be forgotten, in times that of what is retained, from below.

    editability / (1 - captured energy), the latter counted as at most 0.9999. Near 1 the null space
    cannot tell the two apart, whatever its rank, and a projection protects little.
    """
    return None if editability is None else editability / max(1 - captured_energy, 1e-4)


class SubspaceSet(dict[str, RetainSubspace]):
    """Module name → RetainSubspace; modules that read the same input share one object.

    Attributes:
        inputs: one InputDiagnostics per distinct input, in model order.
        fingerprint: of the weights that the activations came from.
        read_elsewhere: name → reason of linears that were left out, because an adapter would have
            no effect there; empty after a load.
    """

    def __init__(
        self,
        subspaces: Mapping[str, RetainSubspace],
        inputs: list[InputDiagnostics],
        fingerprint: str,
        read_elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(subspaces)
        self.inputs = inputs
        self.fingerprint = fingerprint
        self.read_elsewhere = dict(read_elsewhere or {})

    def alphas(self, alpha: float) -> dict[str, float]:
        """Module name → alpha / √editability, for `swap_linears(alpha_pattern=...)`.

        AdamW moves A and B by lr whatever the gradient's size, so what an update adds to the output
        of a forget token goes with ‖P x‖. Divided by √editability it is, at the same lr, what it
        would be without a projection; where less than 1 % is open, ten times alpha. alpha itself
        where editability was not measured.
        Longer names come first, because a name stands for every module that ends in it.
        """
        alphas = {
            name: alpha / max(entry.room, LITTLE) ** 0.5
            for entry in self.inputs
            for name in entry.modules
        }
        return {name: alphas[name] for name in sorted(alphas, key=len, reverse=True)}

    def table(self, most: int | None = None) -> str:
        """The diagnostics as aligned text, one line per distinct input.

        Args:
            most: lines; of more inputs the first are shown, and in what range all are.
        """
        header = (
            "input", "modules", "K", "rank", "captured", "editability", "separation", "tokens",
        )  # fmt: skip
        rows = [header]
        for entry in self.inputs[:most]:
            editability = "-" if entry.editability is None else f"{entry.editability:.2%}"
            apart = "-" if entry.separation is None else f"{entry.separation:.1f}"
            rows.append(
                (
                    entry.name,
                    str(len(entry.modules)),
                    str(entry.in_features),
                    f"{entry.rank}{'*' if entry.rank_limited else ''}",
                    f"{entry.captured_energy:.2%}",
                    editability,
                    apart,
                    str(entry.tokens),
                )
            )
        lines = align_columns(rows)
        if most is not None and len(self.inputs) > most:
            lines.append(f"… and {len(self.inputs) - most} more. {self._ranges()}")
        limited = [entry.captured_energy for entry in self.inputs if entry.rank_limited]
        if any(captured >= ALL for captured in limited):
            lines.append(
                "* all that the retain data has there is protected, and the rule would allow more: "
                "more data, of more kinds, would protect more."
            )
        if any(captured < ALL for captured in limited):
            lines.append(
                "* where less than all is captured, the sketch holds no more: raise width, up to K."
            )
        return "\n".join(lines)

    def _ranges(self) -> str:
        """In what range the inputs are, in words."""
        ranks = [entry.rank for entry in self.inputs]
        shares = {
            "captured": [entry.captured_energy for entry in self.inputs],
            "editability": [e.editability for e in self.inputs if e.editability is not None],
        }
        parts = [f"rank {min(ranks)} to {max(ranks)}"]
        parts += [f"{n} {min(v):.2%} to {max(v):.2%}" for n, v in shares.items() if v]
        if times := [entry.separation for entry in self.inputs if entry.separation is not None]:
            parts.append(f"separation {min(times):.1f} to {max(times):.1f}")
        return f"All: {', '.join(parts)}."

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError when the weights of `model` are not those the subspaces came from.

        Adapters do not count: a swapped model passes as long as its frozen weights are the same.
        """
        found = fingerprint_weights(model)
        if found != self.fingerprint:
            raise ValueError(
                f"the model's weights (fingerprint {found}) differ from those that the retain "
                f"subspaces were estimated on ({self.fingerprint}); load that model, or estimate "
                f"the subspaces again.{dtype_hint(model, self.fingerprint)}"
            )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write one safetensors file per distinct input and index.json, with the SHA-256 of each.

        The folder appears complete or not at all; a folder of an earlier save is replaced. The
        digests tell what was mixed up or damaged, not what was forged.

        Raises: ValueError: `folder` exists and holds something else.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / _INDEX).exists():
            raise ValueError(
                f"save: {folder} holds other files; remove it, or give an empty or new folder."
            )
        with whole_folder(folder) as complete:
            entries, digests = [], {}
            for number, entry in enumerate(self.inputs):
                file = f"{number}.safetensors"  # names of modules are no names of files
                self[entry.name].save(complete / file)
                entries.append(dataclasses.asdict(entry) | {"file": file})
                digests[entry.name] = _sha256(complete / file)
            index = {
                "schema": _SCHEMA,
                "kind": "retain-subspaces",
                "fingerprint": self.fingerprint,
                "inputs": entries,
                "sha256": digests,
            }
            (complete / _INDEX).write_text(json.dumps(index, indent=1))

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> SubspaceSet:
        """Read a folder of `save`.

        Raises:
            FileNotFoundError: the folder has no index.json.
            ValueError: the index or a file of it is damaged, missing or of another version.
        """
        folder = Path(folder)
        path = folder / _INDEX
        if not path.is_file():
            raise FileNotFoundError(
                f"SubspaceSet.load: {folder} has no {_INDEX}; give a folder that SubspaceSet.save "
                "or `nsru subspace` wrote."
            )
        index = read_json(path)
        if index.get("kind") != "retain-subspaces" or index.get("schema") != _SCHEMA:
            raise ValueError(
                f"SubspaceSet.load: {path} must be of kind 'retain-subspaces', schema {_SCHEMA}; "
                f"got {index.get('kind')!r}, {index.get('schema')!r}."
            )
        index.setdefault("sha256", {})  # of a folder of before there were digests
        check_fields(
            path, index, {"fingerprint": str, "inputs": list[dict], "sha256": dict[str, str]}
        )
        subspaces: dict[str, RetainSubspace] = {}
        inputs = []
        for found in index["inputs"]:
            entry, file = _read_entry(path, found)
            if not (folder / file).is_file():
                raise ValueError(
                    f"SubspaceSet.load: {folder / file} is missing; remove {folder} and estimate "
                    "again."
                )
            subspace = RetainSubspace.load(folder / file, device)
            for name in ("in_features", "rank", "tokens"):
                if getattr(entry, name) != getattr(subspace, name):
                    raise ValueError(
                        f"SubspaceSet.load: {path} gives {name}={getattr(entry, name)} for "
                        f"{entry.name}, {folder / file} {getattr(subspace, name)}; estimate again."
                    )
            own, digests = subspace.spectrum(), index["sha256"]
            shares = [
                *zip(own, entry.spectrum, strict=False),
                (subspace.captured_energy, entry.captured_energy),
            ]
            if (digests and digests.get(entry.name) != _sha256(folder / file)) or any(
                not math.isclose(share, noted, abs_tol=1e-6) for share, noted in shares
            ):
                raise ValueError(
                    f"SubspaceSet.load: {folder / file} is not what {path} describes as that of "
                    f"{entry.name}: it was changed, or taken from another input. Copy the folder "
                    "again, or estimate again."
                )
            if entry.name not in entry.modules or not subspaces.keys().isdisjoint(entry.modules):
                raise ValueError(
                    f"SubspaceSet.load: {path}: modules of {entry.name} must hold it and nothing "
                    "of another input; estimate again."
                )
            inputs.append(entry)
            subspaces.update(dict.fromkeys(entry.modules, subspace))
        return cls(subspaces, inputs, index["fingerprint"])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_entry(path: Path, found: dict[str, typing.Any]) -> tuple[InputDiagnostics, str]:
    """An input's diagnostics and the name of its file, from an index that anyone may have made."""
    found = {"editability_by_rank": None} | found
    fields = typing.get_type_hints(InputDiagnostics) | {"file": str}
    check_fields(path, found, fields)
    if unknown := sorted(found.keys() - fields.keys()):
        raise ValueError(f"SubspaceSet.load: {path} has an unknown entry {unknown[0]!r}.")
    file = found.pop("file")
    if not re.fullmatch(r"[\w-][\w.-]*", file):  # a path could lead anywhere
        raise ValueError(
            f"SubspaceSet.load: {path}: file must be the plain name of a file in its folder, got "
            f"{file!r}."
        )
    entry = InputDiagnostics(**found)
    shares = [entry.captured_energy, entry.editability, *entry.spectrum]
    for share in shares + (entry.editability_by_rank or []):
        if share is not None and not 0 <= share <= 1 + ENERGY_SLACK:
            raise ValueError(
                f"SubspaceSet.load: {path}: shares of energy of {entry.name} must be in [0, 1], "
                f"got {share}."
            )
    return entry, file


def dtype_hint(model: nn.Module, wanted: str) -> str:
    """A sentence where float16 may be all by which the model's weights are not the wanted ones."""
    if fingerprint_weights(model, torch.float16) == wanted:
        return " Only the dtype differs: load this model in float16."
    if any(weight.dtype == torch.float16 for weight in model.parameters()):
        return (
            " float16 rounds weights in a way of its own: if this is the same model, load it in "
            "the dtype it had then, float32 or bfloat16."
        )
    return ""


def plain_parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor by its name, or those that one of torchao is made of: numbers, scales, zero points.

    Entries of the others cannot be had.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return {name: tensor}
    parts: dict[str, Tensor] = {}
    for part in tensor.__tensor_flatten__()[0]:
        parts |= plain_parts(f"{name}.{part}", getattr(tensor, part))
    return parts


def fingerprint_weights(model: nn.Module, rounded_to: torch.dtype | None = None) -> str:
    """A hash over names, shapes and evenly spaced entries of the weights, adapters left out.

    They are of all rows and columns, so that no edit of a part of a matrix goes by unseen.

    Entries are compared in bf16, so that a model loaded in fp32 or bf16 has the same fingerprint;
    at most 1024 of a tensor are read, so that it takes milliseconds, and a fine-tuned copy of the
    model differs in thousands of them. rounded_to tells what it would be in another dtype.
    """
    digest = hashlib.sha256()
    named = unwrap(model).named_modules()
    experts = {f"{plain_name(n)}.weight" for n, m in named if isinstance(m, NSRUExpertLinear)}
    weights: dict[str, Tensor] = {}
    weight: Tensor
    for name, weight in unwrap(model).named_parameters():
        if "lora_" in name:
            continue
        name = plain_name(name)
        if name in experts:
            name = name.removesuffix(".weight")
        name = ".".join(part for part in name.split(".") if part != "base_layer")  # adapted layers
        weights |= plain_parts(name, weight)
    for name, weight in sorted(weights.items()):
        dense = weight if weight.layout is torch.strided else weight.to_dense()
        flat = dense.detach().resolve_neg().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        while math.gcd(step, flat.numel()) > 1:  # else all may be of one column
            step += 1
        sample = flat[::step].to("cpu", rounded_to).to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
