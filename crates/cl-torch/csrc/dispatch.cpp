// Selects at run time which build of the kernels in kernels.h is used.
#include <atomic>

#include "kernels.h"

namespace {

// Kernels for vectors of this many bits; null if this processor does not support them.
const cl::Kernels* of_width(int bits) {
  if (bits == 128) return &cl::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (bits == 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &cl::avx2;
  if (bits == 512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return &cl::avx512;
  }
#endif
  return nullptr;
}

const cl::Kernels* widest() {
  const cl::Kernels* kernels = of_width(512);
  if (!kernels) kernels = of_width(256);
  return kernels ? kernels : of_width(128);
}

std::atomic<const cl::Kernels*>& choice() {
  static std::atomic<const cl::Kernels*> chosen{widest()};
  return chosen;
}

}  // namespace

const cl::Kernels& cl::kernels() { return *choice().load(std::memory_order_relaxed); }

// For tests: selects the kernels for vectors of this many bits, 0 for the widest. Returns 0 if the processor does not
// support them.
extern "C" int cl_use_kernels(int bits) {
  const cl::Kernels* kernels = bits == 0 ? widest() : of_width(bits);
  if (kernels) choice().store(kernels, std::memory_order_relaxed);
  return kernels != nullptr;
}
