// EmbeddingVQ: Y[..., k] = W[indices], W vector-quantized, rows decoded to float.
#include "embedding.h"
#include "vq_weight.h"

namespace qc::ort {
namespace {

constexpr OpInput kInputs[] = {
    {kInt64, kRequired},    // indices
    {kUint8, kRequired},    // codes
    {kInt8, kRequired},     // codebooks
    {kFloat16, kRequired},  // codebook_scales
    {kFloat16, kRequired},  // scales
};

}  // namespace

const OpDescription kEmbeddingVQ = {
    "EmbeddingVQ", kInputs, sizeof(kInputs) / sizeof(kInputs[0]), "k", false,
    [](const Api& api, const OrtKernelInfo* info) -> std::unique_ptr<Kernel> {
      return std::make_unique<Embedding<VqWeight, qc_embedding_vq>>(VqWeight(api, info));
    }};

}  // namespace qc::ort
