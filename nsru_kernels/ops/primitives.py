"""Device functions that kernels of several ops share."""

import triton
import triton.language as tl


@triton.jit
def take_ticket(counter_ptr):
    """The next work item of a persistent grid, in order of asking.

    Items that wait for others must have larger numbers than those: whoever holds a number knows
    that all smaller ones are held by running programs, so waiting cannot deadlock, whatever the
    number of programs that fit on the device.
    """
    return tl.atomic_add(counter_ptr, 1, sem="relaxed")


@triton.jit
def signal(flag_ptr):
    """Count this program at ``flag_ptr`` once all it stored is visible to who waits there."""
    tl.debug_barrier()  # the release below covers the stores of every warp
    return tl.atomic_add(flag_ptr, 1, sem="release")


@triton.jit
def wait_for(flag_ptr, count):
    """Wait until ``count`` programs have signalled; what they stored can then be loaded."""
    while tl.atomic_add(flag_ptr, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def kept(seed, row_offsets, column_offsets, row_length, dropout_p):
    """Which elements of x dropout keeps: a function of seed and position alone (Philox 4x32-10)."""
    offsets = row_offsets.to(tl.int64)[:, None] * row_length + column_offsets[None, :]
    return tl.rand(seed, offsets) >= dropout_p
