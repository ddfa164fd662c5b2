"""What another extension of the package uses of this one: the kernels."""

from .kernels cimport fmb_kernels

cdef const fmb_kernels *kernels_for(int isa, int dtype) noexcept
