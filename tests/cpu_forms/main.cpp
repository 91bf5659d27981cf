// For sizes around those of tiles, with none among them: the form of a matrix on an instruction set that has products of
// parts, and the room for its rows. This machine need not have the instructions.
#include <cstdio>

#include "cpu/gemm/matrix.h"

int main() {
  using namespace fused_rnn::cpu;
  const int64_t sizes[] = {0, 1, 15, 16, 17, 31, 32, 33, 511, 512, 513};
  int64_t split = 0, others = 0;
  for (int64_t depth : sizes) {
    for (int64_t units : sizes) {
      for (int64_t rows : sizes) {
        for (int storage = 0; storage < 3; ++storage) {
          for (bool rounded : {false, true}) {
            Matrix<float> m;
            m.shape = Shape(depth, units, 1, 16);
            m.parts = split_parts(storage, rounded);
            m.form = choose_form({depth, m.shape.columns(), rows, 17 * rows, /*splits=*/true, m.parts});
            SplitRoom room;
            room.include(m, rows);
            const SplitRows taken = [&] {
              Arena arena(nullptr);
              return room.take(arena);
            }();
            const bool is_split = m.form == Form::kSplit;
            ++(is_split ? split : others);
            if (is_split && m.row_block_elements() == 0) return std::puts("a split matrix without tiles"), 1;
            // As for_split_blocks divides them.
            if (is_split && units > 0 && rows > 0 && taken.elements / m.row_block_elements() < 1)
              return std::puts("no room"), 1;
          }
        }
      }
    }
  }
  std::printf("%lld %lld\n", static_cast<long long>(split), static_cast<long long>(others));
  return 0;
}
