// Stand-in for torch's header. Whether a stream is being captured: what the environment variable says, for tests.
#pragma once
#include <cstdlib>

namespace c10::cuda {
enum class CaptureStatus : int { None = 0, Active = 1 };
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() {
  return std::getenv("TORCH_HOST_CAPTURES") ? CaptureStatus::Active : CaptureStatus::None;
}
}  // namespace c10::cuda
