// The CUDA kernels without torch, for the first run on a device. One program, linked statically: build.py builds it on a
// machine without a GPU, and it is carried to one with.
//   first check FAMILY [small|large] [REPEATS]  forward and backward of every cell and arithmetic against float64, and
//                                               REPEATS (20) further runs that must have the same bits
//   first time FAMILY [T]                       us of a step, in a stream and as a replayed CUDA graph
//   first pdl | coop | meet                     what the kernels rely on (runtime.cuh)
// FAMILY: single, step, grid, cluster, block, gemm (with products by plain_product.cu, which is slow: its times say nothing)
// or cheapest. Exit status: 0 all right, 1 wrong, 2 an error, 3 a hang of 20 s.
#include <csignal>

#include "runtime.cuh"

namespace {

torch_free::Checker checker;

void on_alarm(int) {
  const char text[] = "HANG: 20 s in ";
  (void)!write(1, text, sizeof text - 1);
  (void)!write(1, checker.current.c_str(), checker.current.size());
  (void)!write(1, "\n", 1);
  _exit(3);
}

int run(const std::string& what, const std::string& family, const std::string& third, const std::string& fourth) {
  const fused_rnn::DeviceInfo& d = fused_rnn::cuda::device_info(0);
  std::printf("compute capability %d, %d SMs, code for %d, clusters at once of 2 4 8 16 blocks: %d %d %d %d\n",
              d.compute_capability, d.sm_count, d.compiled_for, d.active_clusters[2], d.active_clusters[4],
              d.active_clusters[8], d.active_clusters[16]);
  checker.current = what;
  if (what == "check") {
    const int repeats = fourth.empty() ? 20 : std::stoi(fourth);
    torch_free::check_family(checker, fused_rnn::parse_choice(family), third == "large", repeats);
  } else if (what == "time") {
    torch_free::time_family(checker, fused_rnn::parse_choice(family), third.empty() ? 256 : std::stoi(third));
  } else if (what == "pdl") {
    checker.wrong += !torch_free::dependent_launches();
  } else if (what == "coop") {
    torch_free::cooperative_side_by_side();
  } else if (what == "meet") {
    torch_free::cooperative_meet();
  } else {
    std::printf("what: expected check, time, pdl, coop or meet, got '%s'\n", what.c_str());
    return 2;
  }
  std::printf("%s: %d right, %d wrong\n", what.c_str(), checker.right, checker.wrong);
  return checker.wrong > 0;
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i) { return std::string(i < argc ? argv[i] : ""); };
  std::signal(SIGALRM, on_alarm);
  alarm(torch_free::kCaseSeconds);
  try {
    return run(argument(1), argument(2), argument(3), argument(4));
  } catch (const std::exception& error) {
    std::printf("ERROR %s: %s\n", checker.current.c_str(), error.what());
    return 2;
  }
}
