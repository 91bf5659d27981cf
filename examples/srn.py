"""A simple recurrent network small enough to follow by hand, three times: RNNCell, RNN and a NumPy loop.

Two inputs, two hidden units, one linear output, no biases, every weight one. For the inputs (1,1) (1,1) (2,2) and the
identity as activation each hidden unit holds 2, 6 and 16, so the output is 4, 12 and 32.
"""

import numpy as np
import torch

import fused_rnn

INPUTS = [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]


def fill_with_ones(module):
    for parameter in module.parameters():
        torch.nn.init.ones_(parameter)
    return module


@torch.no_grad()
def with_cell(nonlinearity):
    """Step by step: the loop over time is ours."""
    cell = fill_with_ones(fused_rnn.RNNCell(2, 2, bias=False, nonlinearity=nonlinearity))
    read_out = fill_with_ones(torch.nn.Linear(2, 1, bias=False))
    h, outputs = torch.zeros(1, 2), []
    for x in torch.tensor(INPUTS):
        h = cell(x.unsqueeze(0), h)
        outputs.append(read_out(h).item())
    return outputs


@torch.no_grad()
def with_layer(nonlinearity):
    """All steps in one call: x is [T, I] for a single sequence."""
    rnn = fill_with_ones(fused_rnn.RNN(2, 2, bias=False, nonlinearity=nonlinearity))
    read_out = fill_with_ones(torch.nn.Linear(2, 1, bias=False))
    hidden, _ = rnn(torch.tensor(INPUTS))
    return read_out(hidden).flatten().tolist()


def with_numpy(nonlinearity):
    """The definition: h = act(W_ih x + W_hh h), y = W_hy h."""
    act = {"tanh": np.tanh, "identity": lambda a: a}[nonlinearity]
    w_ih, w_hh, w_hy, h = np.ones((2, 2)), np.ones((2, 2)), np.ones(2), np.zeros(2)
    outputs = []
    for x in np.array(INPUTS):
        h = act(w_ih @ x + w_hh @ h)
        outputs.append(float(w_hy @ h))
    return outputs


def main():
    results = {}
    for nonlinearity in ("identity", "tanh"):
        for network in (with_cell, with_layer, with_numpy):
            outputs = network(nonlinearity)
            results[nonlinearity, network.__name__] = outputs
            print(f"{nonlinearity:9}{network.__name__:11}", *(f"{y:9.4f}" for y in outputs))
    return results


if __name__ == "__main__":
    main()
