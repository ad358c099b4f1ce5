// Helpers for every entry point of the shim: C++ exceptions are caught, and their text is kept per thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

extern thread_local std::string cl_error_text;

template <class F>
int guarded(F body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& e) {
    cl_error_text = e.what_without_backtrace();
  } catch (const std::exception& e) {
    cl_error_text = e.what();
  } catch (...) {
    cl_error_text = "unknown C++ exception";
  }
  return -1;
}

inline std::vector<at::Tensor> gather(at::Tensor* const* p, size_t n) {
  std::vector<at::Tensor> v;
  v.reserve(n);
  for (size_t i = 0; i < n; ++i) v.push_back(*p[i]);
  return v;
}
