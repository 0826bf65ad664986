"""Gives what is freed back to the system."""

import ctypes
import platform

#: ``M_MMAP_THRESHOLD`` of glibc's ``malloc.h``.
_MMAP_THRESHOLD = -3
#: Bytes of a block that has pages of its own.
_LARGE = 2**17


def return_freed_memory() -> None:
    """Has this process give large blocks of memory back as soon as they are freed, from now on.

    glibc takes blocks of up to 32 MB from a heap once larger ones have been freed: the codes of a 4-bit layer
    are put between what quantising it needs for a moment, and the holes stay. Other C libraries are left as
    they are.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)
