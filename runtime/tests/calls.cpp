#include "calls.h"

#include <sstream>

Arrays Arrays::of(const Case& c) {
  const auto data = [](const auto& values) { return values.empty() ? nullptr : values.data(); };
  return {data(c.codes),     data(c.zeros),        data(c.scales),  data(c.codebook_scales), data(c.outliers),
          data(c.codebooks), data(c.range_zero),   data(c.columns), data(c.indices),         data(c.x),
          data(c.bias),      data(c.range_offset), data(c.norm),    data(c.residual)};
}

int32_t call(const Case& c, const Arrays& a, const qc_context& context, bool embedding, float* y) {
  const Form& f = c.form;
  const qc_weight weight = {c.n, c.k, f.bits, f.group, a.codes, a.scales, a.zeros};
  const qc_vq_weight vq = {c.n,     c.k,     f.dim,       f.centroids,       f.block_rows, f.block_columns,
                           f.group, a.codes, a.codebooks, a.codebook_scales, a.scales};
  const int64_t count = int64_t(c.indices.size());
  const qc_activation_range levels = {c.range_scale, a.range_zero, a.range_offset};
  const qc_activation_range* range = f.activation == QC_ACT_INT8_STATIC ? &levels : nullptr;
  const qc_outliers outliers = {int64_t(c.columns.size()), a.columns, a.outliers};
  const qc_linear_edges what = {a.norm, c.epsilon, a.residual, c.gate};
  const qc_linear_edges* edges = c.has_edges() ? &what : nullptr;
  if (f.op == Form::kVq) {
    return embedding ? qc_embedding_vq(&context, &vq, count, a.indices, y)
                     : qc_linear_vq(&context, &vq, f.activation, edges, c.rows, a.x, a.bias, y);
  }
  if (embedding) return qc_embedding_nbit(&context, &weight, count, a.indices, y);
  if (f.op == Form::kExperts) {
    return qc_linear_experts_nbit(&context, &weight, c.experts, f.activation, c.rows, a.x, a.indices, a.bias, y);
  }
  if (f.op == Form::kMixed) {
    return qc_linear_mixed(&context, &weight, f.activation, range, &outliers, c.rows, a.x, a.bias, y);
  }
  return qc_linear_nbit(&context, &weight, f.activation, range, edges, c.rows, a.x, a.bias, y);
}

int64_t values_of(const Case& c, bool embedding) {
  return embedding ? int64_t(c.indices.size()) * c.k : c.rows * c.columns_of_y();
}

std::vector<std::string> isas() {
  std::vector<std::string> out;
  std::istringstream names(qc_isas());
  for (std::string name; std::getline(names, name, ',');) out.push_back(name);
  return out;
}
