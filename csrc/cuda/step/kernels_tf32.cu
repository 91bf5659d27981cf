#include "cuda/step/instantiate.cuh"

template struct fused_rnn::cuda::Kernels<fused_rnn::cuda::MathKind::kTf32>;
