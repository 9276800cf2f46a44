"""Projections whose kernels are compiled without a GPU."""

import functools

import torch

from nsru_kernels.ops.project.triton import project_many, write_table


def project(adapter, basis, K=4096, Q=256, R=16):
    a_RK = torch.empty(R, K, dtype=adapter, device="meta")
    basis_KQ = torch.empty(K, Q, dtype=basis, device="meta")
    gram_inverse_QQ = None if basis == torch.float32 else torch.empty(Q, Q, device="meta")
    return project_many([a_RK], [basis_KQ], [gram_inverse_QQ])


CALLS = [
    *(
        functools.partial(project, adapter, basis)
        for adapter in (torch.float32, torch.bfloat16)
        for basis in (torch.float32, torch.bfloat16, torch.float16)
    ),
    functools.partial(project, torch.float32, torch.float32, K=130, Q=70),
    functools.partial(project, torch.float16, torch.bfloat16, K=130, Q=70),
    lambda: write_table(torch.arange(20), torch.device("meta")),
]
