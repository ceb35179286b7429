// Runs one case of the CPU op on AVX2, so that callgrind can count the instructions of `measured`: ./driver CASE
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../csrc/cpu/steer.h"

using namespace steerkern;

// Valgrind knows no AVX-512, and what is not counted is not built.
namespace steerkern::cpu {
const Isa* avx512_isa() { return nullptr; }
const Isa* portable_isa() { return nullptr; }
}  // namespace steerkern::cpu

namespace {

struct Case {
  const char* name;
  Dtype dtype;
  int64_t rows, width;
  int directions;
  Norm norm;
  bool delta;
};

constexpr Case kCases[] = {
    {"norm alone, 1 x 2048, bf16", Dtype::kBfloat16, 1, 2048, 0, Norm::kLlama, false},
    {"K=1, 1 x 2048, bf16", Dtype::kBfloat16, 1, 2048, 1, Norm::kLlama, false},
    {"K=4, 1 x 2048, fp32", Dtype::kFloat32, 1, 2048, 4, Norm::kLlama, false},
    {"K=16, 8 x 2048, bf16", Dtype::kBfloat16, 8, 2048, 16, Norm::kLlama, false},
    {"residual add, K=1, 1 x 2048, bf16", Dtype::kBfloat16, 1, 2048, 1, Norm::kFp32, true},
    {"K=1, 3 x 897, fp16", Dtype::kFloat16, 3, 897, 1, Norm::kGemma, false},
};

// The bits of a small value of either sign, different from place to place and alike on every machine.
uint32_t bits(Dtype dtype, int64_t i) {
  const uint32_t sign = uint32_t(i * 7 % 3 == 0), mantissa = uint32_t(i * 37 % 113);
  if (dtype == Dtype::kFloat32) return sign << 31 | 0x3f000000u | mantissa << 16;
  if (dtype == Dtype::kBfloat16) return sign << 15 | 0x3f00u | mantissa;
  return sign << 15 | 0x3800u | mantissa << 3;
}

std::vector<char> elements(Dtype dtype, int64_t count) {
  const size_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  std::vector<char> out(size * count);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t value = bits(dtype, i);
    std::memcpy(&out[size * i], &value, size);
  }
  return out;
}

}  // namespace

extern "C" __attribute__((noinline)) int64_t measured(const cpu::Call& call, Dtype dtype) {
  return cpu::steer(call, dtype, 1);
}

int main(int argc, char** argv) {
  const Case* chosen = nullptr;
  for (const Case& c : kCases) {
    if (argc == 1) std::printf("%s\n", c.name);
    if (argc == 2 && !std::strcmp(argv[1], c.name)) chosen = &c;
  }
  if (argc == 1) return 0;
  if (!chosen || !cpu::set_isa("avx2")) return 2;
  const Case& c = *chosen;
  const int k = c.directions;

  std::vector<float> bank(k * c.width), fields(7 * k, 0.0f);
  std::vector<int32_t> links(4 * k, -1), slot(c.rows, k ? 0 : -1);
  for (size_t i = 0; i < bank.size(); ++i) bank[i] = float(int(i * 29 % 17) - 8) / (8 * std::sqrt(float(c.width)));
  for (int e = 0; e < k; ++e) {
    links[e] = e, links[3 * k + e] = kRead | kWrite;
    const float ablation[7] = {0, 1, -INFINITY, INFINITY, 1, -INFINITY, INFINITY};
    for (int f = 0; f < 7; ++f) fields[f * k + e] = ablation[f];
  }
  const int32_t span[3] = {0, k, 0};
  const float gain = 1;
  Tables tables;
  tables.bank = bank.data(), tables.links = links.data(), tables.fields = fields.data();
  tables.span = span, tables.gain = &gain;
  tables.rows = k, tables.entries = k, tables.slots = 1;

  auto h = elements(c.dtype, c.rows * c.width), weight = elements(c.dtype, c.width), y = h, delta = h;
  cpu::Call call{};
  call.tables = &tables, call.width = c.width, call.norm = c.norm, call.eps = 1e-6f, call.n = c.rows;
  call.h = h.data(), call.h_stride = c.width, call.slot = slot.data(), call.weight = weight.data(), call.y = y.data();
  if (c.delta) call.delta = delta.data(), call.delta_stride = c.width;
  return measured(call, c.dtype) == -1 ? 0 : 1;
}
