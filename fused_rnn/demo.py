"""Trains a character language model on the English text that ships with CPython and compares fused_rnn with torch.nn.

The model is embedding, recurrent layers, linear. The text is `pydoc_data.topics`: what `help("if")` and the like print. Both
libraries start from the same parameters and see the same batches. They take turns at every step.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fused_rnn
from fused_rnn._kinds import LSTM, TORCH_LAYERS

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HELD_OUT = 0.1  # the last tenth of the text is not trained on
FIRST_STEPS = 10  # whose losses are compared; later ones drift apart through rounding alone
PROMPT = "The "


def shipped_text() -> str:
    """The English text of CPython's help topics, about 450 thousand ASCII characters."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text.encode("ascii", "ignore").decode()


class LanguageModel(nn.Module):
    """characters [T, B] and the recurrent state -> scores [T, B, vocabulary], next state."""

    def __init__(self, vocabulary: int, embedding_size: int, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_size)
        self.rnn = rnn
        self.read_out = nn.Linear(rnn.hidden_size, vocabulary)

    def forward(self, characters: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.rnn(self.embedding(characters), state)
        return self.read_out(hidden), state


@dataclass
class Corpus:
    """Text as numbers: `train` and `held_out` are 1-D int64."""

    characters: str
    train: Tensor
    held_out: Tensor

    @classmethod
    def from_text(cls, text: str, device: str) -> Corpus:
        characters = "".join(sorted(set(text)))
        index = {character: position for position, character in enumerate(characters)}
        encoded = torch.tensor([index[character] for character in text], device=device)
        split = int(len(encoded) * (1 - HELD_OUT))
        return cls(characters, encoded[:split], encoded[split:])


def windows(encoded: Tensor, batch: int, steps: int) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """One pass over the text, read at `batch` places at once, `steps` characters at a time.

    Yields (whether this is the first window, so that the state is zeros; inputs [T, B]; targets [T, B]).
    """
    length = (len(encoded) - 1) // batch
    if length < steps:
        raise ValueError(f"the text is too short: {len(encoded)} characters for a batch of {batch} x {steps}")
    inputs = encoded[: batch * length].view(batch, length).t()
    targets = encoded[1 : batch * length + 1].view(batch, length).t()
    for start in range(0, length - steps + 1, steps):
        yield start == 0, inputs[start : start + steps], targets[start : start + steps]


def endless(encoded: Tensor, batch: int, steps: int) -> Iterator[tuple[bool, Tensor, Tensor]]:
    while True:
        yield from windows(encoded, batch, steps)


def detached(state: Any) -> Any:
    """The same state without its history: gradients end at the start of a window."""
    return state.detach() if isinstance(state, Tensor) else tuple(part.detach() for part in state)


class Trainer:
    """A model with its optimizer and the state that it carries from window to window. 16-bit dtypes run under autocast."""

    def __init__(self, model: LanguageModel, learning_rate: float, device: str, dtype: torch.dtype) -> None:
        self.model = model
        self.device, self.dtype = device, dtype
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        self.state: Any = None
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def loss(self, inputs: Tensor, targets: Tensor, state: Any) -> tuple[Tensor, Any]:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype.itemsize == 2):
            scores, state = self.model(inputs, state)
        return nn.functional.cross_entropy(scores.flatten(0, 1).to(accumulation(self.dtype)), targets.flatten()), state

    def step(self, is_first: bool, inputs: Tensor, targets: Tensor) -> float:
        """One step of training; its loss and its time are kept. Reading the loss waits for the device."""
        start = time.perf_counter()
        loss, state = self.loss(inputs, targets, None if is_first else self.state)
        self.state = detached(state)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)
        return self.losses[-1]

    @torch.no_grad()
    def bits_per_character(self, encoded: Tensor, batch: int, steps: int) -> float:
        state, losses = None, []
        self.model.eval()
        for _, inputs, targets in windows(encoded, batch, steps):
            loss, state = self.loss(inputs, targets, state)
            losses.append(loss.item())
        self.model.train()
        return sum(losses) / len(losses) / math.log(2)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def generate(model: LanguageModel, characters: str, device: str, length: int, temperature: float = 0.5) -> str:
    """Text drawn character by character, after PROMPT."""
    model.eval()
    unread, state, text = PROMPT, None, PROMPT
    for _ in range(length):
        indices = torch.tensor([[characters.index(character)] for character in unread], device=device)
        scores, state = model(indices, state)
        unread = characters[int(torch.multinomial((scores[-1, 0] / temperature).softmax(0), 1))]
        text += unread
    model.train()
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cell", choices=TORCH_LAYERS, type=str.upper, default="LSTM")
    parser.add_argument("--hidden", type=int, default=256, help="hidden units of a layer (%(default)s)")
    parser.add_argument("--embedding", type=int, default=64, help="size of a character's embedding (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="recurrent layers (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="places of the text read at once (%(default)s)")
    parser.add_argument("--window", type=int, default=64, help="characters a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=700, help="training steps (%(default)s)")
    parser.add_argument("--compare", type=int, default=60, help="steps that torch.nn takes too (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.004, help="of Adam (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="16 bit: autocast (%(default)s)")
    parser.add_argument("--sample", type=int, default=300, help="characters of generated text (%(default)s)")


def build_trainers(options: argparse.Namespace, vocabulary: int) -> tuple[Trainer, Trainer]:
    """(fused_rnn's, torch.nn's), with equal parameters."""
    torch.manual_seed(options.seed)
    dtype = DTYPES[options.dtype]
    sizes = (options.embedding, options.hidden, options.layers)
    model = LanguageModel(vocabulary, options.embedding, getattr(fused_rnn, options.cell)(*sizes))
    reference = copy.deepcopy(model)
    reference.rnn = getattr(nn, options.cell)(*sizes)
    reference.rnn.load_state_dict(model.rnn.state_dict())
    trainers = [
        Trainer(m.to(options.device, accumulation(dtype)), options.learning_rate, options.device, dtype)
        for m in (model, reference)
    ]
    return trainers[0], trainers[1]


def train(fused: Trainer, reference: Trainer, corpus: Corpus, options: argparse.Namespace) -> None:
    """Both sides take the first steps, taking turns at going first; the rest is fused_rnn's."""
    batches = endless(corpus.train, options.batch, options.window)
    with tqdm(total=options.steps, unit="step", file=sys.stderr, mininterval=0.5) as bar:
        for step, batch in zip(range(options.steps), batches, strict=False):
            sides = [fused] if step >= options.compare else [fused, reference] if step % 2 else [reference, fused]
            for side in sides:
                side.step(*batch)
            bar.set_postfix(loss=f"{fused.losses[-1]:.3f}", side="both" if len(sides) == 2 else "fused_rnn", refresh=False)
            bar.update()


def characters_per_second(trainer: Trainer, options: argparse.Namespace) -> float:
    """By the median step of those that both sides took, without the first three, which allocate and tune."""
    seconds = trainer.seconds[: options.compare]
    return options.batch * options.window / median(seconds[min(3, len(seconds) - 1) :])


def report(results: dict[str, Any], options: argparse.Namespace) -> None:
    losses, window = results["losses"], max(1, len(results["losses"]) // 10)
    print(f"training loss        {losses[0]:.3f} -> {sum(losses[-window:]) / window:.3f} (nats per character)")
    print(f"held-out text        {results['bits_before']:.3f} -> {results['bits_after']:.3f} bits per character")
    if options.compare:
        fused, reference = results["fused_rnn_chars_per_second"], results["torch_nn_chars_per_second"]
        print(f"training speed       fused_rnn {fused:,.0f}, torch.nn {reference:,.0f} characters per second", end="")
        print(f" ({fused / reference:.2f} times; same {results['compared_steps']} batches, taking turns)")
        difference = results["largest_loss_difference"]
        print(f"largest difference   {difference:.1e} between the two losses of the first {results['first_steps']} steps")
    print("sample               " + results["sample"].replace("\n", "\n                     "))


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the demo and returns its numbers."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.compare = min(options.compare, options.steps)
    if options.compare and (TORCH_LAYERS[options.cell], options.device, options.dtype) == (LSTM, "cpu", "float16"):
        print("torch.nn's LSTM cannot train in float16 on a CPU: no comparison")
        options.compare = 0
    corpus = Corpus.from_text(shipped_text(), options.device)
    fused, reference = build_trainers(options, len(corpus.characters))
    parameters = sum(parameter.numel() for parameter in fused.model.parameters())
    print(f"model                {options.layers}-layer {options.cell} of {options.hidden} units, {parameters:,} parameters")
    print(f"runs on              {options.device} in {options.dtype}")
    print(f"text                 {len(corpus.train):,} characters to train on, {len(corpus.held_out):,} held out")
    evaluated = (corpus.held_out, options.batch, options.window)
    results: dict[str, Any] = {"bits_before": fused.bits_per_character(*evaluated)}
    train(fused, reference, corpus, options)
    results["bits_after"] = fused.bits_per_character(*evaluated)
    results["losses"] = fused.losses
    if options.compare:
        first = min(FIRST_STEPS, options.compare)
        pairs = zip(fused.losses[:first], reference.losses[:first], strict=True)
        results["largest_loss_difference"] = max(abs(ours - theirs) for ours, theirs in pairs)
        results["first_steps"], results["compared_steps"] = first, options.compare
        results["fused_rnn_chars_per_second"] = characters_per_second(fused, options)
        results["torch_nn_chars_per_second"] = characters_per_second(reference, options)
    results["sample"] = generate(fused.model, corpus.characters, options.device, options.sample)
    report(results, options)
    return results
