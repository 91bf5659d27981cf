// For sizes around those of tiles, with none among them: the form of a matrix on an instruction set that has products of
// parts, and the room for its rows. This machine need not have the instructions.
#include <cstdio>

#include "cpu/gemm/parts_product.h"

using namespace fused_rnn;
using namespace fused_rnn::cpu;

namespace {

// Null, or what is wrong.
const char* check(const Matrix<float>& m, int64_t rows) {
  if (m.form != Form::kParts) return nullptr;
  if (m.row_block_elements() == 0) return "a matrix of parts without tiles";
  PartsRoom room;
  room.include(m, rows);
  Arena arena(nullptr);
  const PartsScratch scratch = room.take(arena);
  // As PartsProduct divides them.
  const bool has_products = m.shape.units > 0 && rows > 0;
  if (has_products && scratch.elements / m.row_block_elements() < 1) return "no room";
  return nullptr;
}

}  // namespace

int main() {
  const int64_t sizes[] = {0, 1, 15, 16, 17, 31, 32, 33, 511, 512, 513};
  int64_t in_parts = 0, others = 0;
  for (int64_t depth : sizes) {
    for (int64_t units : sizes) {
      for (int64_t rows : sizes) {
        for (DType storage : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
          for (bool rounded : {false, true}) {
            Matrix<float> m;
            m.shape = Shape(depth, units, 1, 16);
            m.parts = parts_of(storage, rounded);
            m.form = choose_form({depth, m.shape.columns(), rows, 17 * rows, /*gains_from_parts=*/true, m.parts,
                                  /*straight=*/false, /*vector_bytes=*/64, /*gates=*/4});
            ++(m.form == Form::kParts ? in_parts : others);
            if (const char* wrong = check(m, rows)) return std::puts(wrong), 1;
          }
        }
      }
    }
  }
  std::printf("%lld %lld\n", static_cast<long long>(in_parts), static_cast<long long>(others));
  return 0;
}
