// For sizes around those of tiles, with none among them: the form of a matrix on an instruction set that has products of
// parts, and the room for its rows. This machine need not have the instructions.
#include <cstdio>

#include "cpu/gemm/parts_product.h"

using namespace fused_rnn;
using namespace fused_rnn::cpu;

namespace {

// Null, or what is wrong.
const char* check(const Matrix<float>& m, int64_t rows) {
  if (m.form != Form::kParts && m.form != Form::kDirectParts) return nullptr;
  if (m.row_block_elements() == 0) return "a matrix of parts without tiles";
  PartsRoom room;
  room.include(m, rows);
  Arena arena(nullptr);
  const PartsScratch scratch = room.take(arena);
  // As PartsProduct divides them.
  const bool has_products = m.shape.units > 0 && rows > 0;
  if (!has_products) return nullptr;
  if (scratch.elements / m.row_block_elements() < 1) return "no room";
  if (m.form == Form::kParts) return nullptr;
  // As DirectPartsProduct divides them: 64 rows at a time, one block, two or four.
  const int64_t blocks = rows <= 16 ? 1 : rows <= 32 ? 2 : 4;
  if (scratch.elements < blocks * m.row_block_elements()) return "no room for the blocks of a group";
  if (rows > 64) return "more rows than are worth reading the weights twice";
  return nullptr;
}

}  // namespace

int main() {
  const int64_t sizes[] = {0, 1, 15, 16, 17, 31, 32, 33, 511, 512, 513};
  int64_t in_parts = 0, as_they_lie = 0, others = 0;
  for (int64_t depth : sizes) {
    for (int64_t units : sizes) {
      for (int64_t rows : sizes) {
        for (DType storage : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
          for (bool rounded : {false, true}) {
            for (int64_t products : {1, 2, 17}) {
              Matrix<float> m;
              m.shape = Shape(depth, units, 1, 16);
              m.parts = parts_of(storage, rounded);
              FormInput in{};
              in.depth = depth;
              in.columns = m.shape.columns();
              in.rows = rows;
              in.all_rows = products * rows;
              in.gains_from_parts = in.direct_parts = true;
              in.parts = m.parts;
              in.vector_bytes = 64;
              in.gates = 4;
              m.form = choose_form(in);
              ++(m.form == Form::kParts ? in_parts : m.form == Form::kDirectParts ? as_they_lie : others);
              if (const char* wrong = check(m, rows)) return std::puts(wrong), 1;
            }
          }
        }
      }
    }
  }
  std::printf("%lld %lld %lld\n", static_cast<long long>(in_parts), static_cast<long long>(as_they_lie),
              static_cast<long long>(others));
  return 0;
}
