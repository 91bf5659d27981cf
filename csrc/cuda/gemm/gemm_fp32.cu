#include "cuda/gemm/pointwise_instantiate.cuh"

template struct fused_rnn::cuda::PointwiseKernels<fused_rnn::cuda::MathKind::kFp32>;
