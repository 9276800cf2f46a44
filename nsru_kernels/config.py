"""Every environment variable that the package reads at run time.

``NSRU_BACKEND``: what ``backend="auto"`` means: ``auto`` (default), ``eager``, ``triton`` or
``cuda``.
"""

import os

BACKENDS = ("eager", "triton", "cuda")


def requested_backend(backend: str) -> str:
    """``backend`` itself, or ``NSRU_BACKEND`` where the caller left the choice open."""
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("NSRU_BACKEND", "auto"), "NSRU_BACKEND"
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{source} must be 'auto' or one of {BACKENDS}, got {backend!r}.")
    return backend
