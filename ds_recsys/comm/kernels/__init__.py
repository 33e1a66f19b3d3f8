"""Encoders in C, several times faster than torch and bit for bit the same; torch does the work where they cannot be built.

Plain C called through ctypes, not an op of DeepSpeed's op builder or torch's cpp_extension: those compile torch's headers
(40 s for DeepSpeed's own CPU op where this takes 1.3 s), need ninja, and when killed leave a lock that every later start
waits for.
"""

from ds_recsys.comm.kernels.native import Kernels, library
from ds_recsys.comm.kernels.throughput import throughput

__all__ = ["Kernels", "library", "throughput"]
