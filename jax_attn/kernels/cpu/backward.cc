// Attention, backward, in one pass over the pairs: with P = exp(logits - lse) recomputed,
//
//     dV = P^T dO,  dP = dO V^T,  dS = P (dP - D + d_lse),  dQ = scale dS K,  dK = scale dS^T Q,
//
// D = sum_e dO out (arXiv:2307.08691). One task is a block of keys of one key/value head: it owns
// its dK and dV and passes over the query groups. Its part of dQ it adds after the block before
// has added its own, so that the order of the sums depends on sizes alone.
#include <thread>
#include <vector>

#include "tiles.h"

namespace jax_attn {
namespace {

constexpr int kKeys = 48;    // keys in a tile
constexpr int kTiles = 12;   // tiles in a block: so many share the packing of a query group

struct Gradients {
  const float *out, *d_out;   // [B,T,N,E]
  const float *lse, *d_lse;   // [B,N,T]
  void *d_q, *d_k, *d_v;
  float* d_sinks;
};

// What the first phase leaves for the second, by row [B,K,groups,kRows] and by group.
struct Rows {
  explicit Rows(const Inputs& x)
      : lse(x.B * x.K * x.groups() * kRows), rest(lse.size()), delta(lse.size()),
        low(lse.size() / kRows), high(low.size()) {}
  // 2^-lse rest = e^-(the lse), lse a whole number: its fraction would lose digits in a sum with
  // logits that are smaller. D - d_lse.
  std::vector<float> lse, rest, delta;
  std::vector<int64_t> low, high;
};

// What one thread needs for its tasks.
struct Scratch {
  explicit Scratch(const Inputs& x)
      : arena(sizeof(float) * ((padded(x.H) + padded(x.E)) * (2 * kTiles * kKeys + 2 * kRows) +
                               kRows * padded(x.H) + 2 * kKeys * kRows) +
              sizeof(Keys) * kTiles + kKeys + sizeof(Group) + 4096),
        group(arena.take<Group>(1)),
        keys(arena.take<Keys>(kTiles)),
        bad(arena.take<char>(kKeys)),
        q(arena.take<float>(kRows * padded(x.H))),
        q_t(arena.take<float>(kRows * padded(x.H))),
        d_q(arena.take<float>(kRows * padded(x.H))),
        d_out(arena.take<float>(kRows * padded(x.E))),
        d_out_t(arena.take<float>(kRows * padded(x.E))),
        s(arena.take<float>(kKeys * kRows)),
        d_s(arena.take<float>(kKeys * kRows)),
        k(arena.take<float>(kTiles * kKeys * padded(x.H))),
        d_k(arena.take<float>(kTiles * kKeys * padded(x.H))),
        v(arena.take<float>(kTiles * kKeys * padded(x.E))),
        d_v(arena.take<float>(kTiles * kKeys * padded(x.E))) {}

  Arena arena;
  Group* group;
  Keys* keys;
  char* bad;
  float *q, *q_t, *d_q, *d_out, *d_out_t, *s, *d_s, *k, *d_k, *v, *d_v;
};

// Logits to P and dP to dS, in place. `bend` multiplies with the derivative of the soft cap.
template <int wide>
void weigh(float* s, float* d_s, const Inputs& x, const Keys& keys, const Group& g,
           const float* lse, const float* rest, const float* delta, bool bend) {
  bool capped = x.softcap > 0, mixed = keys.mixed(g);
  Vec to_log2 = broadcast(x.to_log2()), cap = broadcast(x.softcap);
  Vec into_cap = broadcast(capped ? std::fabs(x.scale) / x.softcap : 1.0f);
  for (int j = 0; j < keys.count; j++) {
    int64_t key = keys.start + j;
    bool whole = !mixed && key >= g.all_low && key < g.all_high;
    for (int v = 0; v < wide; v++) {
      float *p_at = s + j * kRows + v * kLanes, *d_at = d_s + j * kRows + v * kLanes;
      Vec logit = load(p_at), slope = broadcast(1.0f);
      if (capped) {
        Vec y = tanh(logit * into_cap);
        logit = y * cap;
        if (bend) slope -= y * y;
      }
      Vec p = exp2_product(logit, to_log2, load(lse + v * kLanes)) * load(rest + v * kLanes);
      Vec d = p * (load(d_at) - load(delta + v * kLanes));
      if (capped) d *= slope;
      if (!whole) {  // selected, not multiplied: what masked keys hold may overflow
        IntVec yes = allowed(g, keys, j, v, mixed);
        p = yes ? p : Vec{};
        d = yes ? d : Vec{};
      }
      store(p_at, p);
      store(d_at, d);
    }
  }
}

// P in at.s and dS in at.d_s, of the packed group and a packed tile.
void tile(const Inputs& x, const Keys& keys, const Scratch& at, const float* k, const float* v,
          const float* lse, const float* rest, const float* delta, bool bend) {
  const Group& g = *at.group;
  int wide = g.wide;
  product<false, kStore>(keys.count, wide, x.H, k, padded(x.H), at.q_t, kRows, at.s, kRows);
  product<false, kStore>(keys.count, wide, x.E, v, padded(x.E), at.d_out_t, kRows, at.d_s, kRows);
  if (wide == kWide) weigh<kWide>(at.s, at.d_s, x, keys, g, lse, rest, delta, bend);
  if (kWide > 3 && wide == 3) weigh<3>(at.s, at.d_s, x, keys, g, lse, rest, delta, bend);
  if (kWide > 2 && wide == 2) weigh<2>(at.s, at.d_s, x, keys, g, lse, rest, delta, bend);
  if (kWide > 1 && wide == 1) weigh<1>(at.s, at.d_s, x, keys, g, lse, rest, delta, bend);
}

template <typename X>
void pack_tile(const Inputs& x, int64_t b, int64_t k, int64_t start, int64_t end, Scratch& at,
               Keys* keys, float* to_k, float* to_v) {
  *keys = {start, static_cast<int>(end - start), false, 0, 0, nullptr};
  keys->fill_ids(x, b);
  pack_keys<X>(x, x.k, b, k, x.H, keys, to_k, at.bad);
  pack_keys<X>(x, x.v, b, k, x.E, keys, to_v, at.bad);
}

template <typename X>
void pack_queries(const Inputs& x, const Gradients& d, int64_t b, int64_t k, int64_t index,
                  Scratch& at) {
  at.group->fill(x, b, index);
  pack_group<true, X>(x, x.q, b, k, index, *at.group, x.H, at.q, nullptr);
  transpose_group(at.q, x.H, x.q_factor(), at.q_t);
  // As they are: a cotangent that is NaN must show, but for a row without keys it means nothing.
  pack_group<false, float>(x, d.d_out, b, k, index, *at.group, x.E, at.d_out, nullptr);
  for (int i = 0; i < kRows; i++) {
    if (at.group->first[i] < at.group->end[i]) continue;
    std::fill_n(at.d_out + i * padded(x.E), padded(x.E), 0.0f);
  }
  transpose_group(at.d_out, x.E, 1.0f, at.d_out_t);
}

// D of a group's rows whose `out` is NaN: their gradient is that of the values that replaced what
// was not finite, whose output was not stored, but D = sum_s P dP.
template <typename X>
void clean_delta(const Inputs& x, const Gradients& d, int64_t b, int64_t k, int64_t index,
                 Scratch& at, const float* lse, const float* rest, float* delta) {
  float zero[kRows] = {}, sum[kRows] = {};
  pack_queries<X>(x, d, b, k, index, at);
  const Group& g = *at.group;
  for (int64_t start = g.low; start < g.high; start += kKeys) {
    pack_tile<X>(x, b, k, start, std::min(start + kKeys, g.high), at, at.keys, at.k, at.v);
    if (!at.keys->meets(g)) continue;
    tile(x, *at.keys, at, at.k, at.v, lse, rest, zero, false);
    for (int j = 0; j < at.keys->count; j++) {
      for (int i = 0; i < g.rows; i++) sum[i] += at.d_s[j * kRows + i];
    }
  }
  for (int i = 0; i < g.rows; i++) {
    if (std::isnan(delta[i])) delta[i] = sum[i];  // the others keep the bits they would have alone
  }
}

// First phase: lse and delta of a group, and zeros for its dQ.
template <typename X>
void prepare(const Inputs& x, const Gradients& d, int64_t b, int64_t k, int64_t index,
             float* d_q, Scratch& at, Rows& rows) {
  int64_t group = (b * x.K + k) * x.groups() + index;
  float *lse = &rows.lse[group * kRows], *rest = &rows.rest[group * kRows];
  float *delta = &rows.delta[group * kRows];
  Group& g = *at.group;
  g.fill(x, b, index);
  rows.low[group] = g.low, rows.high[group] = g.high;
  bool poisoned = false;
  for (int i = 0; i < g.rows; i++) {
    int64_t r = index * kRows + i, row = x.q_at(b, k, r);
    const float *out = d.out + row * x.E, *d_out = d.d_out + row * x.E;
    prefetch(out + kAhead * x.N / x.G * x.E, x.E);
    prefetch(d_out + kAhead * x.N / x.G * x.E, x.E);
    pack_row<false>(out, x.E, at.d_out, padded(x.E));
    pack_row<false>(d_out, x.E, at.d_out_t, padded(x.E));
    Vec sums = {};
    for (int64_t e = 0; e < x.E; e += kLanes) {
      sums = fma(load(at.d_out + e), load(at.d_out_t + e), sums);
    }
    float sum = 0.0f;
    for (int j = 0; j < kLanes; j++) sum += sums[j];
    double log2 = d.lse[x.lse_at(b, k, r)] * 1.44269504088896341;
    if (log2 == -kInf) log2 = 0.0;  // no key: nothing uses it
    lse[i] = static_cast<float>(std::floor(log2));
    rest[i] = static_cast<float>(std::exp2(lse[i] - log2));
    delta[i] = sum;
    poisoned |= std::isnan(out[0]);
    std::fill_n(d_q + row * x.H, x.H, 0.0f);
  }
  if (poisoned) clean_delta<X>(x, d, b, k, index, at, lse, rest, delta);
  for (int i = 0; i < g.rows; i++) delta[i] -= d.d_lse[x.lse_at(b, k, index * kRows + i)];
}

// The group's rows against all tiles of the block; returns false if no pair meets.
template <typename X>
bool attend_group(const Inputs& x, const Gradients& d, int64_t b, int64_t k, int64_t index,
                  int tiles, const Rows& rows, Scratch& at) {
  int64_t group = (b * x.K + k) * x.groups() + index, H = padded(x.H), E = padded(x.E);
  int64_t low = rows.low[group], high = rows.high[group];
  const Group& g = *at.group;
  bool any = false;
  for (int i = 0; i < tiles; i++) {
    Keys keys = at.keys[i];
    int64_t skip = std::max<int64_t>(0, low - keys.start);  // keys before the group's first
    keys.count = static_cast<int>(std::min<int64_t>(keys.count, high - keys.start) - skip);
    if (keys.count <= 0) continue;
    keys.start += skip;
    if (keys.ids) keys.ids += skip;
    if (!any) pack_queries<X>(x, d, b, k, index, at);
    if (!keys.meets(g)) {
      if (!any) std::fill_n(at.d_q, kRows * H, 0.0f);
      any = true;
      continue;
    }
    int64_t key = i * kKeys + skip;
    float *k_at = at.k + key * H, *v_at = at.v + key * E;
    int64_t row = group * kRows;
    tile(x, keys, at, k_at, v_at, &rows.lse[row], &rows.rest[row], &rows.delta[row], true);
    product<false, kAdd>(keys.count, E / kLanes, g.rows, at.s, kRows, at.d_out, E,
                         at.d_v + key * E, E);
    product<false, kAdd>(keys.count, H / kLanes, g.rows, at.d_s, kRows, at.q, H,
                         at.d_k + key * H, H);
    auto into_q = any ? product<true, kAdd> : product<true, kStore>;
    into_q(g.rows, H / kLanes, keys.count, at.d_s, kRows, k_at, H, at.d_q, H, nullptr);
    any = true;
  }
  return any;
}

// Block `index` of the keys. done[-1] and done[0] count the groups that the block before and this
// one have added to dQ; a block waits only for one that a thread took before it.
template <typename X>
void attend(const Inputs& x, const Gradients& d, int64_t b, int64_t k, int64_t index,
            const Rows& rows, float* d_q, std::atomic<int64_t>* done, Scratch& at) {
  int64_t H = padded(x.H), E = padded(x.E), low = index * kTiles * kKeys;
  int64_t high = std::min<int64_t>(low + kTiles * kKeys, x.S), groups = x.groups();
  int tiles = static_cast<int>((high - low + kKeys - 1) / kKeys);
  for (int i = 0; i < tiles; i++) {
    int64_t start = low + i * kKeys;
    pack_tile<X>(x, b, k, start, std::min(start + kKeys, high), at, at.keys + i,
                 at.k + i * kKeys * H, at.v + i * kKeys * E);
  }
  std::fill_n(at.d_k, (high - low) * H, 0.0f);
  std::fill_n(at.d_v, (high - low) * E, 0.0f);
  auto wait = [&](int64_t count) {
    while (index > 0 && done[-1].load(std::memory_order_acquire) < count) std::this_thread::yield();
    done[0].store(count - 1, std::memory_order_release);
  };
  for (int64_t i = 0; i < groups; i++) {
    int64_t group = (b * x.K + k) * groups + i;
    if (rows.high[group] <= low || rows.low[group] >= high) continue;
    if (!attend_group<X>(x, d, b, k, i, tiles, rows, at)) continue;
    wait(i + 1);
    for (int j = 0; j < at.group->rows; j++) {
      float* to = d_q + x.q_at(b, k, i * kRows + j) * x.H;
      prefetch(to + kAhead * x.N / x.G * x.H, x.H);
      for (int64_t h = 0; h < x.H; h++) to[h] += at.d_q[j * H + h] * x.scale;
    }
    done[0].store(i + 1, std::memory_order_release);
  }
  wait(groups);
  done[0].store(groups, std::memory_order_release);
  for (int64_t s = low; s < high; s++) {
    int64_t row = (b * x.S + s) * x.K + k;
    X *d_k = static_cast<X*>(d.d_k) + row * x.H, *d_v = static_cast<X*>(d.d_v) + row * x.E;
    for (int64_t h = 0; h < x.H; h++) from_float(at.d_k[(s - low) * H + h] * x.scale, d_k + h);
    for (int64_t e = 0; e < x.E; e++) from_float(at.d_v[(s - low) * E + e], d_v + e);
  }
}

// dsink = sum of p_sink (d_lse - D) over rows; the sink has no value, so that its dP is 0.
void sink_gradients(const Inputs& x, const Gradients& d, const Rows& rows) {
  std::fill_n(d.d_sinks, x.N, 0.0f);
  for (int64_t n = 0; n < x.N; n++) {
    if (x.sinks[n] == -kInf) continue;
    double sum = 0.0;
    for (int64_t b = 0; b < x.B; b++) {
      for (int64_t t = 0; t < x.T; t++) {
        int64_t row = (b * x.K + n / x.G) * x.groups() * kRows + t * x.G + n % x.G;
        sum -= std::exp(x.sinks[n] - d.lse[(b * x.N + n) * x.T + t]) * rows.delta[row];
      }
    }
    d.d_sinks[n] = static_cast<float>(sum);
  }
}

template <typename X>
void backward(xla::ffi::ThreadPool& pool, const Inputs& x, const Gradients& d) {
  Rows rows(x);
  int64_t size = x.B * x.T * x.N * x.H, groups = x.groups(), heads = x.B * x.K;
  // dQ is summed in float32: in place if that is its dtype.
  constexpr bool in_place = std::is_same_v<X, float>;
  std::unique_ptr<float[]> wide(in_place ? nullptr : new float[size]);
  float* d_q = in_place ? static_cast<float*>(d.d_q) : wide.get();
  Tasks::run(pool, heads * groups, [&](const Tasks::Next& next) {
    Scratch at(x);
    for (int64_t i; (i = next()) >= 0;) {
      prepare<X>(x, d, i / groups / x.K, i / groups % x.K, i % groups, d_q, at, rows);
    }
  });
  sink_gradients(x, d, rows);
  int64_t blocks = (x.S + kTiles * kKeys - 1) / (kTiles * kKeys);
  std::vector<std::atomic<int64_t>> done(heads * blocks);
  Tasks::run(pool, heads * blocks, [&](const Tasks::Next& next) {
    Scratch at(x);
    for (int64_t i; (i = next()) >= 0;) {
      int64_t head = i / blocks;
      attend<X>(x, d, head / x.K, head % x.K, i % blocks, rows, d_q, &done[i], at);
    }
  });
  if (in_place) return;
  constexpr int64_t piece = 1 << 16;
  Tasks::run(pool, (size + piece - 1) / piece, [&](const Tasks::Next& next) {
    X* to = static_cast<X*>(d.d_q);
    for (int64_t i; (i = next()) >= 0;) {
      for (int64_t j = i * piece; j < std::min(size, (i + 1) * piece); j++) {
        from_float(d_q[j], to + j);
      }
    }
  });
}

namespace ffi = xla::ffi;

ffi::Error call(ffi::ThreadPool pool, AnyBuffer q, AnyBuffer k, AnyBuffer v, Ints first, Ints end,
                Ints q_ids, Ints kv_ids, Floats sinks, Floats out, Floats lse, Floats d_out,
                Floats d_lse, ffi::Result<AnyBuffer> d_q, ffi::Result<AnyBuffer> d_k,
                ffi::Result<AnyBuffer> d_v, ffi::Result<Floats> d_sinks, float scale,
                float softcap, int32_t has_ids) {
  Inputs x;
  auto type = v.element_type();
  size_t rows = 0;
  bool fits = fill(q, k, v, first, end, q_ids, kv_ids, sinks, scale, softcap, has_ids, &x);
  if (fits) rows = static_cast<size_t>(x.B * x.T * x.N);
  if (!fits ||
      d_q->element_type() != type || d_k->element_type() != type || d_v->element_type() != type ||
      out.element_count() != rows * x.E || d_out.element_count() != rows * x.E ||
      lse.element_count() != rows || d_lse.element_count() != rows ||
      d_q->element_count() != q.element_count() || d_k->element_count() != k.element_count() ||
      d_v->element_count() != v.element_count() ||
      d_sinks->element_count() != sinks.element_count()) {
    return ffi::Error::InvalidArgument("jax_attn_backward: shapes or dtypes do not fit");
  }
  Gradients d{out.typed_data(),     d_out.typed_data(),   lse.typed_data(),
              d_lse.typed_data(),   d_q->untyped_data(),  d_k->untyped_data(),
              d_v->untyped_data(),  d_sinks->typed_data()};
  (type == ffi::F32 ? backward<float> : backward<BFloat16>)(pool, x, d);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_attn

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_attn_backward, jax_attn::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jax_attn::AnyBuffer>()  // q
                                  .Arg<jax_attn::AnyBuffer>()  // k
                                  .Arg<jax_attn::AnyBuffer>()  // v
                                  .Arg<jax_attn::Ints>()       // first
                                  .Arg<jax_attn::Ints>()       // end
                                  .Arg<jax_attn::Ints>()       // q_ids
                                  .Arg<jax_attn::Ints>()       // kv_ids
                                  .Arg<jax_attn::Floats>()     // sinks
                                  .Arg<jax_attn::Floats>()     // out
                                  .Arg<jax_attn::Floats>()     // lse
                                  .Arg<jax_attn::Floats>()     // d_out
                                  .Arg<jax_attn::Floats>()     // d_lse
                                  .Ret<jax_attn::AnyBuffer>()  // d_q
                                  .Ret<jax_attn::AnyBuffer>()  // d_k
                                  .Ret<jax_attn::AnyBuffer>()  // d_v
                                  .Ret<jax_attn::Floats>()     // d_sinks
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int32_t>("has_ids"));
