#include "torch/families_cuda.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>

#include "torch/settings.h"

namespace fused_rnn {
namespace {

std::array<std::atomic<unsigned>, 128> refused{};  // by device: a bit for each family

// -1: the simulated device's tensors are those of a CPU.
std::atomic<unsigned>& refused_by(int device) { return refused.at(device < 0 ? 0 : device); }

constexpr unsigned bit_of(Family family) { return 1u << static_cast<int>(family); }

}  // namespace

FamilyChoice family_choice(int device) {
  FamilyChoice choice = family_setting();
  choice.refused = refused_by(device);
  // Nothing tells a conditional body from another graph.
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None &&
      !cuda::conditional_graphs_take_cooperative_launches()) {
    choice.refused |= bit_of(Family::kGrid);
  }
  return choice;
}

void family_was_refused(Family family, int device, const LaunchRefused& caught) {
  if (family_setting().forced == family) throw caught;
  const unsigned before = refused_by(device).fetch_or(bit_of(family));
  if (before & bit_of(family)) return;
  TORCH_WARN("fused_rnn: kernel family ", to_string(family), " does not serve on device ", device,
             " any more, which refused its launch (", caught.what(), "); the next family does");
}

}  // namespace fused_rnn
