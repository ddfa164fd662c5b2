"""What another extension of the package uses of this one: the kernels, and the count of parallel regions."""

from .kernels cimport fmb_kernels

cdef const fmb_kernels *kernels_for(int isa, int dtype) noexcept
cdef void enter_region() noexcept nogil
cdef void leave_region() noexcept nogil
