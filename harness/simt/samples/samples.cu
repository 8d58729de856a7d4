// All samples as one translation unit: the headers cost more time than the kernels.
#include "bugs.cu"
#include "gemm.cu"
#include "tensor_core_gemm.cu"
#include "warp.cu"
