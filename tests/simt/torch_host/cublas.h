// Between the stand-in for cuBLAS and who runs the simulator's backend.
#pragma once
#include "cuda/library_product.h"

namespace fused_rnn::cuda {

// What makes the products of family `gemm`: csrc/torch/gemm_cuda.cpp's.
LibraryProductFunction library_product();

// After a call of the simulator's backend: raises what one of its products has raised.
void rethrow_of_product();

}  // namespace fused_rnn::cuda
