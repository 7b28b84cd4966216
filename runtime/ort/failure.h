// How errors travel inside the ONNX Runtime face: thrown as Failure, turned into an OrtStatus at every entry point.
#ifndef QCOMPILER_ORT_FAILURE_H
#define QCOMPILER_ORT_FAILURE_H

#include <exception>
#include <string>

#include "ort_abi.h"

namespace qc::ort {

struct Failure {
  ErrorCode code;
  std::string message;
};

// Throws what an API call reports.
inline void check(const Api& api, OrtStatus* status) {
  if (status == nullptr) return;
  Failure failure{kFail, api.GetErrorMessage(status)};
  api.ReleaseStatus(status);
  throw failure;
}

// For calls whose failure changes nothing.
inline bool succeeded(const Api& api, OrtStatus* status) {
  if (status == nullptr) return true;
  api.ReleaseStatus(status);
  return false;
}

// Runs body; no exception gets out. `where` stands before every message: op and node.
template <class Body>
OrtStatus* guarded(const Api& api, const std::string& where, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return api.CreateStatus(failure.code, (where + ": " + failure.message).c_str());
  } catch (const std::exception& error) {
    return api.CreateStatus(kRuntimeException, (where + ": " + error.what()).c_str());
  } catch (...) {
    return api.CreateStatus(kRuntimeException, where.c_str());
  }
}

}  // namespace qc::ort

#endif
