"""nvcc's PTX of the CUDA kernels, interpreted on the CPU."""
