"""What a CUDA graph can hold, on a stand-in for a GPU's streams."""

import contextlib
import types

import pytest
import torch

from nsru_bench import linear, timing
from nsru_bench.cases import TINY, Provider, make_operands

GPU = torch.device("cuda", 0)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """Streams without a GPU. As on one, kernels on another stream than the captured one end the
    capture, and PyTorch's allocator must then be told."""
    state = types.SimpleNamespace(current=Stream(), captured=None, pool=None, replays=0)

    @contextlib.contextmanager
    def stream(side):
        before, state.current = state.current, side
        yield
        state.current = before

    @contextlib.contextmanager
    def graph(made, stream=None):
        before = state.current
        state.current = state.captured = state.pool = stream or Stream()
        try:
            yield
            state.pool = None
        finally:
            state.current, state.captured = before, None

    class Graph:
        def pool(self):
            return state.pool

        def replay(self):
            state.replays += 1

    class Event:
        def __init__(self, **options):
            pass

        def elapsed_time(self, end):
            return 1.0

        record = synchronize = lambda self: None

    def end(device, pool):
        assert pool is state.pool
        state.pool = None

    stand_ins = {
        "Stream": Stream, "stream": stream, "graph": graph, "CUDAGraph": Graph, "Event": Event,
        "current_stream": lambda device=None: state.current, "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda device: None, "memory_allocated": lambda device: 0,
        "max_memory_allocated": lambda device: 0,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    side = Stream()
    monkeypatch.setattr(timing, "_side_stream", lambda device: side)
    monkeypatch.setattr(linear, "side_stream", lambda device: timing.side_stream(GPU))
    return state


def kernel_on(gpu, stream):
    if gpu.captured not in (None, stream):
        raise RuntimeError("cudaErrorStreamCaptureImplicit")


def provider(gpu):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.stream = gpu.current
            kernel_on(gpu, ctx.stream)
            return 2 * x

        @staticmethod
        def backward(ctx, dy):  # autograd goes back on the stream of the forward
            kernel_on(gpu, ctx.stream)
            return 2 * dy

    return Provider(lambda x: [Twice.apply(x) @ torch.ones(64, 96)])


@pytest.mark.parametrize("which", linear.PASSES)
def test_every_pass_is_captured(gpu, which, capsys):
    calls = linear.calls(make_operands(TINY, torch.float32), provider(gpu), which, 2)
    timed = timing.interleaved({"ours": calls}, GPU, rounds=2, warmup=1)
    assert timed["ours"].method == "graph"
    assert gpu.replays == 3
    assert not capsys.readouterr().out


def test_what_cannot_be_captured_is_named_and_leaves_the_allocator_as_it_was(gpu, capsys):
    elsewhere = Stream()
    timed = timing.interleaved({"stray": [lambda: kernel_on(gpu, elsewhere)]}, GPU, rounds=2)
    assert timed["stray"].method == "events"
    assert "stray is timed by events" in capsys.readouterr().out
    assert gpu.pool is None
