"""The host's memory as XLA asks for it: large pieces, freed after each call and wanted again by the next."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of mallopt, in glibc's malloc.h


def give_back() -> None:
    """Once give back what is free, as after programs were compiled: that takes more than they do. With glibc alone."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed(*, one_pool: bool) -> bool:
    """Have malloc keep what is freed; whether it does, which is glibc's alone to do.

    Without, a large piece goes back to the system when it is freed, and the next call's is mapped and cleared anew, a
    page at a time: a fifth of the time of a training step of 3 million parameters on two cores.

    `one_pool`: for all threads, where large pieces are asked for by others too. It comes before JAX starts its threads,
    since who has asked before keeps a pool of its own. Small pieces, of which each worker asks for many, are then asked
    for in turns: a sixth of the time of an update by PPO in a process that has compiled it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = [(_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), *([(_ARENA_MAX, 1)] if one_pool else [])]
    return all(mallopt(name, value) == 1 for name, value in settings)
