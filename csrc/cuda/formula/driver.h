// The compiled kernels of a formula on the devices of this process, through CUDA's driver, which is loaded at run time: no
// CUDA header, no library to link. A file of fused_rnn/formula/cuda.py has one line of integers, then the machine code.
#pragma once
#include <array>
#include <atomic>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/formula/scan.h"
#include "plan/plan.h"

namespace fused_rnn::cuda {

class FormulaModule {
 public:
  // Throws std::runtime_error if the file was not made for this version.
  explicit FormulaModule(const std::string& path);
  FormulaModule(const FormulaModule&) = delete;
  FormulaModule& operator=(const FormulaModule&) = delete;

  const FormulaTraits& traits() const { return traits_; }
  DType dtype() const { return dtype_; }
  int capability() const { return capability_; }  // 10 * major + minor of the devices that it runs on

  // Kernels of the same formula from another file, which is this one's from now on.
  void add(FormulaModule* other) {
    FormulaModule* last = this;
    while (last->next_) last = last->next_;
    last->next_ = other;
  }

  // Launches on a stream of the device. The code is loaded at the first call for a device. Throws LaunchRefused where the
  // device does not take a launch, else std::runtime_error, with the driver's words.
  FormulaLauncher launcher(int device, void* stream);

  // Whether the kernels of a persistent family serve, as those of `step` do: not before they have been verified. kForced:
  // they do with so many blocks of a team where they can, for the verification.
  enum class Serves { kUnverified, kForced, kVerified };
  void set_family(Family family, Serves state, int ranks) {
    ranks_ = ranks;
    serves_.at(static_cast<int>(family)) = state;
  }
  // The device has refused a launch of the family, which does not serve there any more. Returns whether it did before.
  bool refuse(Family family, int device) {
    const unsigned bit = 1u << static_cast<int>(family);
    return !(refused_.at(device < 0 ? 0 : device).fetch_or(bit) & bit);
  }
  // What a setting means with the families that serve on the device, and the blocks of a team, 0: those that the planner
  // takes.
  FamilyChoice choice(FamilyChoice setting, int device, int& ranks) const;

 private:
  struct Kernel {
    FormulaRole role;
    int segment;
    TileSize tile;
    std::string name;
  };
  using Functions = std::vector<void*>;  // in the order of kernels_

  void parse(const std::string& line);
  const Functions& functions_of(int device);
  size_t place_of(const FormulaLaunch& launch) const;  // among kernels_; their number if it is not there

  DType dtype_;
  int capability_;
  FormulaTraits traits_;
  std::vector<int> input_gradients_, phase_kinds_, forward_levels_, backward_levels_;
  std::vector<char> reads_series_;  // of bool, whose std::vector has no memory of its own
  std::vector<Kernel> kernels_;
  std::string code_;
  std::array<std::atomic<Serves>, std::size(kFamilies)> serves_{};  // kUnverified
  std::array<std::atomic<unsigned>, 128> refused_{};                // by device, a bit for each family
  std::atomic<int> ranks_{0};
  std::mutex mutex_;
  std::map<int, Functions> loaded_;  // by device; entries stay where they are
  std::atomic<FormulaModule*> next_{nullptr};
};

}  // namespace fused_rnn::cuda
