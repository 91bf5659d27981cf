"""The edits with which CONTRIBUTING.md's "Adding a cell in five steps" adds a GRU without reset gate.

    z = sigmoid(W_z x + b_z + U_z h + c_z)    n = tanh(W_n x + b_n + U_n h + c_n)    h' = n + z (h - n)

Every edit puts text behind an anchor, which stands in the file exactly once, or without an anchor at the end of the file. An
edit whose anchor has changed fails by its name.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Edit:
    """Puts `text` behind `anchor` in `file`."""

    file: str
    anchor: str
    text: str

    def apply(self, root: Path) -> None:
        """Edits the file below root.

        Raises:
            LookupError: the anchor is not there, or more than once.
        """
        path = root / self.file
        before = path.read_text()
        if not self.anchor:
            path.write_text(before + self.text)
            return
        if before.count(self.anchor) != 1:
            raise LookupError(f"{self.file}: expected once, got {before.count(self.anchor)} times: {self.anchor!r}")
        path.write_text(before.replace(self.anchor, self.anchor + self.text))


MODE, NAME = "UPDATE_GATE", "update_gate"

STRUCT = """
// z = sigmoid(x_z + h_z),  n = tanh(x_n + h_n),  h' = n + z (h - n)
template <>
struct Cell<CellKind::kUpdateGate> : CellConstants<CellKind::kUpdateGate> {
  static constexpr FUSED_RNN_HD int recurrent_slot(int gate) { return gate; }

  template <class V>
  static FUSED_RNN_HD void sigmoids(V (&a)[kSlots]) {
    using namespace math;
    a[0] = sigmoid(a[0]);
  }
  template <class V, class M>
  static FUSED_RNN_HD V unclipped(const V (&a)[kSlots], const V& h_prev, const V&, const M& m) {
    const V n = m.candidate(a[1]);
    return n + a[0] * (h_prev - n);
  }
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void states(const V (&a)[kSlots], const V& h_prev, const V& c_prev, V& h, V&, const M& m = M()) {
    h = m.clipped(unclipped(a, h_prev, c_prev, m));
  }
  template <class D>
  static FUSED_RNN_HD void tangents(D (&a)[kSlots]) {
    tangent_of_sigmoid(a[0]);
    tangent_of_tanh(a[1]);
  }
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void forward_of_sigmoids(V (&a)[kSlots], const V& h_prev, const V& c_prev, V& h, V& c,
                                               const M& m = M()) {
    using namespace math;
    a[1] = tanh(a[1]);
    states(a, h_prev, c_prev, h, c, m);
  }
  template <class V, class M = Unmodified>
  static FUSED_RNN_HD void forward(V (&a)[kSlots], const V& h_prev, const V& c_prev, V& h, V& c, const M& m = M()) {
    sigmoids(a);
    forward_of_sigmoids(a, h_prev, c_prev, h, c, m);
  }

  template <class V, class M = Unmodified>
  static FUSED_RNN_HD V backward(const V (&a)[kSlots], const V& h_prev, const V&, const V&, const V&, const V& dh_after,
                                 V&, V (&d)[kSlots], const M& m = M()) {
    const V z = a[0], n = a[1];
    const V dh = m.clip_gradient(dh_after);
    d[0] = dh * (h_prev - m.candidate(n)) * z * (V(1) - z);
    d[1] = m.candidate(dh * (V(1) - z)) * (V(1) - n * n);
    return dh * z;
  }
};
"""

REFERENCE = f"""
    if cell == NUMBER_OF_MODE["{MODE}"]:
        x_z, x_n = gi.chunk(2, dim=-1)
        h_z, h_n = gh.chunk(2, dim=-1)
        z = (x_z + h_z).sigmoid()
        n = masked((x_n + h_n).tanh())
        return [clipped(n + z * (h - n))]
"""

FUNCTION = f'''

def {NAME}(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Tensor | None = None,
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    return_all_states: bool = False,
) -> tuple[Any, ...]:
    """A GRU without reset gate over a sequence; arguments, results and errors as :func:`gru`, gate order z n."""
    cell = _kinds.NUMBER_OF_MODE["{MODE}"]
    recipe = Recipe(cell, num_layers, has_biases, bidirectional, batch_first, training, dropout)
    extras = Extras(lengths, resets, reset_state, return_all_states)
    return _with_states(*_checked_rnn(recipe, input, weights, hx, batch_sizes, extras), return_all_states)


def {NAME}_cell_number(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step: input [B, I] (or [I]), hx [B, H] or None for zeros -> h' [B, H]; weights with 2H rows."""
    return _checked_cell(_kinds.NUMBER_OF_MODE["{MODE}"], input, hx, w_ih, w_hh, b_ih, b_hh)[0]
'''

# torch.nn.RNNBase makes parameters for torch's own modes alone: the class makes them anew.
LAYER = f'''

class UpdateGate(_Layer):
    """A GRU without reset gate, with the arguments of torch.nn.GRU."""

    _cell_number = _kinds.NUMBER_OF_MODE["{MODE}"]

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> None:
        super().__init__("RNN_TANH", input_size, hidden_size, num_layers, **options)
        for name in self._flat_weights_names:
            old = getattr(self, name)
            setattr(self, name, nn.Parameter(old.new_empty(2 * hidden_size, *old.shape[1:])))
        self.reset_parameters()

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        """As fused_rnn.GRU."""
        return self._forward_single_state(input, hx)
'''

CELL = f'''

class UpdateGateCell(_Cell):
    """One step of a GRU without reset gate, with the arguments of torch.nn.GRUCell."""

    _cell_number = NUMBER_OF_MODE["{MODE}"]

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **options: Any) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=2, **options)

    def forward(self, input: Tensor, hx: Tensor | None = None, *, resets: Any = None, reset_state: Any = None) -> Tensor:
        """As fused_rnn.GRUCell."""
        return self._run_single_state(input, hx, resets, reset_state)
'''

PARAMS, KINDS, REFERENCE_FILE = "csrc/core/params.h", "fused_rnn/_kinds.py", "fused_rnn/reference.py"
END_OF_GRU = "    d[3] = dn * r;\n    return dh * z;\n  }\n};\n"
END_OF_GRU_STEP = "        n = masked((x_n + r * h_n).tanh())\n        return [clipped(n + z * (h - n))]"

STEPS: dict[str, tuple[Edit, ...]] = {
    "1: params.h and _kinds.py": (
        Edit(
            PARAMS,
            '  X(kGru, "gru", 3, 4, 4, false, true, false)',
            f' \\\n  X(kUpdateGate, "{NAME}", 2, 2, 2, false, true, false)',
        ),
        Edit(PARAMS, "// Gate order of the weights: LSTM i f g o, GRU r z n", ", update gate z n"),
        Edit(PARAMS, "GRU r z n hn, where hn = W_hn h + b_hn.", " Update gate z n."),
        Edit(PARAMS, "GRU n_x r z n_h: gradients of pre-activations.", " Update gate z n."),
        Edit(
            KINDS,
            '    Kind("GRU", "gru", 3, 4, 4, False, True, False),\n',
            f'    Kind("{MODE}", "{NAME}", 2, 2, 2, False, True, False),\n',
        ),
    ),
    "2: cells.h": (Edit("csrc/core/cells.h", END_OF_GRU, STRUCT),),
    "3: reference.py": (
        Edit(REFERENCE_FILE, END_OF_GRU_STEP, REFERENCE),
        Edit(REFERENCE_FILE, "from fused_rnn._kinds import GRU, LSTM", ", NUMBER_OF_MODE"),
    ),
    "4: functional.py, modules.py, cells.py": (
        Edit("fused_rnn/functional.py", "", FUNCTION),
        Edit("fused_rnn/functional.py", "from fused_rnn import _checkpoint, _checks,", " _kinds,"),
        Edit("fused_rnn/modules.py", "", LAYER),
        Edit("fused_rnn/cells.py", "", CELL),
        Edit("fused_rnn/cells.py", "from fused_rnn._kinds import GRU, LSTM,", " NUMBER_OF_MODE,"),
    ),
    "5: tests/cases.py": (Edit("tests/cases.py", '"RNN_IDENTITY", "GRU", "LSTM"', f', "{MODE}"'),),
}
