// In which form the products of a call read a matrix of weights: a pure function of sizes and storage.
#pragma once
#include <cstdint>

#include "core/params.h"
#include "cpu/isa/parts.h"

namespace fused_rnn::cpu {

// Weights of fewer bytes stay in a core's L2 between steps (2 MB, less what else lies there).
constexpr double kL2Bytes = 1.6e6;

enum class Form : int {
  kDirect,       // as torch stores it
  kPacked,       // [panels][K][vectors][W] (kernels.h)
  kParts,        // tiles of bfloat16 parts (parts.h)
  kDirectParts,  // as torch stores it; products cut it into parts
};
// What explain() prints.
const char* to_string(Form form);

// A matrix and the rows that it is multiplied with. Rows count for all threads together: a result must not depend on how
// threads divide the work.
struct FormInput {
  int64_t depth, columns;
  int64_t rows;           // of one product
  int64_t all_rows;       // T * B, of the whole call
  bool gains_from_parts;  // the instruction set has PartsKernels that gain for this storage
  Parts parts;
  bool direct_parts;  // and products in parts with weights as they lie
  bool straight;      // a row-major [depth, columns]: the columns of its panels lie a row apart
  int vector_bytes;   // of the instruction set
  int gates;          // that share a panel
};
Form choose_form(const FormInput& in);

// How many parts hold a stored element of a matrix, and an element of the rows: `rounded_rows` says that the rows are
// values of the matrix's storage, so that they need no more parts than its elements.
Parts parts_of(DType storage, bool rounded_rows);

}  // namespace fused_rnn::cpu
