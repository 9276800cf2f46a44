"""Every environment variable that the package reads at run time.

``NSRU_BACKEND``: what ``backend="auto"`` means: ``auto`` (default), ``eager``, ``cpu``, ``triton``
or ``cuda``.
``NSRU_AUTOTUNE=1``: Triton kernels time their configs on first use instead of taking the first.
``TRITON_INTERPRET=1``: Triton's own switch; its kernels then run, slowly, on CPU tensors.
"""

import os

BACKENDS = ("eager", "cpu", "triton", "cuda")


class BackendUnavailable(RuntimeError):  # noqa: N818 - a public name of the design
    """The backend asked for by name cannot serve here; the message says why and what to do."""


def requested_backend(backend: str) -> str:
    """``backend`` itself, or ``NSRU_BACKEND`` where the caller left the choice open."""
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("NSRU_BACKEND") or "auto", "NSRU_BACKEND"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{source} must be 'auto' or one of {BACKENDS}, got {backend!r}.")
    return backend


def autotune() -> bool:
    """True where Triton configs are timed instead of taken from the table."""
    return os.environ.get("NSRU_AUTOTUNE") == "1"


def interpreting() -> bool:
    """True where Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
