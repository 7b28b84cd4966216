// The slice of ONNX Runtime's C ABI that this library uses, declared without its header: no package that pip installs
// carries one.
//
// Source: onnxruntime_c_api.h. `OrtApi` is a struct of function pointers that only ever grows at its end (ONNX Runtime
// asserts at compile time that the last entry of each released version keeps its place), and `OrtCustomOp` a struct whose
// leading `version` says how much of it is filled. So an entry's index is its identity: every ONNX Runtime from 1.17 on,
// which first had API version 17, can load what is built here. tests/runtime/test_ort_abi.py compares all of this with
// the official header where one is installed.
#ifndef QCOMPILER_ORT_ABI_H
#define QCOMPILER_ORT_ABI_H

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define QC_ORT_CALL __stdcall
#else
#define QC_ORT_CALL
#endif

namespace qc::ort {

// The API version that this library asks for and fills its ops for.
constexpr uint32_t kApiVersion = 17;

// Opaque to us; only pointers travel.
struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtTensorTypeAndShapeInfo;
struct OrtCustomOpDomain;
struct OrtSessionOptions;
struct OrtCustomOp;

// ONNXTensorElementDataType: the types of our inputs and outputs.
enum ElementType : int {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
};

// OrtErrorCode.
enum ErrorCode : int {
  kFail = 1,
  kInvalidArgument = 2,
  kRuntimeException = 6,
  kNotImplemented = 9,
  kInvalidGraph = 10,
};

// OrtCustomOpInputOutputCharacteristic.
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// OrtMemType.
enum MemoryType : int { kMemoryDefault = 0 };

// OrtOpAttrType.
enum AttributeType : int { kAttributeInt = 1 };

// OrtApi. A line QC_ORT(index, result, name, parameters...) is entry `index` of the table, callable as api.name(...).
#define QC_ORT(index, result, name, ...)                                               \
  template <class... Arguments>                                                        \
  result name(Arguments... arguments) const {                                          \
    using Function = result(QC_ORT_CALL*)(__VA_ARGS__);                                \
    return reinterpret_cast<Function>(const_cast<void*>(table[index]))(arguments...); \
  }

struct Api {
  const void* const* table = nullptr;

  // Status. The message belongs to the status.
  QC_ORT(0, OrtStatus*, CreateStatus, int code, const char* message)
  QC_ORT(1, int, GetErrorCode, const OrtStatus*)
  QC_ORT(2, const char*, GetErrorMessage, const OrtStatus*)
  QC_ORT(93, void, ReleaseStatus, OrtStatus*)

  // Registration. The session options keep the domain's pointer, the domain the op's: both must outlive the sessions.
  QC_ORT(26, OrtStatus*, CreateCustomOpDomain, const char* domain, OrtCustomOpDomain** out)
  QC_ORT(27, OrtStatus*, CustomOpDomain_Add, OrtCustomOpDomain*, const OrtCustomOp*)
  QC_ORT(28, OrtStatus*, AddCustomOpDomain, OrtSessionOptions*, OrtCustomOpDomain*)
  QC_ORT(101, void, ReleaseCustomOpDomain, OrtCustomOpDomain*)

  // Tensors. GetTensorTypeAndShape makes a new object that the caller releases.
  QC_ORT(51, OrtStatus*, GetTensorMutableData, OrtValue*, void** out)
  QC_ORT(57, OrtStatus*, CreateTensorTypeAndShapeInfo, OrtTensorTypeAndShapeInfo** out)
  QC_ORT(58, OrtStatus*, SetTensorElementType, OrtTensorTypeAndShapeInfo*, int type)
  QC_ORT(59, OrtStatus*, SetDimensions, OrtTensorTypeAndShapeInfo*, const int64_t* dims, size_t count)
  QC_ORT(60, OrtStatus*, GetTensorElementType, const OrtTensorTypeAndShapeInfo*, int* out)
  QC_ORT(61, OrtStatus*, GetDimensionsCount, const OrtTensorTypeAndShapeInfo*, size_t* out)
  QC_ORT(62, OrtStatus*, GetDimensions, const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t count)
  QC_ORT(63, OrtStatus*, GetSymbolicDimensions, const OrtTensorTypeAndShapeInfo*, const char** names, size_t count)
  QC_ORT(65, OrtStatus*, GetTensorTypeAndShape, const OrtValue*, OrtTensorTypeAndShapeInfo** out)
  QC_ORT(99, void, ReleaseTensorTypeAndShapeInfo, OrtTensorTypeAndShapeInfo*)
  QC_ORT(271, OrtStatus*, SetSymbolicDimensions, OrtTensorTypeAndShapeInfo*, const char** names, size_t count)

  // What a kernel is created from. `out` of GetNodeName may be null: then `size` becomes the bytes needed.
  // A constant input is ONNX Runtime's own initializer: no copy, alive as long as the session.
  QC_ORT(85, OrtStatus*, KernelInfoGetAttribute_float, const OrtKernelInfo*, const char* name, float* out)
  QC_ORT(86, OrtStatus*, KernelInfoGetAttribute_int64, const OrtKernelInfo*, const char* name, int64_t* out)
  QC_ORT(230, OrtStatus*, KernelInfo_GetInputCount, const OrtKernelInfo*, size_t* out)
  QC_ORT(244, OrtStatus*, KernelInfo_GetNodeName, const OrtKernelInfo*, char* out, size_t* size)
  QC_ORT(249, OrtStatus*, KernelInfoGetConstantInput_tensor, const OrtKernelInfo*, size_t index, int* is_constant,
         const OrtValue** out)

  // What a kernel computes with. The input of an optional argument that the node leaves out is null.
  QC_ORT(88, OrtStatus*, KernelContext_GetInputCount, const OrtKernelContext*, size_t* out)
  QC_ORT(90, OrtStatus*, KernelContext_GetInput, const OrtKernelContext*, size_t index, const OrtValue** out)
  QC_ORT(91, OrtStatus*, KernelContext_GetOutput, OrtKernelContext*, size_t index, const int64_t* dims, size_t count,
         OrtValue** out)
  QC_ORT(274, OrtStatus*, KernelContext_ParallelFor, const OrtKernelContext*, void (*body)(void*, size_t), size_t total,
         size_t batches, void* user)

  // Shape inference. The info that GetInputTypeShape gives belongs to the context.
  QC_ORT(268, OrtStatus*, ShapeInferContext_GetInputTypeShape, const OrtShapeInferContext*, size_t index,
         OrtTensorTypeAndShapeInfo** out)
  QC_ORT(269, OrtStatus*, ShapeInferContext_GetAttribute, const OrtShapeInferContext*, const char* name,
         const OrtOpAttr** out)
  QC_ORT(270, OrtStatus*, ShapeInferContext_SetOutputTypeShape, const OrtShapeInferContext*, size_t index,
         const OrtTensorTypeAndShapeInfo*)
  QC_ORT(272, OrtStatus*, ReadOpAttr, const OrtOpAttr*, int type, void* data, size_t bytes, size_t* out)
};

#undef QC_ORT

// OrtApiBase, what RegisterCustomOps receives. GetApi gives null where this ONNX Runtime is older than asked for.
struct OrtApiBase {
  const void* const*(QC_ORT_CALL* GetApi)(uint32_t version);
  const char*(QC_ORT_CALL* GetVersionString)();
};

// OrtCustomOp. Everything up to the variadic entries is called unconditionally, so none of it may be null, except the
// two of version 1 (CreateKernel, KernelCompute) where their V2 is set. ONNX Runtime looks past GetEndVersion only when
// `version` is 18 or more.
struct OrtCustomOp {
  uint32_t version;
  void*(QC_ORT_CALL* CreateKernel)(const OrtCustomOp*, const void* api, const OrtKernelInfo*);
  const char*(QC_ORT_CALL* GetName)(const OrtCustomOp*);
  const char*(QC_ORT_CALL* GetExecutionProviderType)(const OrtCustomOp*);
  int(QC_ORT_CALL* GetInputType)(const OrtCustomOp*, size_t index);
  size_t(QC_ORT_CALL* GetInputTypeCount)(const OrtCustomOp*);
  int(QC_ORT_CALL* GetOutputType)(const OrtCustomOp*, size_t index);
  size_t(QC_ORT_CALL* GetOutputTypeCount)(const OrtCustomOp*);
  void(QC_ORT_CALL* KernelCompute)(void* kernel, OrtKernelContext*);
  void(QC_ORT_CALL* KernelDestroy)(void* kernel);
  int(QC_ORT_CALL* GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  int(QC_ORT_CALL* GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int(QC_ORT_CALL* GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int(QC_ORT_CALL* GetVariadicInputMinArity)(const OrtCustomOp*);
  int(QC_ORT_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int(QC_ORT_CALL* GetVariadicOutputMinArity)(const OrtCustomOp*);
  int(QC_ORT_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus*(QC_ORT_CALL* CreateKernelV2)(const OrtCustomOp*, const void* api, const OrtKernelInfo*, void** kernel);
  OrtStatus*(QC_ORT_CALL* KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus*(QC_ORT_CALL* InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int(QC_ORT_CALL* GetStartVersion)(const OrtCustomOp*);
  int(QC_ORT_CALL* GetEndVersion)(const OrtCustomOp*);
  size_t(QC_ORT_CALL* GetMayInplace)(int** input_index, int** output_index);
  void(QC_ORT_CALL* ReleaseMayInplace)(int* input_index, int* output_index);
  size_t(QC_ORT_CALL* GetAliasMap)(int** input_index, int** output_index);
  void(QC_ORT_CALL* ReleaseAliasMap)(int* input_index, int* output_index);
};

static_assert(offsetof(OrtCustomOp, CreateKernel) == sizeof(void*), "pointers follow the padded version");
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void*), "a version and 25 function pointers");

}  // namespace qc::ort

#endif
