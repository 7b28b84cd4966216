// EmbeddingNBit: Y[..., k] = W[indices], W packed, rows decoded to float.
#include "embedding.h"

namespace qc::ort {
namespace {

constexpr OpInput kInputs[] = {
    {kInt64, kRequired},    // indices
    {kUint8, kRequired},    // codes
    {kFloat16, kRequired},  // scales
    {kUint8, kOptional},    // zeros
};

}  // namespace

const OpDescription kEmbeddingNBit = {
    "EmbeddingNBit", kInputs, sizeof(kInputs) / sizeof(kInputs[0]), "k", false,
    [](const Api& api, const OrtKernelInfo* info) -> std::unique_ptr<Kernel> {
      return std::make_unique<Embedding<Weight, qc_embedding_nbit>>(Weight(api, info, 1));
    }};

}  // namespace qc::ort
