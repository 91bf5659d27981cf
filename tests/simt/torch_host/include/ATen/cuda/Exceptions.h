// Stand-in for torch's header.
#pragma once
#include <c10/util/Exception.h>
#include <cublas_v2.h>

#define TORCH_CUDABLAS_CHECK(EXPR)                                                                           \
  do {                                                                                                       \
    const cublasStatus_t status_of_call = EXPR;                                                              \
    TORCH_CHECK(status_of_call == CUBLAS_STATUS_SUCCESS, "CUDA error: cuBLAS status ", int{status_of_call}); \
  } while (0)
