"""Times what fused_rnn.integrations replaces, before and after, turn by turn on the same layers and data.

python benchmarks/integrations.py                            # a table of every project that is installed
python benchmarks/integrations.py --projects sb3 --threads 2
python benchmarks/integrations.py --steps 64 --batch 32 --hidden 256
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")

import torch

import fused_rnn
from fused_rnn import build_info, integrations


class Case(NamedTuple):
    """One line: ``run`` is called by itself and inside of ``enabled``."""

    name: str
    run: Callable[[], object]


def sb3_cases(options: argparse.Namespace) -> Iterator[Case]:
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    steps, batch, hidden = options.steps, options.batch, options.hidden
    states = (torch.zeros(1, batch, hidden), torch.zeros(1, batch, hidden))
    starts = (torch.rand(batch, steps) < 0.02).float()
    starts[:, 0] = 1
    for size, what in ((16, "16 observed numbers"), (hidden, f"{hidden} features of a network that learns")):
        layer = torch.nn.LSTM(size, hidden)
        features = torch.randn(batch * steps, size, requires_grad=size == hidden)

        def update(layer: Any = layer, features: torch.Tensor = features) -> None:
            # By its name: what is enabled is the class's.
            RecurrentActorCriticPolicy._process_sequence(features, states, starts.flatten(), layer)[0].sum().backward()

        yield Case(f"RecurrentPPO: an update's LSTM on {what}, forward and backward", update)

    def collect() -> None:
        with torch.no_grad():
            RecurrentActorCriticPolicy._process_sequence(features[:batch], states, starts[:, 0], layer)

    yield Case("RecurrentPPO: a step of the LSTM while collecting", collect)
    yield Case("RecurrentPPO: train(), all of the update", ppo_update(options))


def ppo_update(options: argparse.Namespace) -> Callable[[], object]:
    """An agent's train() on experience of random episodes: one epoch, one batch of steps * batch transitions."""
    import gymnasium
    import sb3_contrib
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env(lambda: gymnasium.make("CartPole-v1"), n_envs=options.batch, seed=0)
    agent = sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy",
        envs,
        n_steps=options.steps,
        batch_size=options.steps * options.batch,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": options.hidden},
    )
    agent.learn(options.steps * options.batch)
    return agent.train


def torchrl_cases(options: argparse.Namespace) -> Iterator[Case]:
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

    steps, batch, hidden = options.steps, options.batch, options.hidden
    data = TensorDict(
        {"x": torch.randn(batch, steps, hidden), "is_init": torch.rand(batch, steps, 1) < 0.02}, [batch, steps]
    )
    backends: list[tuple[str, dict[str, Any]]] = [("pad", {}), ("Python layer", {"python_based": True})]
    if importlib.util.find_spec("hoptorch") is not None:
        backends.append(("scan", {"recurrent_backend": "scan"}))
    for kind, states in ((LSTMModule, ["h", "c"]), (GRUModule, ["h"])):
        for name, choice in backends:
            keys = {"in_keys": ["x", *states], "out_keys": ["y", *(("next", state) for state in states)]}
            module = kind(hidden, hidden, **keys, **choice)

            def run(module: Callable[..., Any] = module) -> None:
                with set_recurrent_mode(True):
                    module(data.clone())["y"].sum().backward()

            yield Case(f"TorchRL: {kind.__name__}, {name}, forward and backward", run)


def keras_cases(options: argparse.Namespace) -> Iterator[Case]:
    import keras

    steps, batch, hidden = options.steps, options.batch, options.hidden
    x = torch.randn(batch, steps, hidden)
    mask = torch.arange(steps) < torch.randint(steps // 2, steps + 1, (batch, 1))
    layers = keras.layers
    kinds: list[tuple[str, Any, Any]] = [
        ("LSTM", layers.LSTM(hidden, return_sequences=True), None),
        ("LSTM, padded", layers.LSTM(hidden, return_sequences=True), mask),
        ("GRU", layers.GRU(hidden, return_sequences=True), None),
        ("GRU, reset_after=False", layers.GRU(hidden, return_sequences=True, reset_after=False), None),
        ("SimpleRNN", layers.SimpleRNN(hidden, return_sequences=True), None),
        ("RNN(LSTMCell)", layers.RNN(layers.LSTMCell(hidden), return_sequences=True), None),
    ]
    for name, layer, given in kinds:
        layer.build(tuple(x.shape))

        def run(layer: Any = layer, given: Any = given) -> None:
            layer(x, mask=given).sum().backward()

        yield Case(f"Keras: {name}, forward and backward", run)
        if name in ("LSTM", "GRU"):

            def infer(layer: Any = layer) -> None:
                with torch.no_grad():
                    layer(x)

            yield Case(f"Keras: {name}, inference", infer)


def opacus_cases(options: argparse.Namespace) -> Iterator[Case]:
    import opacus.layers
    from opacus import GradSampleModule

    steps, batch, hidden = options.steps, options.batch, options.hidden
    x = torch.randn(batch, steps, hidden)
    for name in ("LSTM", "GRU"):
        plain = getattr(fused_rnn, name)(hidden, hidden, batch_first=True)
        private = GradSampleModule(getattr(opacus.layers, f"DP{name}")(hidden, hidden, batch_first=True))

        def run(model: Any = private) -> None:
            for parameter in model.parameters():
                parameter.grad = parameter.grad_sample = None
            model(x)[0].sum().backward()

        def without(model: Any = plain) -> None:
            model.zero_grad()
            model(x)[0].sum().backward()

        yield Case(f"Opacus: DP{name}, forward, backward and per-sample gradients", run)
        yield Case(f"for comparison: fused_rnn.{name}, forward and backward without them", without)


CASES = {
    "sb3": ("sb3-contrib", "sb3_contrib", sb3_cases),
    "torchrl": ("torchrl", "torchrl", torchrl_cases),
    "keras": ("keras", "keras", keras_cases),
    "opacus": ("opacus", "opacus", opacus_cases),
}


def seconds(run: Callable[[], object], around: AbstractContextManager[None], clock: Callable[[], float]) -> float:
    with around:
        began = clock()
        run()
        return clock() - began


def measure(run: Callable[[], object], module: Any, options: argparse.Namespace) -> tuple[float, float, float]:
    """Medians in ms before and after, and the median of the ratios of neighbours in time."""
    pairs = []
    clock = time.process_time if options.processor_time else time.perf_counter
    stop = time.perf_counter() + options.seconds
    seconds(run, module.enabled(), clock)
    while len(pairs) < 3 or (time.perf_counter() < stop and len(pairs) < options.rounds):
        pairs.append((seconds(run, nullcontext(), clock), seconds(run, module.enabled(), clock)))
    before, after = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
    return before, after, statistics.median(b / a for b, a in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--projects", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=128, help="T")
    parser.add_argument("--batch", type=int, default=16, help="B")
    parser.add_argument("--hidden", type=int, default=128, help="H, and the input's size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--processor-time", action="store_true", help="the process's, for a machine that is busy: one thread"
    )
    parser.add_argument("--rounds", type=int, default=21, help="at most, of each case")
    parser.add_argument("--seconds", type=float, default=10, help="after which no further round of a case begins")
    options = parser.parse_args()
    if options.processor_time:
        options.threads = 1
    torch.set_num_threads(options.threads)
    versions = {}
    lines = []
    for project in options.projects:
        distribution, package, cases = CASES[project]
        if importlib.util.find_spec(package) is None:
            print(f"{distribution} is not installed", file=sys.stderr)
            continue
        versions[distribution] = importlib.metadata.version(distribution)
        torch.manual_seed(0)
        for case in cases(options):
            before, after, ratio = measure(case.run, getattr(integrations, project), options)
            lines.append(f"| {case.name} | {before:.3g} | {after:.3g} | {ratio:.1f} |")
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    clock = "processor" if options.processor_time else "wall"
    isa = build_info()["cpu_instruction_set"]
    print(
        f"T={options.steps} B={options.batch} I=H={options.hidden}, float32, {options.threads} threads, {isa}, {clock} time,"
    )
    print(f"{platform.machine()}, torch {torch.__version__}, {found}, {date.today()}")
    print("\n| what | before, ms | after, ms | times faster |\n|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
