// The CPU backend in plain C++: one direction after the other, one row of a step after the other.
#include "cpu.h"

#include <algorithm>

#include "../cells.h"
#include "../dispatch.h"
#include "storage.h"

namespace fused_rnn::cpu {
namespace {

template <class Storage>
Arithmetic<Storage> load(const void* base, int64_t index) {
  return base ? to_arithmetic(static_cast<const Storage*>(base)[index]) : Arithmetic<Storage>(0);
}
template <class Storage>
void store(void* base, int64_t index, Arithmetic<Storage> value) {
  if (base) store_converted(value, static_cast<Storage*>(base) + index);
}

// sum_k v[k] w[offset + k * stride]
template <class Storage>
Arithmetic<Storage> dot(const Arithmetic<Storage>* v, const void* w, int64_t offset, int64_t stride, int64_t length) {
  Arithmetic<Storage> sum = 0;
  for (int64_t k = 0; k < length; ++k) sum += v[k] * load<Storage>(w, offset + k * stride);
  return sum;
}

// One row of one direction over all its steps. Scratch: h_row [P], c_row [H], h_next [H], x_row [I].
template <class Storage, class C>
void forward_row(const ForwardParams& p, int d, int64_t b, Arithmetic<Storage>* scratch) {
  using A = Arithmetic<Storage>;
  const Weights& w = p.weights[d];
  A* h_row = scratch;
  A* c_row = h_row + p.P;
  A* h_next = c_row + p.H;
  A* x_row = h_next + p.H;
  for (int64_t k = 0; k < p.P; ++k) h_row[k] = load<Storage>(p.h0, (d * p.seq.B + b) * p.P + k);
  for (int64_t u = 0; u < p.H; ++u) c_row[u] = C::kHasC ? load<Storage>(p.c0, (d * p.seq.B + b) * p.H + u) : A(0);
  for (int64_t step = 0; step < p.seq.T; ++step) {
    const int64_t t = d == 0 ? step : p.seq.T - 1 - step;
    const int64_t row = row_of(p.seq, t, b);
    if (!is_active(p.seq, t, b)) {
      if (!p.seq.offsets) {
        for (int64_t k = 0; k < p.P; ++k) store<Storage>(p.y, row * p.D * p.P + d * p.P + k, 0);
        const int64_t unit = (d * p.seq.N + row) * p.H;
        for (int64_t u = 0; u < C::kSlots * p.H; ++u) store<Storage>(p.gates, C::kSlots * unit + u, 0);
        for (int64_t u = 0; u < p.H; ++u) store<Storage>(p.cs, unit + u, 0);
      }
      continue;
    }
    if (is_reset(p.seq, row)) {
      std::fill(h_row, h_row + p.P, A(0));
      std::fill(c_row, c_row + p.H, A(0));
    }
    for (int64_t k = 0; k < p.I; ++k) x_row[k] = load<Storage>(p.x, row * p.I + k);
    for (int64_t u = 0; u < p.H; ++u) {
      A a[C::kSlots] = {};
      for (int g = 0; g < C::kGates; ++g) {
        const int64_t r = g * p.H + u;
        a[g] += dot<Storage>(x_row, w.w_ih, r * p.I, 1, p.I) + load<Storage>(w.b_ih, r);
        a[C::recurrent_slot(g)] += dot<Storage>(h_row, w.w_hh, r * p.P, 1, p.P) + load<Storage>(w.b_hh, r);
      }
      A c = 0;
      C::forward(a, w.w_hr ? A(0) : h_row[u], c_row[u], h_next[u], c);
      c_row[u] = c;
      const int64_t unit = ((d * p.seq.N + row) * C::kSlots) * p.H + u;
      if (p.training && C::kSaved > 0) {
        for (int s = 0; s < C::kSlots; ++s) store<Storage>(p.gates, unit + s * p.H, a[s]);
      }
      if (p.training && C::kHasC) store<Storage>(p.cs, (d * p.seq.N + row) * p.H + u, c);
    }
    for (int64_t k = 0; k < p.P; ++k) {
      const int64_t at = row * p.D * p.P + d * p.P + k;
      store<Storage>(p.y, at, w.w_hr ? dot<Storage>(h_next, w.w_hr, k * p.H, 1, p.H) : h_next[k]);
      h_row[k] = load<Storage>(p.y, at);
    }
  }
  for (int64_t k = 0; k < p.P; ++k) store<Storage>(p.h_n, (d * p.seq.B + b) * p.P + k, h_row[k]);
  if (C::kHasC) {
    for (int64_t u = 0; u < p.H; ++u) store<Storage>(p.c_n, (d * p.seq.B + b) * p.H + u, c_row[u]);
  }
}

// Scratch: dh [P] gradient of the state after this step, dh_unit [H], dc [H], direct [H], d_rec [G, H].
template <class Storage, class C>
void backward_row(const BackwardParams& p, int d, int64_t b, Arithmetic<Storage>* scratch) {
  using A = Arithmetic<Storage>;
  constexpr int kFirst = C::kSlots - C::kGates;  // slot of d_gates where the recurrent product's gradient begins
  const Weights& w = p.weights[d];
  A* dh = scratch;
  A* dh_unit = dh + p.P;
  A* dc = dh_unit + p.H;
  A* direct = dc + p.H;
  A* d_rec = direct + p.H;
  const int64_t state = d * p.seq.B + b;
  for (int64_t k = 0; k < p.P; ++k) dh[k] = load<Storage>(p.dh_n, state * p.P + k);
  for (int64_t u = 0; u < p.H; ++u) dc[u] = C::kHasC ? load<Storage>(p.dc_n, state * p.H + u) : A(0);
  for (int64_t step = p.seq.T - 1; step >= 0; --step) {
    const int64_t t = d == 0 ? step : p.seq.T - 1 - step;
    const int64_t row = row_of(p.seq, t, b);
    const int64_t units = (d * p.seq.N + row) * C::kSlots * p.H;
    if (!is_active(p.seq, t, b)) {
      if (p.seq.offsets) continue;
      for (int64_t u = 0; u < C::kSlots * p.H; ++u) store<Storage>(p.d_gates, units + u, 0);
      for (int64_t k = 0; k < p.P; ++k) store<Storage>(p.d_h, (d * p.seq.N + row) * p.P + k, 0);
      continue;
    }
    const bool reset = is_reset(p.seq, row);
    const int64_t t_prev = d == 0 ? t - 1 : t + 1;
    const bool has_prev = is_active(p.seq, t_prev, b);
    const int64_t row_prev = has_prev ? row_of(p.seq, t_prev, b) : 0;
    for (int64_t k = 0; k < p.P; ++k) {
      dh[k] += load<Storage>(p.dy, row * p.D * p.P + d * p.P + k);
      store<Storage>(p.d_h, (d * p.seq.N + row) * p.P + k, dh[k]);
    }
    for (int64_t u = 0; u < p.H; ++u) {
      dh_unit[u] = w.w_hr ? dot<Storage>(dh, w.w_hr, u, p.H, p.P) : dh[u];
      A a[C::kSlots] = {}, grad[C::kSlots], h_prev = 0, c_prev = 0, c = 0, h = 0;
      if (C::kSaved > 0) {
        for (int s = 0; s < C::kSlots; ++s) a[s] = load<Storage>(p.gates, units + s * p.H + u);
      }
      if (!w.w_hr) {
        h = load<Storage>(p.y, row * p.D * p.P + d * p.P + u);
        if (!reset) {
          h_prev = has_prev ? load<Storage>(p.y, row_prev * p.D * p.P + d * p.P + u) : load<Storage>(p.h0, state * p.P + u);
        }
      }
      if (C::kHasC) {
        c = load<Storage>(p.cs, (d * p.seq.N + row) * p.H + u);
        if (!reset) {
          c_prev = has_prev ? load<Storage>(p.cs, (d * p.seq.N + row_prev) * p.H + u) : load<Storage>(p.c0, state * p.H + u);
        }
      }
      C::backward(a, h_prev, c_prev, c, h, dh_unit[u], dc[u], grad, direct[u]);
      for (int s = 0; s < C::kSlots; ++s) store<Storage>(p.d_gates, units + s * p.H + u, grad[s]);
      for (int g = 0; g < C::kGates; ++g) d_rec[g * p.H + u] = grad[kFirst + g];
      if (reset) dc[u] = 0;
    }
    for (int64_t k = 0; k < p.P; ++k) {
      dh[k] = reset ? A(0) : (w.w_hr ? A(0) : direct[k]) + dot<Storage>(d_rec, w.w_hh, k, p.P, C::kGates * p.H);
    }
  }
  for (int64_t k = 0; k < p.P; ++k) store<Storage>(p.d_h0, state * p.P + k, dh[k]);
  if (C::kHasC) {
    for (int64_t u = 0; u < p.H; ++u) store<Storage>(p.d_c0, state * p.H + u, dc[u]);
  }
}

}  // namespace

int64_t forward_workspace_bytes(const ForwardParams& p) { return 8 * (p.P + 2 * p.H + p.I); }
int64_t backward_workspace_bytes(const BackwardParams& p) { return 8 * (p.P + 3 * p.H + gate_count(p.cell) * p.H); }

void forward(const ForwardParams& p) {
  dispatch_cell(p.cell, [&](auto tag) {
    dispatch_storage(p.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      for (int d = 0; d < p.D; ++d) {
        for (int64_t b = 0; b < p.seq.B; ++b) {
          forward_row<Storage, Cell<decltype(tag)::value>>(p, d, b, static_cast<Arithmetic<Storage>*>(p.workspace));
        }
      }
    });
  });
}

void backward(const BackwardParams& p) {
  dispatch_cell(p.cell, [&](auto tag) {
    dispatch_storage(p.dtype, [&](auto storage) {
      using Storage = decltype(storage);
      for (int d = 0; d < p.D; ++d) {
        for (int64_t b = 0; b < p.seq.B; ++b) {
          backward_row<Storage, Cell<decltype(tag)::value>>(p, d, b, static_cast<Arithmetic<Storage>*>(p.workspace));
        }
      }
    });
  });
}

const char* instruction_set() { return "portable"; }
std::vector<std::string> built_instruction_sets() { return {"portable"}; }
std::vector<std::string> available_instruction_sets() { return {"portable"}; }

}  // namespace fused_rnn::cpu
