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
def mix(bits):
    """Spread every bit of a 32-bit word over all of them (the finaliser of MurmurHash3)."""
    bits ^= bits >> 16
    bits *= 0x85EBCA6B
    bits ^= bits >> 13
    bits *= 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def kept(seed, rows, columns, dropout_p):
    """Mask [rows, columns] of the elements that dropout keeps: by seed and position alone.

    A hash instead of Philox: ten rounds of that at a GEMM's tile size spill registers.
    """
    seed = tl.cast(seed, tl.int64)  # a small one arrives in 32 bits
    key = mix(rows.to(tl.uint32) ^ seed.to(tl.uint32))
    key = mix(key + (seed >> 32).to(tl.uint32))
    bits = mix(key[:, None] ^ (columns.to(tl.uint32) * 0x9E3779B9)[None, :])
    return (bits >> 8).to(tl.float32) * (1.0 / (1 << 24)) >= dropout_p  # exact in float32


@triton.jit
def kept_scale(dropout_p):
    """1 / (1 - p); what is kept at p = 1 is nothing."""
    return 1.0 / tl.where(dropout_p < 1.0, 1.0 - dropout_p, 1.0)
