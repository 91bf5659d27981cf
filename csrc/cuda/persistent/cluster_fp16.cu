#include "cuda/persistent/cluster_instantiate.cuh"

template struct fused_rnn::cuda::ClusterKernels<fused_rnn::cuda::MathKind::kFp16>;
