"""A stacked RNN in NumPy alone, and the proof that fused_rnn.RNN computes the same.

x is [T, B, I]; the result is the top layer's hidden states [T, B, H] and every layer's last one [L, B, H].
"""

import numpy as np
import torch

import fused_rnn


def numpy_rnn(x, layers):
    """layers: a list of (w_ih [H, I or H], w_hh [H, H], b_ih [H], b_hh [H])."""
    last_states = []
    for w_ih, w_hh, b_ih, b_hh in layers:
        h = np.zeros((x.shape[1], w_hh.shape[0]))
        outputs = []
        for x_t in x:
            h = np.tanh(x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh)
            outputs.append(h)
        x = np.stack(outputs)  # the next layer reads this one's states
        last_states.append(h)
    return x, np.stack(last_states)


@torch.no_grad()
def main(steps=20, batch=3, input_size=5, hidden_size=7, num_layers=3, seed=0):
    torch.manual_seed(seed)
    rnn = fused_rnn.RNN(input_size, hidden_size, num_layers, dtype=torch.float64)
    x = torch.randn(steps, batch, input_size, dtype=torch.float64)
    weights = [parameter.numpy() for parameter in rnn.parameters()]
    layers = [weights[4 * layer : 4 * layer + 4] for layer in range(num_layers)]

    expected, expected_last = numpy_rnn(x.numpy(), layers)
    output, last = rnn(x)
    difference = max(np.abs(output.numpy() - expected).max(), np.abs(last.numpy() - expected_last).max())
    print(f"output {expected.shape}, last states {expected_last.shape}, largest difference {difference:.1e}")
    return {"output": expected.shape, "last": expected_last.shape, "difference": float(difference)}


if __name__ == "__main__":
    main()
