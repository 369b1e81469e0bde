"""The host's memory as XLA asks for it: large pieces, freed after each call and wanted again by the next."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of mallopt, in glibc's malloc.h


def keep_freed() -> bool:
    """Have malloc keep what is freed, in one pool for all threads; whether it does, which is glibc's alone to do.

    Without, a large piece goes back to the system when it is freed, and the next call's is mapped and cleared anew, a
    page at a time: a fifth of the time of a training step of 3 million parameters on two cores. Threads that have asked
    for memory before keep pools of their own, so it comes before JAX starts its threads.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(name, value) == 1 for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)))
