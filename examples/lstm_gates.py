"""An LSTM whose gates are set by hand: one unit that stores, keeps, shows and forgets a number on command.

The input is (value, command, show): command 1 adds the value to the memory, -1 erases the memory, 0 leaves it; show 1 lets
it out. Weights of 100 and biases of +-10 make the gates switches. torch.nn's order of the gates: i f g o.
"""

import torch

import fused_rnn

INPUTS = [(0.2, 1, 0), (0.1, 1, 0), (-0.1, 0, 0), (-0.2, 0, 1), (0.25, -1, 0)]
WEIGHT_IH = [
    (0, 100, 0),  # input gate: open at command 1
    (0, 100, 0),  # forget gate: keeps (bias 10) unless the command is -1
    (1, 0, 0),  # candidate: the value
    (0, 0, 100),  # output gate: open when shown
]
BIAS_IH = [-10, 10, 0, -10]


@torch.no_grad()
def set_gates(parameters):
    """Fills w_ih, w_hh, b_ih, b_hh: the state feeds nothing back."""
    w_ih, w_hh, b_ih, b_hh = parameters
    w_ih.copy_(torch.tensor(WEIGHT_IH))
    b_ih.copy_(torch.tensor(BIAS_IH))
    w_hh.zero_()
    b_hh.zero_()


@torch.no_grad()
def main():
    inputs = torch.tensor(INPUTS)  # [5 steps, 3]
    cell = fused_rnn.LSTMCell(3, 1)
    set_gates(cell.parameters())
    h, c = torch.zeros(1), torch.zeros(1)
    cells, hiddens = [], []
    for x in inputs:
        h, c = cell(x, (h, c))
        hiddens.append(h.item())
        cells.append(c.item())
        print(f"x = ({x[0]:5.2f}, {x[1]:2.0f}, {x[2]:1.0f})   c = {c.item():5.2f}   h = {h.item():5.2f}")

    lstm = fused_rnn.LSTM(3, 1)
    set_gates(lstm.parameters())
    output, (_, last_c) = lstm(inputs)
    layer = output.flatten().tolist()
    print("h of the layer:", *(f"{value:.2f}" for value in layer), f"  last c = {last_c.item():.2f}")
    return {"c": cells, "h": hiddens, "layer_h": layer, "layer_c": last_c.item()}


if __name__ == "__main__":
    main()
