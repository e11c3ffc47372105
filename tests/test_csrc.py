"""The C++ sources themselves: any C++17 compiler, no warnings, no undefined behaviour."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swkernels.backends import cpu, cuda

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
CPU_SOURCES = [*sorted((CSRC / "cpu").glob("*.cpp")), CSRC / "status.cpp"]
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]

if not COMPILERS:
    pytest.skip("neither g++ nor clang++ is installed", allow_module_level=True)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_no_warnings(compiler):
    command = [compiler, "-std=c++17", "-fsyntax-only", *WARNINGS, *map(str, CPU_SOURCES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_header_is_plain_c(tmp_path):
    source = tmp_path / "header.c"
    source.write_text('#include "swkernels.h"\nint main(void) { return SWK_OK; }\n')
    command = [COMPILERS[0].replace("++", "cc").replace("clangcc", "clang"), "-std=c99"]
    command += [*WARNINGS[:3], "-Werror", "-fsyntax-only", "-I", str(CSRC), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_python_declares_what_the_header_does():
    """As many arguments, of the same kinds, in the same order."""
    header = re.sub(r"//.*", "", (CSRC / "swkernels.h").read_text())
    declared = dict(re.findall(r"SWK_API int (swk_\w+)\(([^)]*)\)", header))
    kinds = {"int": "c_int", "int64_t": "c_long", "float": "c_float", "double": "c_double"}

    def of_header(name):
        types = [re.sub(r"\bconst\b", "", a).split() for a in declared[name].split(",")]
        names = ["".join(words[:-1]) for words in types]
        return ["c_void_p" if name.endswith("*") else kinds[name] for name in names]

    signatures = cpu._SIGNATURES | cuda._SIGNATURES
    for name, arguments in signatures.items():
        assert [kind.__name__ for kind in arguments] == of_header(name), name
    integers = {name for name in declared if name.startswith(("swk_cpu", "swk_cuda"))}
    assert integers == set(signatures)


SANITIZED = """
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "swkernels.h"

// Quantizes, dequantizes and multiplies by a matrix of 37 rows, every buffer of exactly its size.
int packed(int dtype, int64_t H, int64_t r, int64_t c, int code, int symmetric, int clip, int isa) {
  const int64_t D = 37, size = dtype == SWK_FLOAT32 ? 4 : 2, k = 5;
  const auto length = [](int64_t n) { return static_cast<size_t>(n); };
  const int64_t blocks = r ? (D + r - 1) / r * ((H + c - 1) / c) : (D * H + c - 1) / c;
  const int half = clip % 2, scale_dtype = half ? SWK_FLOAT16 : SWK_FLOAT32;
  std::vector<unsigned char> w(length(D * H * size)), scales(length(blocks * (half ? 2 : 4)));
  std::vector<unsigned char> codes(length(code == SWK_INT8 ? D * H : (D * H + 1) / 2));
  for (auto& byte : w) byte = static_cast<unsigned char>(std::rand() % 64);  // finite
  std::vector<int32_t> zeros(length(symmetric ? 0 : blocks));
  int32_t* const zero = symmetric ? nullptr : zeros.data();
  const std::vector<int32_t> positions{0, 1, 64, static_cast<int32_t>(D * H / 2),
                                       static_cast<int32_t>(D * H - 1)};
  const std::vector<float> factors{1.0f, 0.9f, 0.8f};
  const double value[] = {0, 2, 1.5, 97, 3, 0.8};
  int status = swk_cpu_block_quantize(
      w.data(), dtype, D, H, r, c, code, symmetric, half ? 13 : 20, clip, value[clip],
      factors.data(), 3, positions.data(), k, scales.data(), scale_dtype, zero, codes.data(), 0, 2,
      isa);
  const int64_t begin = clip % 3, end = D * H - clip % 2;
  std::vector<unsigned char> kept(w.begin(), w.begin() + k * size);
  std::vector<unsigned char> out(length((end - begin) * size));
  status |= swk_cpu_block_dequantize(codes.data(), D, H, r, c, code, symmetric, scales.data(),
                                     scale_dtype, zero, 4, positions.data(), kept.data(), dtype, k,
                                     begin, end, out.data(), dtype, 2, isa);
  for (int64_t T : {0, 1, 3, 18}) {
    std::vector<unsigned char> x(length(T * H * size)), y(length(T * D * size));
    for (auto& byte : x) byte = static_cast<unsigned char>(std::rand() % 64);
    status |= swk_cpu_quant_linear(x.data(), dtype, H, T, codes.data(), D, H, r, c, code,
                                   symmetric, scales.data(), scale_dtype, zero, 4,
                                   positions.data(), kept.data(), dtype, k, w.data(), y.data(), 2,
                                   isa);
  }
  return status;
}

int main() {
  for (int isa = SWK_ISA_SCALAR; isa <= SWK_ISA_AVX512; ++isa) {
    if (!swk_cpu_isa(isa)) continue;
    for (int dtype = SWK_FLOAT32; dtype <= SWK_FLOAT16; ++dtype) {
      for (int64_t T : {0, 1, 9, 30, 70}) for (int64_t C : {1, 63, 700, 20011}) {
        if (T == 70 && C > 700) continue;  // it takes long
        const size_t bytes = static_cast<size_t>(T * C) * (dtype == SWK_FLOAT32 ? 4 : 2);
        // Of exactly the size, so that a read or a write past the end is an error.
        std::vector<unsigned char> x(bytes), h(bytes);
        for (auto& byte : x) byte = static_cast<unsigned char>(std::rand());
        std::vector<int64_t> keys(static_cast<size_t>(C)), tokens(static_cast<size_t>(T));
        for (auto& token : tokens) token = std::rand() % 90 - 20;
        const int64_t* const index = T == 9 ? tokens.data() : nullptr;
        int status = swk_cpu_column_absmax(x.data(), dtype, T, C, C, keys.data(), index, 3, 2, isa);
        for (int act = SWK_SILU; act <= SWK_RELU; ++act) {
          status |= swk_cpu_glu_absmax(x.data(), C, x.data(), C, h.data(), C, dtype, act, T, C,
                                       keys.data(), index, 3, 2, isa);
        }
        if (status) return std::printf("status %d", status), 1;
      }
      for (int64_t T : {0, 1, 600}) for (int64_t k : {1, 40, 17000}) {
        const int64_t D = 130, H = 140, size = dtype == SWK_FLOAT32 ? 4 : 2;
        const auto bytes = [&](int64_t n) { return static_cast<size_t>(n * size); };
        std::vector<unsigned char> x(bytes(T * H)), y(bytes(T * D)), grad(bytes(D * H));
        std::vector<int32_t> rows(static_cast<size_t>(k)), cols(static_cast<size_t>(k));
        for (int64_t i = 0; i < k; ++i) {  // sorted, different
          rows[static_cast<size_t>(i)] = static_cast<int32_t>(i * (D * H / k) / H);
          cols[static_cast<size_t>(i)] = static_cast<int32_t>(i * (D * H / k) % H);
        }
        std::vector<float> values(static_cast<size_t>(k), 0.5f);
        int status = swk_cpu_sampled_grad(y.data(), dtype, D, x.data(), dtype, H, T, D, H,
                                          rows.data(), cols.data(), k, values.data(), 2, isa);
        status |= swk_cpu_sparse_linear(x.data(), dtype, H, y.data(), dtype, D, T, D, H,
                                        values.data(), rows.data(), cols.data(), k, 2, isa);
        status |= swk_cpu_masked_grad(grad.data(), dtype, H, D, H, rows.data(), cols.data(), k,
                                      0.5f, 2, isa);
        if (status) return std::printf("status %d", status), 1;
      }
    }
    int clip = 0;
    for (int code = SWK_INT4; code <= SWK_FP4; ++code) for (int symmetric : {1, 0}) {
      if (!symmetric && code > SWK_INT8) continue;
      const int64_t sizes[][3] = {{131, 0, 7},  {131, 8, 16},   {256, 0, 64},
                                  {256, 0, 16}, {256, 37, 256}, {131, 0, 131}};
      for (const auto& size : sizes) {
        for (int dtype = SWK_FLOAT32; dtype <= SWK_FLOAT16; ++dtype) {
          clip = (clip + 1) % (SWK_CLIP_SEARCH + 1);
          const int status = packed(dtype, size[0], size[1], size[2], code, symmetric, clip, isa);
          if (status) return std::printf("status %d", status), 1;
        }
      }
    }
    for (int64_t N : {1, 4, 131, 700}) {
      std::vector<float> out(static_cast<size_t>(3 * N));
      const int status = swk_cpu_dropout(out.data(), 5, 8, N, 77, 1 << 30, 2.0f, 2, isa);
      if (status) return std::printf("status %d", status), 1;
    }
    for (int64_t k : {1, 50, 3000}) {
      const int64_t D[2] = {70, 3}, H[2] = {530, 31}, r[2] = {3, 1};
      std::vector<float> B0(70 * 3), A0(3 * 530), B1(3), A1(31);
      for (auto* factor : {&B0, &A0, &B1, &A1}) {
        for (auto& value : *factor) value = static_cast<float>(std::rand() % 9 - 4);
      }
      const float* B[2] = {B0.data(), B1.data()};
      const float* A[2] = {A0.data(), A1.data()};
      std::vector<double> sums(static_cast<size_t>(k));
      std::vector<int64_t> places(static_cast<size_t>(k)), which(static_cast<size_t>(k));
      const int status = swk_cpu_topk_low_rank(B, A, D, H, r, 2, k, sums.data(), places.data(),
                                               which.data(), 2, isa);
      if (status) return std::printf("status %d", status), 1;
    }
    for (int64_t k : {0, 1, 3000, 100000}) {
      // 1,000 x 300, its transpose, every other column, one row; of each type.
      const int64_t D[4] = {1000, 300, 1000, 1}, H[4] = {300, 1000, 150, 300000};
      const int64_t strides[8] = {300, 1, 1, 300, 300, 2, 300000, 1};
      std::vector<std::vector<unsigned char>> held;
      std::vector<const void*> x;
      std::vector<int> dtypes;
      std::vector<int64_t> all_D, all_H, all_strides;
      for (int dtype = SWK_FLOAT32; dtype <= SWK_FLOAT8_E5M2; ++dtype) {
        const size_t size = dtype == SWK_FLOAT32 ? 4 : dtype <= SWK_FLOAT16 ? 2 : 1;
        held.emplace_back(300000 * size);
        for (auto& byte : held.back()) byte = static_cast<unsigned char>(std::rand() % 64);
        for (int i = 0; i < 4; ++i) {
          x.push_back(held.back().data());
          dtypes.push_back(dtype);
          all_D.push_back(D[i]);
          all_H.push_back(H[i]);
          all_strides.insert(all_strides.end(), {strides[2 * i], strides[2 * i + 1]});
        }
      }
      std::vector<float> values(static_cast<size_t>(k));
      std::vector<int64_t> places(values.size()), which(values.size()), nan(2);
      const auto run = [&](int64_t matrices) {
        return swk_cpu_topk_abs(x.data(), dtypes.data(), all_D.data(), all_H.data(),
                                all_strides.data(), matrices, k, values.data(), places.data(),
                                which.data(), nan.data(), 3, isa);
      };
      int status = run(20) | run(1);
      held[1][301] = 0xFF, held[1][300] = 0xFF;  // NaN in the 2nd type, element 150
      if (k > 0 && (run(20) != SWK_NOT_A_NUMBER || nan[0] != 4 || nan[1] != 150)) status = -1;
      if (status) return std::printf("status %d", status), 1;
    }
  }
  return 0;
}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the sanitizers need gcc or clang on Unix")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(tmp_path, sanitizer):
    """No access out of bounds, no undefined behaviour, no data race."""
    (tmp_path / "main.cpp").write_text(SANITIZED)
    program = tmp_path / "main"
    command = [
        *(COMPILERS[0], "-std=c++17", "-O0", "-g", f"-fsanitize={sanitizer}", "-pthread"),
        *("-fno-sanitize-recover=all", "-I", str(CSRC), str(tmp_path / "main.cpp")),
        *(*map(str, CPU_SOURCES), "-o", str(program)),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
