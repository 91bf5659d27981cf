#include "cuda/block/block_instantiate.cuh"

template struct fused_rnn::cuda::BlockKernels<fused_rnn::cuda::MathKind::kTf32>;
