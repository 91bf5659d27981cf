// Training in a graph that torch.compile records: the ops fused_rnn::stack and stack_backward, each a whole stack by one
// family, cuDNN among them, which is chosen when the graph runs.
//
// A recorded graph has to know the shape of every tensor, and nobody knows beforehand how large cuDNN's reserve is, nor
// which family will run. So what forward saves is handed on as tensors of no elements, [0], whose memory is that of the
// saved tensors: the shapes that the graph is told are true, and the memory lives as long as the graph keeps these tensors.
// A copy of such a tensor (hooks that move saved tensors, say) has lost the memory; backward sees that by its size and runs
// forward once more.
#pragma once
#include "torch/ops.h"

namespace fused_rnn {

// Whether a stack's call is one that a graph records, trains, and may be cuDNN's.
bool serves_in_graph(const Call& stack);
// fused_rnn::rnn of such a call.
Results rnn_in_graph(const Call& stack);

}  // namespace fused_rnn
