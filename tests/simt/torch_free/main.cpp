// The checks of benchmarks/torch_free on the simulated device: `FAMILY [SHARE]`. SHARE is that of the allowed errors which
// is accepted: with 0 every case has to be wrong.
#include <csignal>

#include "../../../benchmarks/torch_free/check.h"

extern "C" {
void simt_reset();
void simt_seed(uint64_t);
void simt_device(const int* fields);
}

int main(int argc, char** argv) {
  const int h100[] = {90, 132, 227 * 1024, 228 * 1024, 65536, 2048, 16};
  simt_reset(), simt_seed(1), simt_device(h100);
  std::signal(SIGALRM, SIG_IGN);  // the simulator finds deadlocks itself, and takes its time
  torch_free::Checker checker;
  if (argc > 2) checker.of_the_allowed = std::stod(argv[2]);
  try {
    const fused_rnn::FamilyChoice choice = fused_rnn::parse_choice(argc > 1 ? argv[1] : "step");
    const int T = choice.forced == fused_rnn::Family::kSingle ? 1 : 3,
              H = choice.forced == fused_rnn::Family::kBlock ? 18 : 17;
    using fused_rnn::CellKind;
    using fused_rnn::DType;
    for (CellKind cell : {CellKind::kRnnTanh, CellKind::kLstm, CellKind::kGru}) {
      for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        checker.check({cell, dtype, false, T, 9, 5, H, 2, true, true, true, true}, choice, T == 1);
      }
    }
  } catch (const std::exception& error) {
    std::printf("ERROR %s: %s\n", checker.current.c_str(), error.what());
    return 2;
  }
  std::printf("%d right, %d wrong\n", checker.right, checker.wrong);
  return checker.wrong > 0;
}
