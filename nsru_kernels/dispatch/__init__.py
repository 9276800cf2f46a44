"""The choice of a backend: ``config`` reads the environment, ``plans`` the measured tables,
``choice`` decides, ``explain`` prints. Ops describe themselves to it; nothing here knows an op
but ``explain``, which is therefore not imported from here."""

from nsru_kernels.dispatch.choice import Op, choose, default_device
from nsru_kernels.dispatch.config import BackendUnavailable

__all__ = ["BackendUnavailable", "Op", "choose", "default_device"]
