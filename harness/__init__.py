"""What runs CUDA kernels without a GPU: simt compiles them for the CPU, ptx interprets what nvcc makes of them."""
