#include "cuda/persistent/grid_instantiate.cuh"

template struct fused_rnn::cuda::GridKernels<fused_rnn::cuda::MathKind::kTf32>;
