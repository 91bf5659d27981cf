"""What csrc/torch tells cuBLAS, against a stand-in for it on the simulated device; and proof that wrong arguments are found.

The table of all mutants is written to build/simt/library-products-mutants.txt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import builder
import pytest
from library_products import CHECKS, Products
from mutation_survey import check, outcome_of

# Of each file of csrc/torch: a pattern that it has once, and what takes its place.
MUTANTS = {
    "gemm_cuda.cpp": [
        # The types of each arithmetic.
        (r"CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F", "CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_32F"),
        (r"CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F", "CUDA_R_64F, CUDA_R_32F, CUBLAS_COMPUTE_64F"),
        (r"CUDA_R_64F, CUDA_R_64F, CUBLAS_COMPUTE_64F", "CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F"),
        (r"CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F\}", "CUDA_R_32F, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32}"),
        (r"CUBLAS_COMPUTE_32F_FAST_TF32", "CUBLAS_COMPUTE_32F"),
        (r"CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F", "CUDA_R_16F, CUDA_R_16F, CUBLAS_COMPUTE_32F"),
        (r"CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F", "CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_16F"),
        (r"CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F", "CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F"),
        (r"CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F", "CUDA_R_16F, CUDA_R_32F, CUBLAS_COMPUTE_32F"),
        (r"CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F", "CUDA_R_16BF, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_16BF"),
        (r"types\.sums", "types.storage"),
        # The handle and its mode.
        (r"  const at::NoTF32Guard by_type_alone;\n", ""),
        (r"  TORCH_INTERNAL_ASSERT\(c10.*\n", ""),
        # Scalars.
        (r"is_double = p\.math == cuda::MathKind::kFp64", "is_double = false"),
        (r"is_double = p\.math == cuda::MathKind::kFp64", "is_double = true"),
        (r"one_double = 1,", "one_double = 2,"),
        (r"zero_double = 0;", "zero_double = 1;"),
        (r"one_float = 1,", "one_float = 0,"),
        (r"zero_float = 0;", "zero_float = 1;"),
        (r"p\.inner, one, p\.b", "p.inner, zero, p.b"),
        (r"p\.a_stride, zero", "p.a_stride, one"),
        # Which matrix is transposed, their order and sizes.
        (r"p\.b_transposed \? CUBLAS_OP_T : CUBLAS_OP_N", "p.b_transposed ? CUBLAS_OP_N : CUBLAS_OP_T"),
        (r"p\.b_transposed \? CUBLAS_OP_T : CUBLAS_OP_N", "CUBLAS_OP_N"),
        (r"p\.b_transposed \? CUBLAS_OP_T : CUBLAS_OP_N", "CUBLAS_OP_T"),
        (r"CUBLAS_OP_N, p\.columns", "CUBLAS_OP_T, p.columns"),
        (r"p\.columns, p\.rows, p\.inner", "p.rows, p.columns, p.inner"),
        (r"p\.columns, p\.rows, p\.inner", "p.columns, p.inner, p.rows"),
        (r"p\.columns, p\.rows, p\.inner", "p.inner, p.rows, p.columns"),
        (r"p\.columns, p\.rows, p\.inner", "p.columns, p.rows - 1, p.inner"),
        (r"p\.columns, p\.rows, p\.inner", "p.columns, p.rows, p.inner - 1"),
        (r"p\.columns, p\.rows, p\.inner", "p.columns, p.rows, p.inner + 1"),
        (r"one, p\.b,", "one, p.a,"),
        (r"p\.columns, p\.a,", "p.columns, p.b,"),
        # Leading dimensions.
        (r"p\.b_transposed \? p\.inner : p\.columns", "p.b_transposed ? p.columns : p.inner"),
        (r"p\.b_transposed \? p\.inner : p\.columns", "p.inner"),
        (r"p\.b_transposed \? p\.inner : p\.columns", "p.columns"),
        (r"p\.a_stride, zero", "p.inner, zero"),
        (r"types\.sums, p\.columns", "types.sums, p.rows"),
        (r"types\.sums, p\.columns", "types.sums, p.columns + 1"),
        # What it answers.
        (r"status == CUBLAS_STATUS_NOT_SUPPORTED \|\| ", ""),
        (r" \|\| status == CUBLAS_STATUS_ARCH_MISMATCH", ""),
        (r"TORCH_CUDABLAS_CHECK\(status\);", ""),
    ],
    "tf32_cuda.cpp": [
        # How an operand lies.
        (r"if \(!describe\(\)\) \{", "if (describe(), false) {"),
        (r"owner = t\.contiguous\(\);", ""),
        (r"columns == 1 \|\| owner\.stride\(1\) == 1", "owner.stride(1) == 1"),
        (r"columns == 1 \|\| owner\.stride\(1\) == 1", "true"),
        (r"operation = CUBLAS_OP_N;", "operation = CUBLAS_OP_T;"),
        (r"rows == 1 \? columns : owner\.stride\(0\)", "owner.stride(0)"),
        (r"rows == 1 \? columns : owner\.stride\(0\)", "columns"),
        (r"if \(stride >= columns\) return true;", "return true;"),
        (r"rows == 1 \|\| owner\.stride\(0\) == 1", "owner.stride(0) == 1"),
        (r"rows == 1 \|\| owner\.stride\(0\) == 1", "true"),
        (r"operation = CUBLAS_OP_T;", "operation = CUBLAS_OP_N;"),
        (r"columns == 1 \? rows : owner\.stride\(1\)", "owner.stride(1)"),
        (r"columns == 1 \? rows : owner\.stride\(1\)", "rows"),
        (r"if \(stride >= rows\) return true;", "return true;"),
        (r"data = owner\.const_data_ptr", "data = t.const_data_ptr"),
        # Nothing to multiply.
        (r"if \(M == 0 \|\| N == 0\) return;", ""),
        (r"if \(K == 0\) \{", "if (false) {"),
        (r"if \(!add\) out\.zero_\(\);", ""),
        (r"if \(!add\) out\.zero_\(\);", "out.zero_();"),
        # The call.
        (r"beta = add \? 1 : 0", "beta = 0"),
        (r"beta = add \? 1 : 0", "beta = 1"),
        (r"one = 1,", "one = 2,"),
        (r"right\.operation, left\.operation", "left.operation, right.operation"),
        (r"N, M, K, &one", "M, N, K, &one"),
        (r"N, M, K, &one", "N, M, K - 1, &one"),
        (r"right\.data, CUDA_R_32F, right\.stride", "left.data, CUDA_R_32F, right.stride"),
        (r"right\.data, CUDA_R_32F, right\.stride", "right.data, CUDA_R_32F, left.stride"),
        (r"left\.data, CUDA_R_32F, left\.stride", "left.data, CUDA_R_32F, right.stride"),
        (r"M == 1 \? N : out\.stride\(0\)", "N"),
        (r"CUBLAS_COMPUTE_32F_FAST_TF32", "CUBLAS_COMPUTE_32F"),
        (r"TORCH_CUDABLAS_CHECK\((cublasGemmEx_64[^;]*)\);", r"static_cast<void>(\1);"),
        (r"->major >= 8", "->major >= 7"),
        (r"->major >= 8", "->major >= 10"),
    ],
}

# Mutants that no test can catch, because the program means the same without the change, and why.
EQUIVALENT = {
    r"tf32_cuda.cpp: columns == 1 \|\| owner\.stride\(1\) == 1 -> owner.stride(1) == 1": "as a transpose, or a copy",
    r"tf32_cuda.cpp: rows == 1 \|\| owner\.stride\(0\) == 1 -> owner.stride(0) == 1": "as a copy",
    r"tf32_cuda.cpp: rows == 1 \? columns : owner\.stride\(0\) -> owner.stride(0)": "as a transpose; there is one row",
    r"tf32_cuda.cpp: columns == 1 \? rows : owner\.stride\(1\) -> owner.stride(1)": "as a copy; there is one column",
}


@pytest.fixture(scope="module")
def products() -> Products:
    return Products()


@pytest.mark.parametrize("checked", CHECKS, ids=lambda f: f.__name__)
def test_products(products: Products, checked: Callable[[Products], None]) -> None:
    checked(products)


def mutants() -> Iterator[tuple[str, str, str]]:
    """Name, file and text of each."""
    for file, changes in MUTANTS.items():
        text = (builder.ROOT / "csrc" / "torch" / file).read_text()
        for pattern, instead in changes:
            changed, count = re.subn(pattern, instead, text)
            assert count == 1, f"{file} has {pattern!r} {count} times"
            yield f"{file}: {pattern} -> {instead}", file, changed


def caught(file: str, text: str, folder: Path) -> str:
    (folder / file).write_text(text)

    def run() -> None:
        made = Products({file: folder / file})
        for checked in CHECKS:
            checked(made)

    return outcome_of(run, limit=60)


@pytest.mark.slow
def test_wrong_arguments_are_caught(tmp_path: Path) -> None:
    unchanged = (builder.ROOT / "csrc" / "torch" / "gemm_cuda.cpp").read_text()
    assert caught("gemm_cuda.cpp", unchanged, tmp_path) == ""
    outcomes = {name: caught(file, text, tmp_path) for name, file, text in mutants()}
    check(outcomes, EQUIVALENT, "library-products-mutants.txt")
