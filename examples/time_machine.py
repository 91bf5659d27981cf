"""A character language model on a book: one-hot characters, an RNN of 512 hidden units, a linear layer.

    python examples/time_machine.py [book.txt] [--steps 500]

The text is reduced to the 26 letters and the space. The batch is 32 places of the text that are read on, 35 characters at a
time; each keeps its state from one batch to the next. Perplexity is exp(mean loss per character): 27 is guessing, 1 knowing.
"""

import argparse
import math
import re
from pathlib import Path

import torch

import fused_rnn
from fused_rnn.demo import shipped_text

CHARACTERS = " abcdefghijklmnopqrstuvwxyz"
BATCH, STEPS, HIDDEN = 32, 35, 512


class LanguageModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = fused_rnn.RNN(len(CHARACTERS), HIDDEN)
        self.read_out = torch.nn.Linear(HIDDEN, len(CHARACTERS))

    def forward(self, characters, state=None):
        """characters [T, B] -> scores [T, B, characters], state."""
        one_hot = torch.nn.functional.one_hot(characters, len(CHARACTERS)).float()
        hidden, state = self.rnn(one_hot, state)
        return self.read_out(hidden), state


def load(path):
    text = Path(path).read_text(encoding="utf-8") if path else shipped_text()
    letters = re.sub("[^a-z]+", " ", text.lower())
    return torch.tensor([CHARACTERS.index(letter) for letter in letters])


def batches(characters):
    """Endless (first of its epoch?, inputs [T, B], targets [T, B])."""
    length = (len(characters) - 1) // BATCH
    inputs = characters[: BATCH * length].view(BATCH, length).t()
    targets = characters[1 : BATCH * length + 1].view(BATCH, length).t()
    while True:
        for start in range(0, length - STEPS + 1, STEPS):
            yield start == 0, inputs[start : start + STEPS], targets[start : start + STEPS]


@torch.no_grad()
def continue_text(model, prefix, length=50):
    """The likeliest next character, again and again."""
    text, unread, state = prefix, prefix, None
    for _ in range(length):
        scores, state = model(torch.tensor([[CHARACTERS.index(character)] for character in unread]), state)
        unread = CHARACTERS[scores[-1, 0].argmax()]
        text += unread
    return text


def main(path=None, steps=500, seed=0):
    torch.manual_seed(seed)
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    perplexities, losses, state = [], [], None
    for step, (is_first, inputs, targets) in zip(range(1, steps + 1), batches(load(path)), strict=False):
        scores, state = model(inputs, None if is_first else state)
        state = state.detach()  # gradients end at the start of the batch
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            perplexities.append(math.exp(sum(losses) / len(losses)))
            losses.clear()
            print(f"step {step:4}: perplexity {perplexities[-1]:.2f}")
    sample = continue_text(model, "time traveller ")
    print(sample)
    return perplexities, sample


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path", nargs="?", help="a text file; without one the text that ships with Python")
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    main(arguments.path, arguments.steps)
