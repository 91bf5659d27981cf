// What nodes of autograd keep of lists of tensors.
#pragma once
#include <torch/csrc/autograd/saved_variable.h>

#include <vector>

#include "torch/tensors.h"

namespace fused_rnn {

inline std::vector<torch::autograd::SavedVariable> saved_variables(at::TensorList tensors) {
  std::vector<torch::autograd::SavedVariable> result;
  result.reserve(tensors.size());
  for (const Tensor& t : tensors) result.emplace_back(t, false);
  return result;
}

inline std::vector<Tensor> unpacked(const std::vector<torch::autograd::SavedVariable>& saved) {
  std::vector<Tensor> result;
  result.reserve(saved.size());
  for (const torch::autograd::SavedVariable& t : saved) result.push_back(t.unpack());
  return result;
}

}  // namespace fused_rnn
