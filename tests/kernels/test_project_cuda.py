"""The projection by the CUDA extension: what test_project_kernels.py does not ask of both."""

import pytest
import torch
from linear_cases import make_basis

from nsru_kernels.ops.project import cuda, tables


@pytest.fixture
def launched(emulated, monkeypatch):
    """The arguments of every launch, which are changed by what the test leaves in ``changes``."""
    calls, changes = [], {}
    launch = emulated.launch_project

    def launch_project(**call):
        calls.append(call)
        launch(**{**call, **changes})

    monkeypatch.setattr(emulated, "launch_project", launch_project)
    return calls, changes


def project(dtype=torch.float32):
    return cuda.project_many([torch.ones(3, 32)], [make_basis(32, 16).to(dtype)], [None])[0]


@pytest.mark.parametrize(
    ("argument", "wrong", "reason"),
    [
        ("problems", 0, "problems=0 must be between 1 and"),
        ("rows", -2, "rows=-2 must be between 1 and"),
        ("items", 1 << 31, "items=2147483648 must be between 1 and"),
        ("items", 7, "table_size=19 must be 24: 11 values a problem"),
        ("table", 0, "table is a null pointer"),
        ("table", 4, "table must start at a multiple of 8 bytes, got address 4"),
        ("counters", 0, "counters is a null pointer"),
        ("counters_size", 2, "counters_size=2 is less than 3, the ticket and two"),
        ("workspace", 0, "workspace is a null pointer"),
        ("workspace", 8, "workspace must start at a multiple of 16 bytes, got address 8"),
        ("workspace_bytes", 1535, "workspace_bytes=1535 is less than 1536, two tiles"),
        ("adapter", "fp64", "adapter must be 'bf16' or 'fp16' or 'fp32', got 'fp64'"),
        ("basis", "int8", "basis must be 'bf16' or 'fp16' or 'fp32', got 'int8'"),
    ],
)
def test_refusals_name_the_argument_and_its_value(launched, argument, wrong, reason):
    calls, changes = launched
    project()
    assert (calls[0]["problems"], calls[0]["rows"], calls[0]["items"]) == (1, 3, 2)
    changes[argument] = wrong
    with pytest.raises(ValueError, match=reason):
        project()


def test_a_table_that_cannot_be_written_is_refused(emulated):
    table = torch.arange(3)
    call = {"values": table.data_ptr(), "size": 3, "table": table.data_ptr()}
    for argument, wrong, reason in (
        ("size", 0, "launch_write_table: size=0 must be between 1 and"),
        ("values", 0, "values is a null pointer"),
        ("table", 12, "table must start at a multiple of 8 bytes, got address 12"),
    ):
        with pytest.raises(ValueError, match=reason):
            emulated.launch_write_table(
                **{**call, argument: wrong}, device=0, stream=0, allocate=pytest.fail
            )


def test_tiles_are_those_of_the_kernel(launched):
    """Else items would be counted in other units than the kernel works them off in."""
    calls, _ = launched
    a, u = torch.ones(2 * cuda._TILES.rows + 1, 320), make_basis(320, 2 * cuda._TILES.out).float()
    projected = cuda.project_many([a], [u], [None])[0]
    assert calls[0]["items"] == 3 * (2 * 2 + 5)
    assert (projected @ u).abs().max() < 1e-5


def test_each_pair_of_dtypes_takes_one_launch_and_unaligned_problems_another(launched):
    calls, _ = launched
    u = make_basis(32, 16)
    bases = [u.float(), u.bfloat16(), u.float(), u[:, :5].float().contiguous()]
    cuda.project_many([torch.ones(3, 32)] * 4, bases, [None] * 4)
    kinds = [(c["adapter"], c["basis"], c["aligned"], c["problems"]) for c in calls]
    assert kinds == [
        ("fp32", "fp32", True, 2), ("fp32", "bf16", True, 1), ("fp32", "fp32", False, 1)
    ]  # fmt: skip


def test_three_products_lose_no_more_than_float32(emulated):
    """A full basis leaves nothing of A but errors; cut instead of rounded operands lose 7e-7."""
    a, u = torch.randn(4, 128), make_basis(128, 128).float()
    assert cuda.project_many([a], [u], [None])[0].norm() < 3e-7 * a.norm()


def test_order_does_not_change_the_result(emulated, monkeypatch):
    """Sums are added in the order of their parts, whoever makes them when."""
    a, u = torch.randn(20, 576), make_basis(576, 80).float()
    expected = cuda.project_many([a], [u], [None])[0]
    schedule = tables.schedule

    def shuffled(sizes, tiles, lag):
        plan = schedule(sizes, tiles, lag)
        along = 3 * 2  # chunks, tiles of columns
        order = torch.cat([torch.randperm(along), along + torch.randperm(len(plan.items) - along)])
        return plan._replace(items=plan.items[order])

    monkeypatch.setattr(tables, "schedule", shuffled)
    for _ in range(3):
        assert torch.equal(cuda.project_many([a], [u], [None])[0], expected)
