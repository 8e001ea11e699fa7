// Attention, forward: online softmax over tiles of keys (arXiv:2205.14135), one task for a block of
// query rows of one key/value head.
#include "tiles.h"

namespace jax_attn {
namespace {

constexpr int kKeys = 72;    // keys in a tile: its scores and the group's queries stay in L1 and L2
constexpr int kGroups = 16;  // most groups in a task: so many share the packing of a tile
constexpr int kTasks = 32;   // tasks to split a call into before tasks get more than one group

// One group while its keys pass by.
struct Rows {
  Group group;
  float max[kRows], sum[kRows], shrink[kRows];  // of the logits before scaling; of 2^(logits - max)
  char bad[kRows];                              // the row must come out as NaN if it has any key
  float *q, *out;                               // [H][kRows], [kRows][E]
};

float* take_rows(Arena& arena, int64_t width) { return arena.take<float>(kRows * padded(width)); }

// Logits to weights 2^(logits - max), in place, and the running maximum and sum of every row.
template <int wide>
void soften(float* s, const Inputs& x, const Keys& keys, Rows& rows) {
  const Group& g = rows.group;
  float to_log2 = x.to_log2();
  if (x.softcap > 0) {
    Vec in = broadcast(std::fabs(x.scale) / x.softcap), cap = broadcast(x.softcap);
    for (int64_t i = 0; i < keys.count * kRows; i += kLanes) {
      store(s + i, tanh(load(s + i) * in) * cap);
    }
  }
  bool mixed = keys.mixed(g);
  for (int j = 0; j < keys.count; j++) {
    int64_t key = keys.start + j;
    if (!mixed && key >= g.all_low && key < g.all_high) continue;
    for (int v = 0; v < wide; v++) {
      float* at = s + j * kRows + v * kLanes;
      store(at, allowed(g, keys, j, v, mixed) ? load(at) : broadcast(-kInf));
    }
  }
  Vec top[wide], sum[wide], offset[wide];
  for (int v = 0; v < wide; v++) top[v] = broadcast(-kInf);
  for (int j = 0; j < keys.count; j++) {
    for (int v = 0; v < wide; v++) top[v] = max(top[v], load(s + j * kRows + v * kLanes));
  }
  for (int v = 0; v < wide; v++) {
    Vec old = load(rows.max + v * kLanes), now = max(old, top[v]);
    Vec finite = now == -kInf ? Vec{} : now;  // no key yet: every weight is 2^-inf
    Vec shrink = exp2((old - finite) * to_log2);
    store(rows.max + v * kLanes, now);
    store(rows.shrink + v * kLanes, shrink);
    offset[v] = finite * -to_log2;
    sum[v] = load(rows.sum + v * kLanes) * shrink;
  }
  for (int j = 0; j < keys.count; j++) {
    for (int v = 0; v < wide; v++) {
      float* at = s + j * kRows + v * kLanes;
      Vec p = exp2(fma(load(at), broadcast(to_log2), offset[v]));
      sum[v] += p;
      store(at, p);
    }
  }
  for (int v = 0; v < wide; v++) store(rows.sum + v * kLanes, sum[v]);
}

// Rows that may attend to a key which is not finite.
void mark_bad(const Keys& keys, const char* bad_keys, Rows& rows) {
  for (int j = 0; j < keys.count; j++) {
    if (!bad_keys[j]) continue;
    for (int v = 0; v < kWide; v++) {
      IntVec yes = allowed(rows.group, keys, j, v, keys.mixed(rows.group));
      for (int i = 0; i < kLanes; i++) rows.bad[v * kLanes + i] |= yes[i] != 0;
    }
  }
}

void finish(const Inputs& x, int64_t b, int64_t k, int64_t index, const Rows& rows, float* out,
            float* lse) {
  float scale = x.softcap > 0 ? 1.0f : x.scale ? std::fabs(x.scale) : 1.0f;
  for (int i = 0; i < rows.group.rows; i++) {
    int64_t r = index * kRows + i, at = x.q_at(b, k, r);
    float sink = x.sinks[k * x.G + r % x.G], factor = 0.0f, row_lse = sink;
    if (rows.max[i] != -kInf) {
      // In double: the backward pass exponentiates what lse is rounded to.
      double max = static_cast<double>(rows.max[i]) * scale, top = max, total = rows.sum[i];
      double shrink = 1.0;
      if (sink != -kInf) {
        top = std::max<double>(max, sink);
        shrink = std::exp(max - top);
        total = total * shrink + std::exp(sink - top);
      }
      factor = rows.bad[i] ? kNaN : static_cast<float>(shrink / total);
      row_lse = static_cast<float>(top + std::log(total));
    }
    lse[x.lse_at(b, k, r)] = row_lse;
    const float* from = rows.out + i * padded(x.E);
    for (int64_t e = 0; e < x.E; e++) out[at * x.E + e] = from[e] * factor;
  }
}

// What one thread needs for its tasks.
struct Scratch {
  Scratch(const Inputs& x, int64_t groups)
      : arena(sizeof(float) * (groups * (kRows * (padded(x.H) + padded(x.E))) +
                               kKeys * (padded(x.H) + padded(x.E) + kRows) +
                               kRows * padded(x.H)) +
              sizeof(Rows) * groups + 4096),
        rows(arena.take<Rows>(groups)),
        bad_keys(arena.take<char>(kKeys)),
        k(arena.take<float>(kKeys * padded(x.H))),
        v(arena.take<float>(kKeys * padded(x.E))),
        s(arena.take<float>(kKeys * kRows)),
        q(take_rows(arena, x.H)) {
    for (int64_t i = 0; i < groups; i++) {
      rows[i].q = take_rows(arena, x.H), rows[i].out = take_rows(arena, x.E);
    }
  }

  Arena arena;
  Rows* rows;
  char* bad_keys;
  float *k, *v, *s, *q;
};

template <typename X>
void start(const Inputs& x, int64_t b, int64_t k, int64_t index, float* packed, Rows& rows) {
  rows.group.fill(x, b, index);
  std::fill_n(rows.max, kRows, -kInf);
  std::fill_n(rows.sum, kRows, 0.0f);
  std::fill_n(rows.bad, kRows, 0);
  std::fill_n(rows.out, kRows * padded(x.E), 0.0f);
  pack_group<true, X>(x, x.q, b, k, index, rows.group, x.H, packed, rows.bad);
  transpose_group(packed, x.H, x.q_factor(), rows.q);
}

void attend_tile(const Inputs& x, const Keys& keys, const Scratch& at, Rows& rows) {
  int64_t H = padded(x.H), E = padded(x.E);
  int wide = rows.group.wide;
  product<false, kStore>(keys.count, wide, x.H, at.k, H, rows.q, kRows, at.s, kRows);
  if (wide == kWide) soften<kWide>(at.s, x, keys, rows);
  if (kWide > 3 && wide == 3) soften<3>(at.s, x, keys, rows);
  if (kWide > 2 && wide == 2) soften<2>(at.s, x, keys, rows);
  if (kWide > 1 && wide == 1) soften<1>(at.s, x, keys, rows);
  if (keys.any_bad) mark_bad(keys, at.bad_keys, rows);
  product<true, kScaleAdd>(rows.group.rows, E / kLanes, keys.count, at.s, kRows, at.v, E, rows.out,
                           E, rows.shrink);
}

// Groups first, ..., first + count - 1 of one key/value head.
template <typename X>
void attend(const Inputs& x, int64_t b, int64_t k, int64_t first, int64_t count, const Scratch& at,
            float* out, float* lse) {
  int64_t low = x.S, high = 0;
  for (int64_t i = 0; i < count; i++) {
    start<X>(x, b, k, first + i, at.q, at.rows[i]);
    low = std::min(low, at.rows[i].group.low), high = std::max(high, at.rows[i].group.high);
  }
  for (int64_t tile = low; tile < high; tile += kKeys) {
    Keys keys{tile, static_cast<int>(std::min<int64_t>(kKeys, high - tile)), false, 0, 0, nullptr};
    keys.fill_ids(x, b);
    std::fill_n(at.bad_keys, kKeys, 0);
    pack_keys<X>(x, x.k, b, k, x.H, &keys, at.k, at.bad_keys);
    pack_keys<X>(x, x.v, b, k, x.E, &keys, at.v, at.bad_keys);
    for (int64_t i = 0; i < count; i++) {
      const Group& g = at.rows[i].group;
      if (g.high <= tile || g.low >= tile + keys.count || !keys.meets(g)) continue;
      Keys some = keys;  // without the keys after the group's last
      some.count = static_cast<int>(std::min<int64_t>(keys.count, g.high - tile));
      attend_tile(x, some, at, at.rows[i]);
    }
  }
  for (int64_t i = 0; i < count; i++) finish(x, b, k, first + i, at.rows[i], out, lse);
}

template <typename X>
void forward(xla::ffi::ThreadPool& pool, const Inputs& x, float* out, float* lse) {
  int64_t groups = x.groups(), heads = x.B * x.K;
  int64_t share = std::min<int64_t>(std::max<int64_t>(heads * groups / kTasks, 1), kGroups);
  int64_t blocks = (groups + share - 1) / share;
  Tasks::run(pool, heads * blocks, [&](const Tasks::Next& next) {
    Scratch scratch(x, std::min(share, groups));
    for (int64_t i; (i = next()) >= 0;) {
      // From the last block, which has most keys if the mask is causal: short tasks end the run.
      int64_t first = (blocks - 1 - i % blocks) * share, head = i / blocks;
      int64_t count = std::min(share, groups - first);
      attend<X>(x, head / x.K, head % x.K, first, count, scratch, out, lse);
    }
  });
}

namespace ffi = xla::ffi;

ffi::Error call(ffi::ThreadPool pool, AnyBuffer q, AnyBuffer k, AnyBuffer v, Ints first, Ints end,
                Ints q_ids, Ints kv_ids, Floats sinks, ffi::Result<Floats> out,
                ffi::Result<Floats> lse, float scale, float softcap, int32_t has_ids) {
  Inputs x;
  if (!fill(q, k, v, first, end, q_ids, kv_ids, sinks, scale, softcap, has_ids, &x) ||
      out->element_count() != static_cast<size_t>(x.B * x.T * x.N * x.E) ||
      lse->element_count() != static_cast<size_t>(x.B * x.T * x.N)) {
    return ffi::Error::InvalidArgument("jax_attn_forward: shapes or dtypes do not fit");
  }
  auto run = v.element_type() == ffi::F32 ? forward<float> : forward<BFloat16>;
  run(pool, x, out->typed_data(), lse->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_attn

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_attn_forward, jax_attn::call,
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
                                  .Ret<jax_attn::Floats>()     // out
                                  .Ret<jax_attn::Floats>()     // lse
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int32_t>("has_ids"));
