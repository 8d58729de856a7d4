"""The CPU harness of the CUDA kernels: C++ headers, and how to compile a kernel against them."""
