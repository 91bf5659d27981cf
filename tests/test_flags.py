"""fused_rnn::flags, the random bools of zoneout on a CPU: their share, their independence, and the same ones from a seed."""

from __future__ import annotations

import math

import pytest
import torch
from settings import Setting
from torch import Tensor

from fused_rnn import build_info
from fused_rnn._backend import has_cpu_kernels
from fused_rnn._regularisation import flags

if not has_cpu_kernels():
    pytest.skip("needs the compiled extension", allow_module_level=True)

CPU = torch.device("cpu")
op = torch.ops.fused_rnn.flags.default


def of_seed(seed: int, n: int, p: float) -> Tensor:
    return op(torch.tensor(seed), torch.empty(n), p)


@pytest.mark.parametrize("p", (1e-3, 0.1, 1 / 3, 0.5, 0.9, 0.999))
def test_share(p: float) -> None:
    """Of 4 million flags, within five standard deviations; so is that of neighbours, and of flags of two seeds, together."""
    n = 1 << 22
    one, other = of_seed(3, n, p), of_seed(4, n, p)

    def check(flags: Tensor, share: float) -> None:
        found = float(flags.double().mean())
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / flags.numel())

    check(one, p)
    check(one & other, p * p)
    for distance in (1, 2, 3, 4, 15, 16, 17, 128, 256):  # the generators take turns by 16, stores go by 256
        check((one & one.roll(distance))[distance:], p * p)


def test_certain() -> None:
    assert not of_seed(0, 1000, 0.0).any()
    assert of_seed(0, 1000, 1.0).all()


@pytest.mark.parametrize("n", (0, 1, 15, 16, 17, 255, 256, 257, 1000))
def test_every_instruction_set_makes_the_same(n: int, setting: Setting) -> None:
    """The numbers are those of 16 generators xoshiro128++ in turn, here written again."""
    expected = [number < 0.3 * 2**32 for number in numbers(5, n)]
    for name in build_info()["cpu_instruction_sets"]:
        setting("FUSED_RNN_CPU", name)
        assert of_seed(5, n, 0.3).tolist() == expected


def numbers(seed: int, n: int) -> list[int]:
    mask32, mask64 = (1 << 32) - 1, (1 << 64) - 1

    def splitmix() -> int:
        nonlocal seed
        seed = seed + 0x9E3779B97F4A7C15 & mask64
        z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & mask64
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask64
        return z ^ z >> 31

    def rotated(x: int, bits: int) -> int:
        return (x << bits | x >> 32 - bits) & mask32

    lanes = []
    for _ in range(16):
        ab, cd = splitmix(), splitmix()
        lanes.append([ab & mask32, ab >> 32, cd & mask32, cd >> 32])
    found = []
    for i in range(n):
        s = lanes[i % 16]
        found.append(rotated(s[0] + s[3] & mask32, 7) + s[0] & mask32)
        shifted = s[1] << 9 & mask32
        s[2] ^= s[0]
        s[3] ^= s[1]
        s[1] ^= s[2]
        s[0] ^= s[3]
        s[2] ^= shifted
        s[3] = rotated(s[3], 11)
    return found


def test_seeds_come_from_torchs_generator() -> None:
    torch.manual_seed(1)
    first, second = flags((3, 50), 0.5, CPU), flags((3, 50), 0.5, CPU)
    torch.manual_seed(1)
    assert torch.equal(flags((3, 50), 0.5, CPU), first) and not torch.equal(first, second)


@pytest.mark.parametrize("randomness", ("different", "same"))
def test_vmap(randomness: str) -> None:
    def kept(x: Tensor) -> Tensor:
        return torch.where(flags((100,), 0.5, CPU), x, 0)

    found = torch.func.vmap(kept, randomness=randomness)(torch.ones(3))
    assert 0 < found.sum() < 300
    assert torch.equal(found[0], found[1]) == torch.equal(found[1], found[2]) == (randomness == "same")


def test_opcheck() -> None:
    for like in (torch.empty(3, 4), torch.empty(3, 4).T):
        torch.library.opcheck(op, (torch.tensor(7), like, 0.3))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="seed: expected int64 without dimensions, got Int of shape"):
        op(torch.tensor(7, dtype=torch.int32), torch.empty(3), 0.5)
    with pytest.raises(ValueError, match="seed: expected int64 without dimensions"):
        op(torch.tensor([7]), torch.empty(3), 0.5)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="probability: expected 0 to 1, got"):
            op(torch.tensor(7), torch.empty(3), p)
