// What a rescale does to the tensors of layers of one shape, for CPUs: each of the three operations takes all layers
// at once and passes once over memory. `kernels.py` is the reference for what they compute, `native.py` checks what
// they are given: contiguous tensors of float32, and of bfloat16 with its lower half for a merge.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using at::TensorList;

// Numbers that are treated as one: GCC and Clang cut them up for processors with shorter registers.
constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
constexpr int64_t kDoubles = kLanes / 2;
typedef double Doubles __attribute__((vector_size(kDoubles * sizeof(double))));
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef int32_t SignedBits __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint16_t Upper __attribute__((vector_size(kLanes * sizeof(uint16_t))));
typedef int16_t Lower __attribute__((vector_size(kLanes * sizeof(int16_t))));

template <typename T>
T loaded(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
void stored(void* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

// Rows of a weight that share what is loaded of lora_A.
constexpr int64_t kRows = 4;
// Rank-one products that are written out one after the other, without a loop.
constexpr int64_t kUnrolled = 8;
// Columns of lora_A and its gradient that are in the cache in double precision at a time.
constexpr int64_t kTile = 256;
// Entries that are worth another thread.
constexpr int64_t kGrain = 1 << 14;

// ---- Grams ----------------------------------------------------------------------------------------------------------

// Sum of the outer products of the rows of [first, second], both rows × rank.
void gram_of_columns(const float* first, const float* second, int64_t rows, int64_t rank, double* gram) {
  const int64_t k = 2 * rank;
  std::vector<double> tile(kRows * k);
  const double* const x[kRows] = {tile.data(), tile.data() + k, tile.data() + 2 * k, tile.data() + 3 * k};
  for (int64_t i = 0; i < rows; i += kRows) {
    const int64_t count = std::min(kRows, rows - i);
    if (count < kRows) std::fill(tile.begin(), tile.end(), 0);
    for (int64_t q = 0; q < count; ++q) {
      std::copy_n(first + (i + q) * rank, rank, tile.data() + q * k);
      std::copy_n(second + (i + q) * rank, rank, tile.data() + q * k + rank);
    }
    for (int64_t a = 0; a < k; ++a) {
      double* const out = gram + a * k;
#pragma omp simd
      for (int64_t b = 0; b < k; ++b) {
        out[b] += x[0][a] * x[0][b] + x[1][a] * x[1][b] + x[2][a] * x[2][b] + x[3][a] * x[3][b];
      }
    }
  }
}

// Inner products of the rows of [first; second], both rank × columns.
void gram_of_rows(const float* first, const float* second, int64_t columns, int64_t rank, double* gram) {
  const int64_t k = 2 * rank;
  std::vector<double> tile(k * kTile);
  for (int64_t start = 0; start < columns; start += kTile) {
    const int64_t width = std::min(kTile, columns - start);
    if (width < kTile) std::fill(tile.begin(), tile.end(), 0);
    for (int64_t a = 0; a < k; ++a) {
      const float* const from = a < rank ? first + a * columns : second + (a - rank) * columns;
      std::copy_n(from + start, width, tile.data() + a * kTile);
    }
    for (int64_t a = 0; a < k; ++a) {
      for (int64_t b = 0; b <= a; ++b) {
        const double* const x = tile.data() + a * kTile;
        const double* const y = tile.data() + b * kTile;
        // More than one sum, because the next addition to one waits for the last.
        Doubles sum[kRows] = {};
        for (int64_t j = 0; j < kTile; j += kRows * kDoubles) {
          for (int64_t q = 0; q < kRows; ++q) {
            sum[q] += loaded<Doubles>(x + j + q * kDoubles) * loaded<Doubles>(y + j + q * kDoubles);
          }
        }
        const Doubles in_all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        for (int64_t q = 0; q < kDoubles; ++q) gram[a * k + b] += in_all[q];
      }
    }
  }
  for (int64_t a = 0; a < k; ++a) {
    for (int64_t b = 0; b < a; ++b) gram[b * k + a] = gram[a * k + b];
  }
}

std::tuple<Tensor, Tensor> grams(TensorList lora_B, TensorList grad_B, TensorList lora_A, TensorList grad_A) {
  const int64_t layers = lora_B.size(), m = lora_B[0].size(0), rank = lora_B[0].size(1), n = lora_A[0].size(1);
  const auto options = lora_B[0].options().dtype(at::kDouble);
  Tensor left = at::zeros({layers, 2 * rank, 2 * rank}, options), right = at::zeros_like(left);
  double* const lefts = left.mutable_data_ptr<double>();
  double* const rights = right.mutable_data_ptr<double>();
  const int64_t size = 4 * rank * rank;
  at::parallel_for(0, layers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      gram_of_columns(lora_B[l].const_data_ptr<float>(), grad_B[l].const_data_ptr<float>(), m, rank, lefts + l * size);
      gram_of_rows(grad_A[l].const_data_ptr<float>(), lora_A[l].const_data_ptr<float>(), n, rank, rights + l * size);
    }
  });
  return {left, right};
}

// ---- Merge ----------------------------------------------------------------------------------------------------------

// Of a bfloat16: the bits without the sign, and a NaN.
constexpr uint32_t kMagnitude = 0x7fff, kNaN = 0x7fc0;

// How a weight is stored: reads and writes `kLanes` numbers of float32, or one.
struct Float32 {
  float* weight;
  Floats read(int64_t at) const { return loaded<Floats>(weight + at); }
  void write(int64_t at, Floats value) const { stored(weight + at, value); }
  float read_one(int64_t at) const { return weight[at]; }
  void write_one(int64_t at, float value) const { weight[at] = value; }
  void prefetch(int64_t at) const { __builtin_prefetch(weight + at); }
};

// The number and what its rounding left out are the halves of a float32: see `_join` and `_split` in remainder.py.
struct BFloat16 {
  uint16_t* weight;
  int16_t* low;
  Floats read(int64_t at) const {
    const Bits upper = __builtin_convertvector(loaded<Upper>(weight + at), Bits);
    const SignedBits lower = __builtin_convertvector(loaded<Lower>(low + at), SignedBits);
    const SignedBits magnitude = reinterpret_cast<SignedBits>(upper & kMagnitude);
    // Comparisons of vectors give lanes of ones or of zeros.
    const SignedBits below_zero = (magnitude == 0) & (lower < 0);
    return reinterpret_cast<Floats>((upper << 16) + reinterpret_cast<Bits>(lower & ~below_zero));
  }
  void write(int64_t at, Floats value) const {
    const Bits bits = reinterpret_cast<Bits>(value);
    const Bits nan = reinterpret_cast<Bits>(value != value);
    stored(low + at, __builtin_convertvector(bits, Lower));
    stored(weight + at, __builtin_convertvector((((bits + (1u << 15)) >> 16) & ~nan) | (kNaN & nan), Upper));
  }
  float read_one(int64_t at) const {
    const int32_t lower = (weight[at] & kMagnitude) == 0 && low[at] < 0 ? 0 : low[at];
    const uint32_t bits = (uint32_t{weight[at]} << 16) + static_cast<uint32_t>(lower);
    return loaded<float>(&bits);
  }
  void write_one(int64_t at, float value) const {
    const uint32_t bits = loaded<uint32_t>(&value);
    low[at] = static_cast<int16_t>(bits);
    weight[at] = static_cast<uint16_t>(value != value ? kNaN : (bits + (1u << 15)) >> 16);
  }
  void prefetch(int64_t at) const {
    __builtin_prefetch(weight + at);
    __builtin_prefetch(low + at);
  }
};

// Adds to `rows` rows of a weight, n long, from entry `at` on: left (rows × rank) times right (rank × n).
template <int64_t rows, typename Weight>
void add_to_rows(const Weight& weight, int64_t at, int64_t n, const float* left, const float* const* right,
                 int64_t rank) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Floats sum[rows];
    for (int64_t i = 0; i < rows; ++i) {
      // A row is too short for the processor to see where this is going, so it is told where the next rows are.
      weight.prefetch(at + (rows + i) * n + j);
      sum[i] = weight.read(at + i * n + j);
    }
    int64_t k = 0;
    for (; k + kUnrolled <= rank; k += kUnrolled) {
#pragma GCC unroll 8
      for (int64_t q = k; q < k + kUnrolled; ++q) {
        const Floats x = loaded<Floats>(right[q] + j);
        for (int64_t i = 0; i < rows; ++i) sum[i] += left[i * rank + q] * x;
      }
    }
    for (; k < rank; ++k) {
      const Floats x = loaded<Floats>(right[k] + j);
      for (int64_t i = 0; i < rows; ++i) sum[i] += left[i * rank + k] * x;
    }
    for (int64_t i = 0; i < rows; ++i) weight.write(at + i * n + j, sum[i]);
  }
  for (; j < n; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      float sum = weight.read_one(at + i * n + j);
      for (int64_t k = 0; k < rank; ++k) sum += left[i * rank + k] * right[k][j];
      weight.write_one(at + i * n + j, sum);
    }
  }
}

template <typename Weight>
void merge_all(const std::vector<Weight>& weights, TensorList lora_B, TensorList lora_A, const Tensor& coefficients) {
  const int64_t layers = lora_B.size(), m = lora_B[0].size(0), rank = lora_B[0].size(1), n = lora_A[0].size(1);
  const double* const coefficient = coefficients.const_data_ptr<double>();
  const int64_t blocks = (m + kRows - 1) / kRows;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kRows * n));
  at::parallel_for(0, layers * blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> left(kRows * rank);
    std::vector<const float*> right(rank);
    std::vector<int64_t> moved(rank);
    for (int64_t l = begin / blocks; l * blocks < end; ++l) {
      // Columns whose coefficient is 0 are left out whatever they hold.
      int64_t count = 0;
      for (int64_t k = 0; k < rank; ++k) {
        if (coefficient[l * rank + k] != 0) {
          right[count] = lora_A[l].const_data_ptr<float>() + k * n;
          moved[count++] = k;
        }
      }
      if (count == 0) continue;
      const float* const B = lora_B[l].const_data_ptr<float>();
      const int64_t last = std::min(end - l * blocks, blocks);
      for (int64_t block = std::max<int64_t>(begin - l * blocks, 0); block < last; ++block) {
        const int64_t row = block * kRows, rows = std::min(kRows, m - row);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t k = 0; k < count; ++k) {
            left[i * count + k] = B[(row + i) * rank + moved[k]] * static_cast<float>(coefficient[l * rank + moved[k]]);
          }
        }
        if (rows == kRows) {
          add_to_rows<kRows>(weights[l], row * n, n, left.data(), right.data(), count);
        } else {
          for (int64_t i = 0; i < rows; ++i) {
            add_to_rows<1>(weights[l], (row + i) * n, n, left.data() + i * count, right.data(), count);
          }
        }
      }
    }
  });
}

void merge_(TensorList weights, TensorList rounded_off, TensorList lora_B, TensorList lora_A,
            const Tensor& coefficients) {
  if (rounded_off.empty()) {
    std::vector<Float32> storage;
    for (const Tensor& weight : weights) storage.push_back({weight.mutable_data_ptr<float>()});
    merge_all(storage, lora_B, lora_A, coefficients);
    return;
  }
  std::vector<BFloat16> storage;
  for (size_t l = 0; l < weights.size(); ++l) {
    storage.push_back({reinterpret_cast<uint16_t*>(weights[l].mutable_data_ptr<at::BFloat16>()),
                       rounded_off[l].mutable_data_ptr<int16_t>()});
  }
  merge_all(storage, lora_B, lora_A, coefficients);
}

// ---- Multiplication -------------------------------------------------------------------------------------------------

// tensors[l] *= factors[l]^power, as so many products. Factors are as `Tensor.expand` makes them, the same in all rows
// or in all columns.
void multiply_(TensorList tensors, TensorList factors, int64_t power) {
  const auto layers = static_cast<int64_t>(tensors.size());
  const int64_t grain = layers == 0 ? 1 : std::max<int64_t>(1, kGrain / std::max<int64_t>(1, tensors[0].numel()));
  at::parallel_for(0, layers, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> factor;
    for (int64_t l = begin; l < end; ++l) {
      const int64_t rows = tensors[l].size(0), columns = tensors[l].size(1);
      const int64_t row_stride = factors[l].stride(0), stride = factors[l].stride(1);
      const float* const given = factors[l].const_data_ptr<float>();
      // Rows of few columns that have the same factors are taken together, so that they fill vectors.
      const int64_t together = row_stride == 0 ? std::min(rows, 1 + 4 * kLanes / columns) : 1;
      factor.resize(together * columns);
      for (int64_t i = 0; i < rows; i += together) {
        if (i == 0 || row_stride != 0) {
          for (int64_t row = 0; row < together; ++row) {
            for (int64_t j = 0; j < columns; ++j) factor[row * columns + j] = given[i * row_stride + j * stride];
          }
        }
        const int64_t count = std::min(together, rows - i) * columns;
        float* const x = tensors[l].mutable_data_ptr<float>() + i * columns;
        const float* const f = factor.data();
        for (int64_t p = 0; p < power; ++p) {
#pragma omp simd
          for (int64_t j = 0; j < count; ++j) x[j] *= f[j];
        }
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY(scalora, library) {
  library.def("grams(Tensor[] lora_B, Tensor[] grad_B, Tensor[] lora_A, Tensor[] grad_A) -> (Tensor, Tensor)");
  library.def(
      "merge_(Tensor(a!)[] weights, Tensor(b!)[] rounded_off, Tensor[] lora_B, Tensor[] lora_A, Tensor coefficients) "
      "-> ()");
  library.def("multiply_(Tensor(a!)[] tensors, Tensor[] factors, int power) -> ()");
}

TORCH_LIBRARY_IMPL(scalora, CPU, library) {
  library.impl("grams", grams);
  library.impl("merge_", merge_);
  library.impl("multiply_", multiply_);
}
