#ifndef QCOMPILER_ORT_SHAPE_INFERENCE_H
#define QCOMPILER_ORT_SHAPE_INFERENCE_H

#include "ops.h"
#include "ort_abi.h"

namespace qc::ort {

// Tells ONNX Runtime the output's shape, dimensions' names included. Where something is not known, says nothing: what
// is wrong with a node is reported when its kernel is created, and there with the node's name.
void infer_output_shape(const Api& api, const OpDescription& op, OrtShapeInferContext* context);

}  // namespace qc::ort

#endif
