// Runs a compiled model from C++: ONNX Runtime's own API, and one line that registers our op library. Inputs are zeros
// with open dimensions taken as 1; a real program puts token ids and its cache there.
//
// Needs ONNX Runtime's headers and library (Debian: libonnxruntime-dev; or a release archive):
//   qcompiler library -o .
//   g++ -std=c++17 run_artifact.cpp -I$ORT/include -L$ORT/lib -lonnxruntime -o run_artifact
//   ./run_artifact model.onnx ./libqcompiler_ops.so
#include <onnxruntime_cxx_api.h>

#include <cstdio>
#include <cstring>

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: run_artifact MODEL.onnx libqcompiler_ops.so\n"), 2;
  Ort::Env env;
  Ort::SessionOptions options;
  options.RegisterCustomOpsLibrary(argv[2]);
  Ort::Session session(env, argv[1], options);

  Ort::AllocatorWithDefaultOptions allocator;
  Ort::IoBinding binding(session);
  for (size_t i = 0; i < session.GetInputCount(); ++i) {
    const Ort::TypeInfo type = session.GetInputTypeInfo(i);
    const auto info = type.GetTensorTypeAndShapeInfo();
    std::vector<int64_t> shape = info.GetShape();
    for (int64_t& dimension : shape) dimension = dimension < 0 ? 1 : dimension;
    Ort::Value value = Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), info.GetElementType());
    const size_t width = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 ? 8 : 4;
    std::memset(value.GetTensorMutableRawData(), 0, value.GetTensorTypeAndShapeInfo().GetElementCount() * width);
    binding.BindInput(session.GetInputNameAllocated(i, allocator).get(), value);
  }
  const auto output = session.GetOutputNameAllocated(0, allocator);
  binding.BindOutput(output.get(), allocator.GetInfo());
  session.Run(Ort::RunOptions{}, binding);

  const Ort::Value result = std::move(binding.GetOutputValues()[0]);
  std::printf("%s: %zu values, the first %g\n", output.get(), result.GetTensorTypeAndShapeInfo().GetElementCount(),
              *result.GetTensorData<float>());
}
