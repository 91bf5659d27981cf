#pragma once

struct MadeUp {
  int device, capability, compiled_for;
  int largest;  // size of a cluster; of larger ones, `error`
  int error;    // a cudaError_t
  int none;     // a size of which none runs at once
  int fits;     // blocks of an SM
};
extern MadeUp made_up;

// Whether the current device, the capture mode and the error state are those of the start.
bool as_before();
