#include "torch/families_cuda.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>

#include "torch/settings.h"

namespace fused_rnn {
namespace {

// By device: a bit for each family.
using Families = std::array<std::atomic<unsigned>, 128>;
Families refused{}, excluded{};

// -1: the simulated device's tensors are those of a CPU.
std::atomic<unsigned>& of_device(Families& families, int device) { return families.at(device < 0 ? 0 : device); }

constexpr unsigned bit_of(Family family) { return 1u << static_cast<int>(family); }

}  // namespace

bool is_captured() { return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None; }
bool captures_without_cooperative_launches() {
  return is_captured() && !cuda::conditional_graphs_take_cooperative_launches();
}

FamilyChoice family_choice(int device, const Recipe& recipe) {
  FamilyChoice choice = family_setting();
  choice.preferred = family_of(recipe);
  for (std::optional<Family>* one : {&choice.forced, &choice.preferred}) {
    if (*one && traits_of(**one).stacks) one->reset();  // this is a layer
  }
  choice.refused = of_device(refused, device);
  choice.excluded = of_device(excluded, device);
  if (captures_without_cooperative_launches()) choice.refused |= bit_of(Family::kGrid);
  return choice;
}

FamilyChoice without_x(FamilyChoice choice) {
  for (Family family : kFamilies) {
    if (!traits_of(family).reads_x) continue;
    choice.excluded |= bit_of(family);
    if (choice.preferred == family) choice.preferred.reset();
    if (choice.forced == family) choice.forced.reset();
  }
  return choice;
}

void exclude_families(const std::vector<Family>& families, int device) {
  unsigned bits = 0;
  for (Family family : families) bits |= bit_of(family);
  of_device(excluded, device) = bits;
}

void family_was_refused(Family family, int device, const LaunchRefused& caught) {
  if (family_setting().forced == family) throw caught;
  const unsigned before = of_device(refused, device).fetch_or(bit_of(family));
  if (before & bit_of(family)) return;
  TORCH_WARN("fused_rnn: kernel family ", to_string(family), " does not serve on device ", device,
             " any more, which refused its launch (", caught.what(), "); the next family does");
}

}  // namespace fused_rnn
