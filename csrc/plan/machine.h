// What the planners' cost model takes a GPU to be: every constant, once, and what follows from a device. No constant is a
// measurement of these kernels. Most are published figures for an H100; benchmarks/micro has a program for each that can be
// measured alone. fused_rnn/bench/floor.py reads them through machine_constants() of csrc/torch/plan_bindings.cpp.
#pragma once
#include <string>

#include "plan/device_info.h"
#include "plan/math_kind.h"

namespace fused_rnn {

constexpr double kClockGhz = 1.7;  // of the SMs, all generations

// Launches.
constexpr double kLaunchUs = 2.1;            // from one launch in a stream to the next
constexpr double kOverlappedLaunchUs = 1.3;  // the same with programmatic dependent launch
constexpr double kHostUs = 8;                // of the caller's thread: a matrix product or a launch, and its events

// Memory.
constexpr double kL2LatencyUs = 0.6;     // under load
constexpr double kL2BytesPerClock = 64;  // into one SM that reads alone
constexpr double kL2Share = 0.4;         // of that, into each SM while all read (5.5 TB/s on an H100)
constexpr double kSharedL2BytesPerClock = kL2BytesPerClock * kL2Share;
constexpr double kSmemBytesPerClock = 128;
constexpr int kReservedSmem = 1024;  // the system's share of a block's shared memory

// A step of the step kernels, beside launch and product: table, partial sums, pointwise part.
constexpr double kBlockUs = 0.5;

// A step of the persistent kernels. kStepUs, kClusterHandOffUs and kTurnsHandOffUs were read from the machine code (LSTM, 16
// bit, one row tile, sm_90a): the stall counts along the path of one warp, with 280 clocks for a load from L2 and 30 for one
// from shared memory.
constexpr double kStepUs = 0.4;             // partial sums, block barrier, pointwise part
constexpr double kL2HandOffUs = 0.75;       // a store and the load that sees it: 160 ns one way, 600 ns under load
constexpr double kClusterHandOffUs = 0.42;  // from a push to the next product; the push and its barrier alone take 0.25
constexpr double kTurnsHandOffUs = 0.27;    // the same where half of the threads load ahead meanwhile

// A step of family `block`, read from the machine code likewise (16 bit, sm_90a), beside its products: the instructions
// that a warp issues, some and more for each gate, and the latencies that remain along its path.
constexpr double kBlockForwardInstructions = 90, kBlockForwardGateInstructions = 55;
constexpr double kBlockBackwardInstructions = 100, kBlockBackwardGateInstructions = 65;
constexpr double kBlockForwardClocks = 190, kBlockBackwardClocks = 250;
constexpr int kSchedulers = 4;  // of an SM: each issues one instruction a clock

// A step of a formula of family `cluster`, by the dependent instructions of one product (a load from shared memory, mma.sync
// or multiply-adds).
constexpr double kFormulaTensorClocks = 45, kFormulaPlainClocks = 90;  // of a warp, a chunk of K of 16 weight rows
constexpr double kFormulaNormUs = 0.18;                                // a norm's sums of a row by shuffles
constexpr double kFormulaPassUs = 0.2;                                 // a further pass over the elements with its barrier
constexpr double kFormulaElementUs = 0.08;                             // a further element of a thread in a pass
// Of an exchange, beside kClusterHandOffUs: the barrier between the own part and its pushes; bytes that reach a block.
constexpr double kFormulaGatherUs = 0.1, kFormulaClusterBytesPerClock = 32;

// The least that a step of cuDNN's algorithms takes, published for an H100.
constexpr double kCudnnForwardUs = 7, kCudnnBackwardUs = 10;                          // standard
constexpr double kCudnnPersistentForwardUs = 1.96, kCudnnPersistentBackwardUs = 3.1;  // persistent
// Small-H: 0.45 to 2.3 us forward. How it depends on the size is not published; the model takes it to grow with the weights,
// since these stay on one SM.
constexpr double kCudnnSmallestUs = 0.45, kCudnnLargestUs = 2.3;
constexpr double kCudnnSmallBackward = 1.5;  // backward to forward

// "9.0" of 90.
std::string capability_text(int capability);

// Multiply-adds per clock and SM of the step kernels and of matrix products.
double math_rate(cuda::MathKind math, const DeviceInfo& device);
// The same of mma.sync with weights in registers, as the persistent kernels issue it.
double persistent_math_rate(cuda::MathKind math, const DeviceInfo& device);
// The same at the datasheet's rate, for an H100.
double peak_math_rate(cuda::MathKind math);

// Microseconds of a matrix product [rows, inputs] x [inputs, columns] by a library, beside its launch.
double matrix_product_us(cuda::MathKind math, double rows, double inputs, double columns, const DeviceInfo& device);

// Microseconds that one read of `bytes` takes which every step reads again, where L2 is smaller than they are: it keeps what
// was read last, so each step finds nothing of them. 0 where they stay in L2.
double dram_us(double bytes, const DeviceInfo& device);

// Clusters of so many blocks that run at once; 0: the device runs none of that size.
int64_t clusters_at_once(const DeviceInfo& device, int64_t blocks);

}  // namespace fused_rnn
