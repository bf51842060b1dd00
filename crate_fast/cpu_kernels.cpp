// MSSA on a CPU, forward and backward, head by head: scores of a block of rows stay in the cache from one product to the next.
//
// Products are PyTorch's own small ones (brgemm: oneDNN's, with AVX2, AVX-512 or AMX, whatever the processor has), sums are of
// float32. With w one head's tokens (n, d), P = softmax(w wᵀ · scale) and g the gradient of P w, a row j of the gradient is
//     dw_j = Σ_i P_ij g_i + scale · Σ_i (P_ji (g_j·w_i - δ_j) + P_ij (w_j·g_i - δ_i)) w_i,   δ_i = g_i · (P w)_i,
// and the scores are symmetric: P_ij comes of row j's scores and the logarithm of row i's sum, which forward keeps. So a row
// needs no other row's results, and no matrix is transposed but w and g.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

namespace {

using at::BFloat16;
using at::Half;
using at::Tensor;
using at::native::cpublas::brgemm;

constexpr float kLog2E = 1.44269504088896340736f;
constexpr int64_t kPart = 128;  // numbers of float32 that are added one after the other
constexpr int64_t kCache = 3 << 19;  // bytes of a head's matrices that stay in a core's second cache

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// 2^t for t of at most 127, to 2e-7 of it; 0 from -127 down, and NaN of NaN. Without branches, so that loops are of vectors.
inline float exp2_of(float t) {
  t = t < -127.0f ? -127.0f : t;
  const float whole = std::rint(t);
  const float rest = t - whole;  // of -0.5 to 0.5
  float sum = 1.535336188319500e-4f;  // Cephes, exp2f
  sum = sum * rest + 1.339887440266574e-3f;
  sum = sum * rest + 9.618437357674640e-3f;
  sum = sum * rest + 5.550332471162809e-2f;
  sum = sum * rest + 2.402264791363012e-1f;
  sum = sum * rest + 6.931472028550421e-1f;
  sum = sum * rest + 1.0f;
  return sum * bits<float>((static_cast<int32_t>(whole) + 127) << 23);
}

inline void store(float x, float& to) { to = x; }

inline void store(float x, Half& to) { to = static_cast<Half>(x); }

inline void store(float x, BFloat16& to) {  // to nearest, ties to even; without a branch
  const uint32_t raw = bits<uint32_t>(x);
  const uint32_t nearest = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16;
  to.x = static_cast<uint16_t>((raw & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);
}

// One thread's memory, taken once and kept: what is freed after every call is mapped anew, page by page.
class Scratch {
 public:
  ~Scratch() { release(); }

  void reserve(size_t size) {
    if (size > size_) {
      release();
      start_ = static_cast<char*>(::operator new(size, std::align_val_t(64)));
      size_ = size;
    }
    next_ = start_;
  }

  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += size_of<T>(count);
    return taken;
  }

  template <typename T>
  static size_t size_of(int64_t count) {
    return rounded_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }

 private:
  void release() { if (start_) ::operator delete(start_, std::align_val_t(64)); }

  char* start_ = nullptr;
  char* next_ = nullptr;
  size_t size_ = 0;
};

// Sizes of one head and of a block of its rows. C is what products are taken in; in 16 bit two numbers that follow each other
// along the inner axis lie together ("VNNI").
template <typename C>
struct Sizes {
  static constexpr int64_t kTogether = sizeof(C) == 2 ? 2 : 1;

  explicit Sizes(int64_t tokens, int64_t width) : n(tokens), d(width) {
    const int64_t most = n <= 512 ? 128 : n <= 2048 ? 64 : 32;  // scores of a block are half a megabyte at most
    rows = rounded_up((n + blocks_of(most) - 1) / blocks_of(most), 16);
    blocks = blocks_of(rows);
  }

  int64_t blocks_of(int64_t height) const { return (n + height - 1) / height; }

  int64_t n, d;
  int64_t wide = rounded_up(d, sizeof(C) == 2 ? 32 : 16);  // of a token, the rest zeros
  int64_t across = rounded_up(n, 16);  // of a row of scores: loops over it leave no numbers over, which cost as much as all
  int64_t inner = rounded_up(n, sizeof(C) == 2 ? 32 : 16);  // of a row of probabilities, the rest zeros
  int64_t rows, blocks;
};

// One head's tokens as products take them: in rows, transposed, and packed for sums over tokens.
template <typename C>
struct Operand {
  Operand(Scratch& scratch, const Sizes<C>& s)
      : rows(scratch.take<C>(s.inner * s.wide)),
        transposed(scratch.take<C>(s.wide * s.across)),
        packed(s.kTogether == 2 ? scratch.take<C>(s.inner * s.wide) : rows) {}

  static size_t size_of(const Sizes<C>& s) {
    return Scratch::size_of<C>(s.inner * s.wide) * s.kTogether + Scratch::size_of<C>(s.wide * s.across);
  }

  template <typename T>
  void read(const T* from, int64_t stride, const Sizes<C>& s) {
    for (int64_t i = 0; i < s.inner; ++i) {
      C* row = rows + i * s.wide;
      const T* source = from + i * stride;
      const int64_t count = i < s.n ? s.d : 0;
      if constexpr (std::is_same_v<T, C>) {
        if (count) std::memcpy(row, source, count * sizeof(C));
      } else {
        for (int64_t c = 0; c < count; ++c) store(static_cast<float>(source[c]), row[c]);
      }
      std::fill(row + count, row + s.wide, C(0.0f));
    }
    // In words of four bytes, whether that is a number or two.
    const int64_t words = s.wide / s.kTogether;
    const auto* in = reinterpret_cast<const uint32_t*>(rows);
    auto* out = reinterpret_cast<uint32_t*>(transposed);
    for (int64_t i = 0; i < s.across; i += 16) {
      for (int64_t k = 0; k < words; k += 16) {
        for (int64_t kk = k; kk < k + 16; ++kk) {
          for (int64_t ii = i; ii < i + 16; ++ii) out[kk * s.across + ii] = ii < s.n ? in[ii * words + kk] : 0;
        }
      }
    }
    if constexpr (Sizes<C>::kTogether == 2) {
      const auto* halves = reinterpret_cast<const uint16_t*>(rows);
      auto* pairs = reinterpret_cast<uint32_t*>(packed);
      for (int64_t i = 0; i < s.inner; i += 2) {
        const uint16_t* first = halves + i * s.wide;
        const uint16_t* second = first + s.wide;
        uint32_t* pair = pairs + i / 2 * s.wide;
        for (int64_t c = 0; c < s.wide; ++c) pair[c] = first[c] | static_cast<uint32_t>(second[c]) << 16;
      }
    }
  }

  C* rows;
  C* transposed;  // (wide, across)
  C* packed;  // (inner, wide)
};

template <typename C>
void multiply(int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const C* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, sizeof(C) == 2);
}

// p x, of m rows of numbers a token, into `sum` or added to it. Of float32 in parts, whose `part` is at hand: the error of 1,024
// numbers added one after the other is half as much again as PyTorch's.
template <typename C>
void sum_over_tokens(int64_t m, const C* p, const Operand<C>& x, const Sizes<C>& s, float* sum, float* part, bool add) {
  const int64_t step = s.kTogether == 2 ? s.inner : kPart;
  for (int64_t k = 0; k < s.inner; k += step) {
    const bool aside = s.kTogether == 1 && (add || k > 0);
    const int64_t count = std::min(step, s.inner - k);
    multiply(m, s.wide, count, p + k, s.inner, x.packed + k * s.wide, s.wide, aside ? part : sum, s.wide, !aside && add);
    if (!aside) continue;
#pragma omp simd
    for (int64_t i = 0; i < m * s.wide; ++i) sum[i] += part[i];
  }
}

// Of a row of scores: what probabilities are made of, exp2(score - most) · share, of scores in units of ln 2.
struct Row {
  float most, share;
};

// Multiplies a row's scores by `factor`, which has log2(e) in it; its exponentials, and what they are divided by. Behind the
// row's end, up to `across`, scores become -inf and exponentials 0.
inline Row softmax_row(float* s, int64_t n, int64_t across, float factor, float* powers) {
  float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    s[i] *= factor;
    most = s[i] > most ? s[i] : most;
  }
  std::fill(s + n, s + across, -std::numeric_limits<float>::infinity());
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < across; ++i) {
    powers[i] = exp2_of(s[i] - most);
    sum += powers[i];
  }
  return {most, 1.0f / sum};
}

// Tokens of all heads: (batch, tokens, heads × width), a row's numbers together.
template <typename T>
struct Tokens {
  explicit Tokens(const Tensor& x) : data(x.const_data_ptr<T>()), batch(x.stride(0)), token(x.stride(1)) {}

  const T* head(int64_t image, int64_t first) const { return data + image * batch + first; }

  const T* data;
  int64_t batch, token;
};

// Calls `begin` of every head that a thread comes to, and `block` of every block of its rows.
template <typename Begin, typename Block>
void for_all(int64_t first, int64_t last, int64_t blocks, const Begin& begin, const Block& block) {
  int64_t head = -1;
  for (int64_t task = first; task < last; ++task) {
    if (task / blocks != head) begin(head = task / blocks);
    block(head, task % blocks);
  }
}

thread_local Scratch scratch;

template <typename T, typename C>
void forward(const Tensor& w, int64_t heads, double scale, Tensor& out) {
  const Sizes<C> s(w.size(1), w.size(2) / heads);
  const Tokens<T> tokens(w);
  const float factor = static_cast<float>(scale) * kLog2E;
  T* results = out.mutable_data_ptr<T>();
  at::parallel_for(0, w.size(0) * heads * s.blocks, 1, [&](int64_t first, int64_t last) {
    scratch.reserve(
        Operand<C>::size_of(s) + Scratch::size_of<float>(s.rows * s.across) + Scratch::size_of<C>(s.rows * s.inner) +
        2 * Scratch::size_of<float>(s.rows * s.wide));
    Operand<C> x(scratch, s);
    float* scores = scratch.take<float>(s.rows * s.across);
    C* probabilities = scratch.take<C>(s.rows * s.inner);
    float *sum = scratch.take<float>(s.rows * s.wide), *part = scratch.take<float>(s.rows * s.wide);
    for_all(
        first, last, s.blocks, [&](int64_t head) { x.read(tokens.head(head / heads, head % heads * s.d), tokens.token, s); },
        [&](int64_t head, int64_t block) {
          const int64_t top = block * s.rows, count = std::min(s.rows, s.n - top);
          multiply(count, s.across, s.wide, x.rows + top * s.wide, s.wide, x.transposed, s.across, scores, s.across, false);
          for (int64_t i = 0; i < count; ++i) {
            float* row = scores + i * s.across;
            C* p = probabilities + i * s.inner;
            const float share = softmax_row(row, s.n, s.across, factor, row).share;
#pragma omp simd
            for (int64_t k = 0; k < s.across; ++k) store(row[k] * share, p[k]);
            std::fill(p + s.across, p + s.inner, C(0.0f));
          }
          sum_over_tokens(count, probabilities, x, s, sum, part, false);
          T* to = results + (head / heads * s.n + top) * heads * s.d + head % heads * s.d;
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t c = 0; c < s.d; ++c) store(sum[i * s.wide + c], to[i * heads * s.d + c]);
          }
        });
    at::native::cpublas::brgemm_release(sizeof(C) == 2);
  });
}

// Of a row j: what P_ij is, and the gradient of its scores and of the scores that are the same.
template <typename C>
void gradient_row(
    const float* s, const float* mine, const float* own, const float* theirs, const float* most, const float* share,
    const float* deltas, int64_t j,
    float scale, const Sizes<C>& sizes, C* p, C* e) {
  const float delta = deltas[j];
#pragma omp simd
  for (int64_t i = 0; i < sizes.across; ++i) {
    const float other = exp2_of(s[i] - most[i]) * share[i];
    store(other, p[i]);
    store(scale * (mine[i] * (own[i] - delta) + other * (theirs[i] - deltas[i])), e[i]);
  }
  std::fill(p + sizes.across, p + sizes.inner, C(0.0f));
  std::fill(e + sizes.across, e + sizes.inner, C(0.0f));
}

// A head's scores, probabilities and the gradients of these, in rows: of all tokens where they fit into the cache, else of a
// block at a time.
struct Matrices {
  Matrices(Scratch& scratch, int64_t area)
      : scores(scratch.take<float>(area)), powers(scratch.take<float>(area)), own(scratch.take<float>(area)) {}

  float *scores, *powers, *own;
};

template <typename T, typename C>
void backward(const Tensor& w, const Tensor& g, int64_t heads, double scale, Tensor& dw) {
  const Sizes<C> s(w.size(1), w.size(2) / heads);
  const Tokens<T> tokens(w), gradients(g);
  const float factor = static_cast<float>(scale) * kLog2E;
  const bool whole = 3 * s.n * s.across * static_cast<int64_t>(sizeof(float)) <= kCache;
  const int64_t area = s.rows * s.across;
  T* to_all = dw.mutable_data_ptr<T>();
  at::parallel_for(0, w.size(0) * heads, 1, [&](int64_t first, int64_t last) {
    const int64_t held = whole ? s.n * s.across : area;
    scratch.reserve(
        2 * Operand<C>::size_of(s) + 3 * Scratch::size_of<float>(held) + Scratch::size_of<float>(area) +
        2 * Scratch::size_of<C>(s.rows * s.inner) + 2 * Scratch::size_of<float>(s.rows * s.wide) + 3 * Scratch::size_of<float>(s.across));
    Operand<C> x(scratch, s), y(scratch, s);
    Matrices all(scratch, held);
    float* theirs = scratch.take<float>(area);
    C *p = scratch.take<C>(s.rows * s.inner), *e = scratch.take<C>(s.rows * s.inner);
    float *sum = scratch.take<float>(s.rows * s.wide), *part = scratch.take<float>(s.rows * s.wide);
    float* of_rows[3];  // largest scores, shares, and what a row's gradients come to; zeros behind its end
    for (float*& each : of_rows) {
      each = scratch.take<float>(s.across);
      std::fill(each + s.n, each + s.across, 0.0f);
    }
    auto [most, share, deltas] = of_rows;

    const auto make = [&](int64_t top) {  // scores, probabilities and their gradients of the rows from `top` on
      const int64_t count = std::min(s.rows, s.n - top), start = whole ? top * s.across : 0;
      const C *here = x.rows + top * s.wide, *there = y.rows + top * s.wide;
      multiply(count, s.across, s.wide, here, s.wide, x.transposed, s.across, all.scores + start, s.across, false);
      multiply(count, s.across, s.wide, there, s.wide, x.transposed, s.across, all.own + start, s.across, false);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = start + i * s.across;
        float *powers = all.powers + at, *own = all.own + at, delta = 0.0f;
        const Row row = softmax_row(all.scores + at, s.n, s.across, factor, powers);
#pragma omp simd reduction(+ : delta)
        for (int64_t k = 0; k < s.across; ++k) {
          powers[k] *= row.share;
          delta += powers[k] * own[k];
        }
        most[top + i] = row.most, share[top + i] = row.share, deltas[top + i] = delta;
      }
    };

    for (int64_t head = first; head < last; ++head) {
      const int64_t image = head / heads, column = head % heads * s.d;
      x.read(tokens.head(image, column), tokens.token, s);
      y.read(gradients.head(image, column), gradients.token, s);
      for (int64_t top = 0; top < s.n; top += s.rows) make(top);
      for (int64_t top = 0; top < s.n; top += s.rows) {
        if (!whole) make(top);
        const int64_t count = std::min(s.rows, s.n - top), start = whole ? top * s.across : 0;
        multiply(count, s.across, s.wide, x.rows + top * s.wide, s.wide, y.transposed, s.across, theirs, s.across, false);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = start + i * s.across;
          gradient_row(
              all.scores + at, all.powers + at, all.own + at, theirs + i * s.across, most, share, deltas, top + i,
              static_cast<float>(scale), s, p + i * s.inner, e + i * s.inner);
        }
        sum_over_tokens(count, p, y, s, sum, part, false);
        sum_over_tokens(count, e, x, s, sum, part, true);
        T* to = to_all + (image * s.n + top) * heads * s.d + column;
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t c = 0; c < s.d; ++c) store(sum[i * s.wide + c], to[i * heads * s.d + c]);
        }
      }
    }
    at::native::cpublas::brgemm_release(sizeof(C) == 2);
  });
}

// Calls function<T, C>, T the tensors' dtype, C bfloat16 where `narrow` and T are.
#define BY_DTYPE(function, narrow, ...)                                                    \
  switch (w.scalar_type()) {                                                               \
    case at::kFloat: function<float, float>(__VA_ARGS__); break;                           \
    case at::kHalf: function<Half, float>(__VA_ARGS__); break;                             \
    case at::kBFloat16:                                                                    \
      if (narrow) function<BFloat16, BFloat16>(__VA_ARGS__);                               \
      else function<BFloat16, float>(__VA_ARGS__);                                         \
      break;                                                                               \
    default: TORCH_CHECK(false, "w is ", w.scalar_type(), "; it must be float16, bfloat16 or float32"); \
  }

void check(const Tensor& x, const Tensor& w, int64_t heads) {
  TORCH_CHECK(x.dim() == 3 && x.sizes() == w.sizes() && x.scalar_type() == w.scalar_type() && x.device().is_cpu());
  TORCH_CHECK(x.stride(2) == 1 || x.size(2) == 1, "the last axis must have stride 1");
  TORCH_CHECK(heads > 0 && x.size(2) % heads == 0 && x.numel() > 0);
}

Tensor mssa_forward(const Tensor& w, int64_t heads, double scale, bool narrow) {
  check(w, w, heads);
  Tensor out = at::empty(w.sizes(), w.options());
  BY_DTYPE(forward, narrow, w, heads, scale, out)
  return out;
}

Tensor mssa_backward(const Tensor& w, const Tensor& gradient, int64_t heads, double scale, bool narrow) {
  check(w, w, heads);
  check(gradient, w, heads);
  Tensor dw = at::empty(w.sizes(), w.options());
  BY_DTYPE(backward, narrow, w, gradient, heads, scale, dw)
  return dw;
}

}  // namespace

TORCH_LIBRARY(crate_fast_cpu, library) {
  library.def("mssa_forward(Tensor w, int heads, float scale, bool narrow) -> Tensor");
  library.def("mssa_backward(Tensor w, Tensor gradient, int heads, float scale, bool narrow) -> Tensor");
}

TORCH_LIBRARY_IMPL(crate_fast_cpu, CPU, library) {
  library.impl("mssa_forward", mssa_forward);
  library.impl("mssa_backward", mssa_backward);
}
