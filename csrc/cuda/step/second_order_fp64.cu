#include "cuda/step/second_order_instantiate.cuh"

template struct fused_rnn::cuda::SecondOrderKernels<fused_rnn::cuda::MathKind::kFp64>;
