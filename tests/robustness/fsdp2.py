"""``nsru`` as on GPUs: accelerate takes FSDP's settings, which it leaves aside on a CPU."""

import gc
import sys

from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from nsru_train.cli import main

_init = state.AcceleratorState.__init__


def _init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if "fsdp_plugin" in self.__dict__:
        self.distributed_type = DistributedType.FSDP


state.AcceleratorState.__init__ = _init_with_fsdp
main(sys.argv[1:])
assert any(isinstance(found, FSDPModule) for found in gc.get_objects())
