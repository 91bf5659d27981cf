"""csrc/torch's products by cuBLAS, alone, against a stand-in for cuBLAS on the simulated device (torch_host/cublas.cpp)."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ctypes import c_bool, c_char_p, c_int, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import builder
import torch
from simulator import H100, Simulator
from torch import Tensor
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
HOST = HERE / "torch_host"
SOURCES = ("gemm_cuda.cpp", "tf32_cuda.cpp")  # of csrc/torch
KERNELS = HERE / "kernels"
NOT_SUPPORTED, ARCH_MISMATCH, EXECUTION_FAILED = 15, 8, 13


class Kind(NamedTuple):
    """A line of cuda::MathKind."""

    number: int
    storage: torch.dtype
    sums: torch.dtype
    tf32: bool
    tolerance: float  # of a sum of numbers of size 1 or so


KINDS = {
    "fp64": Kind(0, torch.float64, torch.float64, False, 1e-14), "fp32": Kind(1, torch.float32, torch.float32, False, 1e-6),
    "tf32": Kind(2, torch.float32, torch.float32, True, 1e-6), "fp16": Kind(3, torch.float16, torch.float32, False, 1e-6),
    "bf16": Kind(4, torch.bfloat16, torch.float32, False, 1e-6),
}  # fmt: skip


class LibraryProduct(ctypes.Structure):
    """csrc/cuda/library_product.h."""

    _fields_ = [
        *(("math", c_int), ("rows", c_int64), ("columns", c_int64), ("inner", c_int64), ("a", c_void_p)),
        *(("a_stride", c_int64), ("b", c_void_p), ("b_transposed", c_bool), ("out", c_void_p)),
    ]


def build(replace: Mapping[str, Path] | None = None) -> Path:
    """The library of the products; replace: by the name of a source, a file to take its place."""
    include = [HOST / "include", HOST, builder.ROOT / "csrc"]
    flags = ["-std=c++20", "-O0", "-g0", "-fPIC", "-w", "-fvisibility=hidden", *(f"-I{folder}" for folder in include)]
    flags += [part for folder in cpp_extension.include_paths() for part in ("-isystem", folder)]
    sources = [
        KERNELS / "library_products.cpp",
        HOST / "cublas.cpp",
        *(builder.ROOT / "csrc" / "torch" / name for name in SOURCES),
    ]
    sources = [(replace or {}).get(source.name, source) for source in sources]
    headers = [p for folder in (*include, KERNELS) for p in sorted(folder.rglob("*.h"))]
    key = builder._hash(torch.__version__, *flags, *(p.read_bytes() for p in headers))
    builder.CACHE.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in sources:
        target = builder.CACHE / f"{source.stem}-{builder._hash(key, source.read_bytes())}.o"
        if not target.exists():
            builder._make(target, [builder.CXX, *flags, "-c", str(source)])
        objects.append(target)
    library = builder.CACHE / f"library-products-{builder._hash(*(o.name for o in objects))}.so"
    if not library.exists():
        folders = cpp_extension.library_paths()
        link = [*(f"-L{folder}" for folder in folders), "-ltorch_cpu", "-lc10", "-ldl"]
        builder._make(library, [builder.CXX, "-shared", *map(str, objects), *link])
    return library


class Products:
    """The library and its device."""

    def __init__(self, replace: Mapping[str, Path] | None = None) -> None:
        self.sim = Simulator(builder.build([KERNELS / "cublas.cu"]))
        os.environ["FUSED_RNN_SIMT_LIBRARY"] = str(self.sim.library)
        self.lib = ctypes.CDLL(str(build(replace)))
        self.lib.harness_message.restype = c_char_p
        self.lib.harness_has_tf32.restype = c_bool
        self.sim.reset(device=H100)

    def message(self) -> str:
        return self.lib.harness_message().decode()

    @contextmanager
    def device(self, status: int = 0, major: int = 9) -> Iterator[None]:
        """A device of another compute capability, whose cuBLAS answers with a status."""
        self.lib.torch_host_cublas(status, major)
        try:
            yield
        finally:
            self.lib.torch_host_cublas(0, 9)

    def rounded(self) -> int:
        """How many products have rounded their factors to TF32."""
        return self.lib.torch_host_tf32_products()

    def gemm(self, kind: Kind, a: Tensor, b: Tensor, transposed: bool, stream: int = 0) -> tuple[int, Tensor]:
        """Family gemm's product a b, or a b^T where transposed: what came back, and the result.

        a may have a stride from row to row.
        """
        self.sim.reset(device=H100)
        rows, inner = a.shape
        columns = b.shape[0 if transposed else 1]
        stride = a.stride(0)
        # Of a, the rows alone: what lies behind the last one is another's.
        a_memory = torch.as_strided(a, ((rows - 1) * stride + inner,), (1,))
        out = self.sim.out("out", rows * columns * torch.empty((), dtype=kind.sums).element_size())
        product = LibraryProduct(
            kind.number, rows, columns, inner, self.sim.put("a", a_memory), stride, self.sim.put("b", b), transposed, out
        )
        rc = self.lib.harness_product(ctypes.byref(product), c_void_p(stream))
        return rc, self.sim.get(out, (rows, columns), kind.sums)

    def tf32(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> tuple[int, Tensor]:
        """multiply_tf32 of matrices with any strides: what came back, and out with what lies between its rows."""
        self.sim.reset(device=H100)
        (rows, columns), inner = out.shape, a.shape[1]
        places = []
        for name, t in (("out", out), ("a", a), ("b", b)):
            length = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            memory = torch.as_strided(t, (length if t.numel() else 0,), (1,))
            places.append(self.sim.inout(name, memory) if name == "out" else self.sim.put(name, memory))
        sizes = (c_int64 * 3)(rows, columns, inner)
        strides = (c_int64 * 6)(*(stride for t in (out, a, b) for stride in t.stride()))
        rc = self.lib.harness_tf32(*map(c_void_p, places), sizes, strides, c_bool(add))
        length = 1 + (rows - 1) * out.stride(0) + (columns - 1) if out.numel() else 0
        return rc, self.sim.get(places[0] or 0, (length,), torch.float32)


def rounded(t: Tensor) -> Tensor:
    """To TF32's 10 bits of mantissa, in float64."""
    bits = t.contiguous().clone().view(torch.int32)
    return bits.add_(1 << 12).bitwise_and_(~((1 << 13) - 1)).view(torch.float32).double()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((actual.double() - expected).abs().max())
    assert error <= tolerance, f"off by {error:.3g}"  # NaN too


SIZES = ((3, 5, 7), (1, 4, 6), (6, 1, 3), (4, 7, 1), (1, 1, 1), (9, 6, 6))  # rows, columns, inner


def check_gemm(products: Products) -> None:
    """Every arithmetic, b as it lies and transposed, rows of a side by side and apart, by torch's switches either way."""
    generator = torch.Generator().manual_seed(0)
    for (kind, matmul), transposed, (rows, columns, inner), gap in itertools.product(
        itertools.product(KINDS.values(), (False, True)), (False, True), SIZES, (0, 5)
    ):
        a = torch.randn(rows, inner + gap, generator=generator, dtype=torch.float64).to(kind.storage)[:, :inner]
        b = torch.randn((columns, inner) if transposed else (inner, columns), generator=generator, dtype=torch.float64)
        b = b.to(kind.storage)
        with _matmul_switch(matmul):
            rc, out = products.gemm(kind, a, b, transposed)
        assert rc == 0, products.message()
        exact = [rounded(t) if kind.tf32 else t.double() for t in (a, b)]
        expected = exact[0] @ (exact[1].T if transposed else exact[1])
        assert_close(out, expected, kind.tolerance * max(1, inner))
        products.sim.check(0)


def check_refusals(products: Products) -> None:
    """What cuBLAS lacks is refused, so that the next family serves; other errors are errors. No other stream is taken."""
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    for status in (NOT_SUPPORTED, ARCH_MISMATCH):
        with products.device(status):
            rc, _ = products.gemm(KINDS["fp32"], a, b, False)
            assert rc == 1 and "cuBLAS has no such product" in products.message()
    with products.device(EXECUTION_FAILED):
        assert products.gemm(KINDS["fp32"], a, b, False)[0] == 2 and "cuBLAS status 13" in products.message()
        assert products.tf32(torch.zeros(2, 4), a, b, False)[0] == 2 and "cuBLAS status 13" in products.message()
    rc, _ = products.gemm(KINDS["fp32"], a, b, False, stream=256)
    assert rc == 2 and "torch's stream" in products.message()
    assert products.lib.harness_has_tf32()
    with products.device(major=7):
        assert not products.lib.harness_has_tf32()


def layouts(rows: int, columns: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A matrix in each way to lie."""
    yield torch.randn(rows, columns, generator=generator)
    yield torch.randn(columns, rows, generator=generator).T
    yield torch.randn(rows, columns + 3, generator=generator)[:, :columns]
    yield torch.randn(columns, rows + 2, generator=generator)[:, :rows].T
    yield torch.randn(1, columns, generator=generator).expand(rows, columns)
    yield torch.randn(rows, 1, generator=generator).expand(rows, columns)
    yield torch.randn(rows, 2 * columns, generator=generator)[:, ::2]
    yield torch.randn(2 * rows, columns, generator=generator)[::2]
    for stride in (0, 1, 100):  # of a dimension of size 1, where it means nothing
        if rows == 1:
            yield torch.randn(1, columns, generator=generator).as_strided((1, columns), (stride, 1))
        if columns == 1:
            yield torch.randn(rows, 1, generator=generator).as_strided((rows, 1), (1, stride))


def check_tf32(products: Products) -> None:
    """Matrices in every layout, rows of the result side by side and apart, added to it or not; sizes of 0."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, inner in (*SIZES, (3, 4, 0), (0, 4, 2), (3, 0, 2)):
        pairs = itertools.product(layouts(rows, inner, generator), layouts(inner, columns, generator))
        for index, (a, b) in enumerate(pairs):
            gap, add = (0, 4)[index % 2], index % 3 == 0
            memory = torch.randn(rows, columns + gap, generator=generator)
            out = memory[:, :columns]
            before = products.rounded()
            if not add:
                out.fill_(float("nan"))  # must not be read
            rc, flat = products.tf32(out, a, b, add)
            assert rc == 0, products.message()
            assert products.rounded() - before == bool(out.numel() and inner)
            if not out.numel():
                continue
            expected = memory.double()
            product = rounded(a) @ rounded(b) if inner else torch.zeros(rows, columns, dtype=torch.float64)
            expected[:, :columns] = product + (out if add else 0)
            assert_close(flat, expected.flatten()[: len(flat)], 1e-6 * max(1, inner))
            products.sim.check(0)


CHECKS = (check_gemm, check_refusals, check_tf32)


@contextmanager
def _matmul_switch(tf32: bool) -> Iterator[None]:
    """torch's switch for matrix products, which is not that of recurrent layers."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
