// What forward and backward share: sizes, row groups and their masks, packing, the matrix product
// of packed tiles, and the threads.
//
// Scores are held transposed, [key][row]: one lane is one query row, so that the maximum, the sum
// and the mask of a softmax row need no reduction across lanes.
#ifndef JAX_ATTN_TILES_H_
#define JAX_ATTN_TILES_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <new>

#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace jax_attn {

constexpr int kRows = kLanes * kWide;  // query rows in a group, the lanes of a scores' tile
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// The inputs that forward and backward share. A row r of key/value head k is query r / G of query
// head k * G + r % G: the G heads that read the same keys fill the lanes together.
struct Inputs {
  int64_t B, T, S, N, K, G, H, E;
  const void *q, *k, *v;  // [B,T,N,H], [B,S,K,H], [B,S,K,E]
  const int32_t *first, *end, *q_ids, *kv_ids;
  const float* sinks;
  float scale, softcap;
  bool has_ids;

  int64_t rows() const { return T * G; }  // of one key/value head of one batch entry
  int64_t groups() const { return (rows() + kRows - 1) / kRows; }
  int64_t q_at(int64_t b, int64_t k, int64_t r) const {  // index of (b, t, n), for q, out, d_out
    return (b * T + r / G) * N + k * G + r % G;
  }
  int64_t lse_at(int64_t b, int64_t k, int64_t r) const {
    return (b * N + k * G + r % G) * T + r / G;
  }
  // Logits are maximised before they are scaled, which needs a positive scale: its sign goes to q.
  float q_factor() const { return scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f; }
  float to_log2() const { return (softcap > 0 ? 1.0f : scale ? std::fabs(scale) : 1.0f) * kLog2e; }
};

// The inputs' sizes and pointers, or false if they do not fit together.
using AnyBuffer = xla::ffi::AnyBuffer;
using Ints = xla::ffi::Buffer<xla::ffi::S32>;
using Floats = xla::ffi::Buffer<xla::ffi::F32>;

inline bool fill(AnyBuffer q, AnyBuffer k, AnyBuffer v, Ints first, Ints end, Ints q_ids,
                 Ints kv_ids, Floats sinks, float scale, float softcap, int32_t has_ids,
                 Inputs* x) {
  auto dq = q.dimensions(), dk = k.dimensions(), dv = v.dimensions();
  if (dq.size() != 4 || dk.size() != 4 || dv.size() != 4) return false;
  *x = {dq[0], dq[1], dk[1], dq[2], dk[2], dk[2] ? dq[2] / dk[2] : 0, dq[3], dv[3],
        q.untyped_data(), k.untyped_data(), v.untyped_data(),
        first.typed_data(), end.typed_data(), q_ids.typed_data(), kv_ids.typed_data(),
        sinks.typed_data(), scale, softcap, has_ids != 0};
  size_t BT = x->B * x->T, BS = x->B * x->S;
  auto type = q.element_type();
  return x->K > 0 && x->N == x->K * x->G && dk[0] == x->B && dk[3] == x->H && dv[0] == x->B &&
         dv[1] == x->S && dv[2] == x->K && first.element_count() == BT &&
         end.element_count() == BT && sinks.element_count() == static_cast<size_t>(x->N) &&
         (!x->has_ids || (q_ids.element_count() == BT && kv_ids.element_count() == BS)) &&
         type == k.element_type() && type == v.element_type() &&
         (type == xla::ffi::F32 || type == xla::ffi::BF16);
}

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// kRows query rows, or fewer at the end: then the last one is repeated, which allows the same keys.
struct alignas(64) Group {
  int32_t first[kRows], end[kRows], id[kRows];
  int32_t rows, wide;              // rows that are real, and vectors that hold them
  int64_t low, high;               // keys that any row may attend to
  int64_t all_low, all_high;       // keys that every row may attend to
  int32_t id_low, id_high;

  void fill(const Inputs& x, int64_t b, int64_t index) {
    int64_t r0 = index * kRows;
    rows = static_cast<int32_t>(std::min<int64_t>(kRows, x.rows() - r0));
    wide = (rows + kLanes - 1) / kLanes;
    low = x.S, high = 0, all_low = 0, all_high = x.S;
    id_low = std::numeric_limits<int32_t>::max(), id_high = std::numeric_limits<int32_t>::min();
    int32_t size = static_cast<int32_t>(x.S);
    int64_t t = r0 / x.G, g = r0 % x.G;
    for (int i = 0; i < kRows; i++) {
      int64_t at = b * x.T + t;
      first[i] = std::min(std::max(x.first[at], 0), size);
      end[i] = std::min(std::max(x.end[at], 0), size);
      id[i] = x.has_ids ? x.q_ids[at] : 0;
      if (i + 1 < rows && ++g == x.G) g = 0, t++;
      id_low = std::min(id_low, id[i]), id_high = std::max(id_high, id[i]);
      all_low = std::max<int64_t>(all_low, first[i]);
      all_high = std::min<int64_t>(all_high, end[i]);
      if (first[i] >= end[i]) continue;
      low = std::min<int64_t>(low, first[i]), high = std::max<int64_t>(high, end[i]);
    }
  }
};

// Which keys of a packed tile were not finite, and the range of their ids.
struct Keys {
  int64_t start;
  int count;
  bool any_bad;
  int32_t id_low, id_high;
  const int32_t* ids;  // of the tile's first key; null without ids

  // False if no pair of the group and the tile has equal ids.
  bool meets(const Group& g) const { return id_low <= g.id_high && g.id_low <= id_high; }
  // True if some pair may differ.
  bool mixed(const Group& g) const { return id_low != g.id_high || id_high != g.id_low; }

  void fill_ids(const Inputs& x, int64_t b) {
    ids = x.has_ids ? x.kv_ids + b * x.S + start : nullptr;
    id_low = id_high = ids ? ids[0] : 0;
    for (int j = 1; ids && j < count; j++) {
      id_low = std::min(id_low, ids[j]), id_high = std::max(id_high, ids[j]);
    }
  }
};

// Lanes of vector v of the group that may attend to a key: all bits set, or none.
inline IntVec allowed(const Group& g, const Keys& keys, int j, int v, bool mixed) {
  int32_t key = static_cast<int32_t>(keys.start) + j;
  IntVec yes = (load(g.first + v * kLanes) <= key) & (load(g.end + v * kLanes) > key);
  return mixed ? yes & (load(g.id + v * kLanes) == keys.ids[j]) : yes;
}

// Copy `count` floats as float32 and pad with zeros up to `width`. Returns whether all of them were
// finite; with `replace`, what is not finite becomes 0.
template <bool replace, typename X>
inline bool pack_row(const X* from, int64_t count, float* to, int64_t width) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < count; i++) {
    float x = to_float(from[i]);
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    uint32_t finite = (wide & 0x7f800000u) != 0x7f800000u ? 0xffffffffu : 0u;
    bad |= ~finite;
    if (replace) wide &= finite;
    std::memcpy(to + i, &wide, sizeof wide);
  }
  for (int64_t i = count; i < width; i++) to[i] = 0.0f;
  return bad == 0;
}

// Ask for the cache lines of a row that is packed kAhead rows later. The rows of one head are far
// apart, where the processor does not guess; beyond the array's end asking does no harm.
constexpr int kAhead = 8;

template <typename X>
inline void prefetch(const X* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(X)) __builtin_prefetch(row + i);
}

// Pack the keys' rows of `from` [B,S,K,width]; a row that is not finite is marked in `bad`.
template <typename X>
inline void pack_keys(const Inputs& x, const void* from, int64_t b, int64_t k, int64_t count,
                      Keys* keys, float* to, char* bad) {
  for (int j = 0; j < keys->count; j++) {
    const X* row = static_cast<const X*>(from) + ((b * x.S + keys->start + j) * x.K + k) * count;
    prefetch(row + kAhead * x.K * count, count);
    if (!pack_row<true>(row, count, to + j * padded(count), padded(count))) {
      bad[j] = keys->any_bad = true;
    }
  }
}

// Pack the group's rows of `from` [B,T,N,count], zeros after the last; marks as above.
template <bool replace, typename X>
inline void pack_group(const Inputs& x, const void* from, int64_t b, int64_t k, int64_t index,
                       const Group& g, int64_t count, float* to, char* bad) {
  for (int i = 0; i < g.rows; i++) {
    const X* row = static_cast<const X*>(from) + x.q_at(b, k, index * kRows + i) * count;
    prefetch(row + kAhead * x.N / x.G * count, count);
    bool good = pack_row<replace>(row, count, to + i * padded(count), padded(count));
    if (!good && bad) bad[i] = true;
  }
  std::memset(to + g.rows * padded(count), 0, sizeof(float) * (kRows - g.rows) * padded(count));
}

// [kRows][padded(count)] to [padded(count)][kRows], times `factor`.
inline void transpose_group(const float* from, int64_t count, float factor, float* to) {
  for (int64_t i = 0; i < kRows; i += kLanes) {
    for (int64_t j = 0; j < count; j += kLanes) {
      transpose(from + i * padded(count) + j, padded(count), to + j * kRows + i, kRows);
    }
  }
  if (factor == 1.0f) return;
  for (int64_t i = 0; i < kRows * padded(count); i++) to[i] *= factor;
}

// How a product meets what C holds.
enum Into { kStore, kAdd, kScaleAdd };

// C [high][wide vectors] = A B, with A's element (i, d) at a[i * a_row + d] or, transposed,
// a[i + d * a_row]. The accumulators stay in registers: one load of B and one broadcast of A
// each serve several multiplications. kScaleAdd multiplies C's row i by scale[i] first.
template <int high, int wide, bool transposed, Into into>
inline void micro_kernel(int64_t depth, const float* a, int64_t a_row, const float* b,
                         int64_t b_row, float* c, int64_t c_row, const float* scale) {
  Vec sum[high][wide] = {};
  for (int64_t d = 0; d < depth; d++) {
    Vec row[wide];
#pragma GCC unroll 4
    for (int j = 0; j < wide; j++) row[j] = load(b + d * b_row + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < high; i++) {
      Vec x = broadcast(transposed ? a[i + d * a_row] : a[i * a_row + d]);
#pragma GCC unroll 4
      for (int j = 0; j < wide; j++) sum[i][j] = fma(x, row[j], sum[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < high; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < wide; j++) {
      float* at = c + i * c_row + j * kLanes;
      if (into == kAdd) sum[i][j] += load(at);
      if (into == kScaleAdd) sum[i][j] = fma(load(at), broadcast(scale[i]), sum[i][j]);
      store(at, sum[i][j]);
    }
  }
}

template <int high, int wide, bool transposed, Into into>
inline void panel(int64_t m, int64_t depth, const float* a, int64_t a_row, const float* b,
                  int64_t b_row, float* c, int64_t c_row, const float* scale) {
  int64_t step = transposed ? high : high * a_row, i = 0;
  for (; i + high <= m; i += high, a += step, c += high * c_row) {
    micro_kernel<high, wide, transposed, into>(depth, a, a_row, b, b_row, c, c_row, scale + i);
  }
  if constexpr (high > 1) {  // the rest, m - i < high
    panel<high - 1, wide, transposed, into>(m - i, depth, a, a_row, b, b_row, c, c_row, scale + i);
  }
}

// C [m][wide vectors], any number of them, in columns of at most kWide.
template <bool transposed, Into into>
inline void product(int64_t m, int64_t wide, int64_t depth, const float* a, int64_t a_row,
                    const float* b, int64_t b_row, float* c, int64_t c_row,
                    const float* scale = nullptr) {
  constexpr bool T = transposed;
  for (; wide >= kWide; wide -= kWide, b += kWide * kLanes, c += kWide * kLanes) {
    panel<kHigh, kWide, T, into>(m, depth, a, a_row, b, b_row, c, c_row, scale);
  }
  if constexpr (kWide > 2) {
    if (wide == 3) panel<kHigh, 3, T, into>(m, depth, a, a_row, b, b_row, c, c_row, scale);
    if (wide == 2) panel<kHigh, 2, T, into>(m, depth, a, a_row, b, b_row, c, c_row, scale);
  }
  if (wide == 1) panel<kHigh, 1, T, into>(m, depth, a, a_row, b, b_row, c, c_row, scale);
}

// Working memory of one thread, handed out in aligned pieces.
class Arena {
 public:
  explicit Arena(size_t bytes)
      : start_(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))), next_(start_) {
    if (!start_) throw std::bad_alloc();
  }
  Arena(const Arena&) = delete;
  ~Arena() { std::free(start_); }

  template <typename X>
  X* take(int64_t count) {
    X* piece = reinterpret_cast<X*>(next_);
    next_ += (sizeof(X) * count + 63) / 64 * 64;
    return piece;
  }

 private:
  char *start_, *next_;
};

// Run `work(next)` on the caller and on free threads of XLA's pool; `next()` hands out 0, 1, ...,
// count - 1, then -1. Each index goes to one thread, in increasing order of start. The caller works
// too and waits for indices that were taken, never for a thread to become free: helpers that start
// late find nothing left and touch nothing but the counters that they share.
class Tasks {
 public:
  using Next = std::function<int64_t()>;

  static void run(xla::ffi::ThreadPool& pool, int64_t count,
                  const std::function<void(const Next&)>& work) {
    auto shared = std::make_shared<Tasks>(count);
    int64_t helpers = std::min(pool.num_threads(), count) - 1;
    for (int64_t i = 0; i < helpers; i++) {
      // `work` is used only by a helper that got an index, and then the caller still waits.
      pool.Schedule([shared, work = &work] { shared->drain(*work); });
    }
    shared->drain(work);
    std::unique_lock<std::mutex> lock(shared->mutex_);
    shared->changed_.wait(lock, [&] { return shared->done_ == count; });
  }

  explicit Tasks(int64_t count) : count_(count) {}

 private:
  void drain(const std::function<void(const Next&)>& work) {
    int64_t taken = next_.fetch_add(1), finished = 0;
    if (taken >= count_) return;
    bool given = false;
    work([&]() -> int64_t {
      if (!given) return given = true, taken;
      finished++;
      taken = next_.fetch_add(1);
      return taken < count_ ? taken : -1;
    });
    std::lock_guard<std::mutex> lock(mutex_);
    done_ += finished;
    changed_.notify_all();
  }

  const int64_t count_;
  std::atomic<int64_t> next_{0};
  int64_t done_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace jax_attn

#endif  // JAX_ATTN_TILES_H_
