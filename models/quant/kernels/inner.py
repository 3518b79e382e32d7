"""How functions are compiled that only kernels call: without the ways in from Python and from C, each of which would hold all of the
function once more. `inlined` ones are put into their callers."""

from numba import njit

inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
inlined = njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
