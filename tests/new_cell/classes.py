"""Run in the edited copy of the tree: what the new cell's classes say of themselves is said of the new cell."""

from __future__ import annotations

import pytest
import torch
from new_cell.steps import NAME
from torch.nn.utils.rnn import pack_sequence

import fused_rnn
from fused_rnn._kinds import kind_of
from fused_rnn.cells import UpdateGateCell
from fused_rnn.modules import UpdateGate

assert kind_of(UpdateGate(3, 4)).name == kind_of(UpdateGateCell(3, 4)).name == NAME

# It has gates, so it has a candidate, which an RNN has not; and it has no forget gate.
options = {"recurrent_dropout": 0.5, "recurrent_dropout_variant": "candidate", "zoneout": 0.1, "state_clip": 2.0}
layer = UpdateGate(3, 4, num_layers=2, **options)
assert layer.recurrent_dropout_variant == "candidate" and layer(torch.zeros(5, 2, 3))[0].shape == (5, 2, 4)
assert UpdateGateCell(3, 4, zoneout=0.1, state_clip=2.0).zoneout == (0.1,)
for cls in (UpdateGate, UpdateGateCell):
    with pytest.raises(ValueError, match=f"forget_bias: expected None for {cls.__name__} .it has no forget gate"):
        cls(3, 4, forget_bias=1.0)

for module, x in ((layer, torch.zeros(5, 2, 3)), (UpdateGateCell(3, 4), torch.zeros(2, 3))):
    assert fused_rnn.explain(module, x, show=False).cell == NAME

with pytest.raises(ValueError, match="^UpdateGate: Expected input to be 2D or 3D, got 4D instead"):
    layer(torch.zeros(1, 5, 2, 3))
for shapes in (((5, 2, 3),), ((2, 3), (1, 2, 4))):
    with pytest.raises(ValueError, match="^UpdateGateCell: Expected (input|hidden) to be 1D or 2D, got 3D instead"):
        UpdateGateCell(3, 4)(*(torch.zeros(shape) for shape in shapes))

cell = UpdateGateCell(3, 4)
replaced = cell(torch.zeros(2, 3), torch.ones(2, 4), resets=torch.tensor([True, False]))
torch.testing.assert_close(replaced[0], cell(torch.zeros(2, 3))[0])
assert layer(pack_sequence([torch.zeros(3, 3), torch.zeros(1, 3)]))[1].shape == (2, 2, 4)
