// The loop over rows of a panel (panel.h) with vpdpbusd, for vectors of either width: V is one of
//   V::Int, V::Float                   vectors
//   V::kLeastRows, V::kMostRows        a block has one of these many rows, or 6
//   V::kLanes                          the parts of a panel: vectors of kLanes output rows, from tile to tile
//   V::bytes(panel, part), V::stride(panel)   where a part's bytes lie, and from one part to the next one's
//   V::store(job, tile, part, row, acc)       writes its outputs, part 0 being the first of `tile`
//   V::load<Flip>(p), V::broadcast(word), V::dot(sum, bytes, activations) and so on
// Lane = output row. P parts meet R rows: their R * P sums, and as many in float, stay in registers; a row's activations are
// loaded once for all P, and a vector of weights once for all R. vpdpbusd does not saturate, so every sum is exact modulo 2^32,
// and a segment's true sum fits (checked by the caller). Internal linkage throughout, see layout.h.
#ifndef QCOMPILER_VNNI_PANEL_H
#define QCOMPILER_VNNI_PANEL_H

#include <type_traits>

#include "panel.h"

namespace qc {
namespace {

// `Flip`: the bytes are signed codes, and vpdpbusd takes unsigned ones, biased by 128.
template <class V, int R, int P, bool Asymmetric, bool Flip>
void multiply_block(const LinearJob& job, const Panel& panel, int64_t tile, int64_t part, int64_t block) {
  const int32_t* x = reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(job.x) + block * job.x_block_bytes);
  const float* sa = job.sa + block * job.segments * R;
  const int32_t* sums = job.sums + block * job.segments * R;
  const uint8_t* bytes = V::bytes(panel, part);
  const int64_t stride = V::stride(panel);
  const float* scales = panel.scales + part * V::kLanes;
  const int32_t* zeros = Asymmetric ? panel.zeros + part * V::kLanes : nullptr;
  constexpr int64_t kVectors = kPanelStep / 4;
  const int64_t per_segment = ceil_div(job.segment, kPanelStep);
  int64_t left = ceil_div(job.weight.k, kPanelStep);

  typename V::Float acc[R][P];
  for (int m = 0; m < R; ++m) {
    for (int p = 0; p < P; ++p) acc[m][p] = V::zero();
  }
  for (int64_t s = 0; s < job.segments; ++s) {
    typename V::Int dot[R][P];
    for (int m = 0; m < R; ++m) {
      for (int p = 0; p < P; ++p) dot[m][p] = V::broadcast(Asymmetric ? 0 : sums[m]);
    }
    int64_t steps = per_segment < left ? per_segment : left;
    left -= steps;
    for (; steps > 0; --steps, bytes += kVectors * kVectorBytes, x += kVectors * R) {
      for (int64_t v = 0; v < kVectors; ++v) {
        typename V::Int w[P];
        for (int p = 0; p < P; ++p) w[p] = V::template load<Flip>(bytes + p * stride + kVectorBytes * v);
        for (int m = 0; m < R; ++m) {
          const typename V::Int a = V::kept(V::broadcast(x[v * R + m]));
          for (int p = 0; p < P; ++p) dot[m][p] = V::kept(V::dot(dot[m][p], w[p], a));
        }
      }
    }
    for (int p = 0; p < P; ++p) {
      const typename V::Float scale = V::load_float(scales + p * V::kLanes);
      for (int m = 0; m < R; ++m) {
        typename V::Int d = dot[m][p];
        if (Asymmetric) d = V::minus_product(d, V::load_int(zeros + p * V::kLanes), sums[m]);
        acc[m][p] = V::add_scaled(acc[m][p], d, scale, sa[m]);
      }
    }
    sa += R;
    sums += R;
    scales += panel.scale_step;
    if (Asymmetric) zeros += panel.scale_step;
  }
  for (int m = 0; m < R; ++m) {
    for (int p = 0; p < P; ++p) V::store(job, tile, part + p, block * R + m, acc[m][p]);
  }
}

template <class V, int R, bool Asymmetric, bool Flip>
void multiply_parts(const LinearJob& job, const Panel& panel, int64_t tile, int64_t tiles, int64_t begin, int64_t end) {
  const int64_t parts = tiles * (kTileRows / V::kLanes);
  for (int64_t part = 0; part < parts; part += 2) {
    const auto run = part + 1 < parts ? multiply_block<V, R, 2, Asymmetric, Flip> : multiply_block<V, R, 1, Asymmetric, Flip>;
    for (int64_t block = begin; block < end; ++block) run(job, panel, tile, part, block);
  }
}

template <class V>
void multiply_panel(const LinearJob& job, const Panel& panel, int64_t tile, int64_t tiles, int64_t begin, int64_t end) {
  const auto of_rows = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    return panel.zeros ? panel.codes ? multiply_parts<V, R, true, true> : multiply_parts<V, R, true, false>
           : panel.codes ? multiply_parts<V, R, false, true>
                       : multiply_parts<V, R, false, false>;
  };
  const auto run = job.block_rows == V::kLeastRows ? of_rows(std::integral_constant<int, V::kLeastRows>())
                   : job.block_rows == 6           ? of_rows(std::integral_constant<int, 6>())
                                                   : of_rows(std::integral_constant<int, V::kMostRows>());
  run(job, panel, tile, tiles, begin, end);
}

}  // namespace
}  // namespace qc
#endif
