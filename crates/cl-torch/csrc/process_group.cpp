// A process group (c10d): a TCPStore for the rendezvous, and Gloo's collective operations on CPU tensors.
#define USE_C10D_GLOO 1
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <c10/util/Logging.h>

#include <algorithm>
#include <chrono>
#include <string>

#include "guard.h"

using at::Tensor;
using Work = c10::intrusive_ptr<c10d::Work>;

struct cl_group {
  c10::intrusive_ptr<c10d::Store> store;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo;
};

struct cl_work {
  Work work;
};

namespace {

template <class F>
int started(cl_work** result, F start) {
  return guarded([&] { *result = new cl_work{start()}; });
}

}  // namespace

extern "C" {

// `interface` names the network interface for collectives, `host` gives an address of it; if both are null, libtorch
// chooses. The process with `serves` hosts the store.
int cl_process_group(const char* address, uint16_t port, int serves, int rank, int world, int64_t timeout_ms,
                     const char* prefix, const char* interface, const char* host, cl_group** result) {
  return guarded([&] {
    // c10d logs warnings on every rank if host names do not resolve, although it does not need them. Errors are thrown
    // as exceptions anyway.
    FLAGS_caffe2_log_level = std::max(FLAGS_caffe2_log_level, c10::GLOG_ERROR);
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = serves != 0;
    options.numWorkers = static_cast<size_t>(world);
    // Do not wait for the other ranks here; they may join later. If the store waited for them, its error would name no
    // rank.
    options.waitWorkers = false;
    options.timeout = std::chrono::milliseconds(timeout_ms);
    auto tcp = c10::make_intrusive<c10d::TCPStore>(std::string(address), options);
    c10::intrusive_ptr<c10d::Store> store = c10::make_intrusive<c10d::PrefixStore>(std::string(prefix), tcp);
    auto gloo = c10d::ProcessGroupGloo::Options::create(std::chrono::milliseconds(timeout_ms));
    gloo->devices.push_back(interface != nullptr ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                            : host != nullptr    ? c10d::ProcessGroupGloo::createDeviceForHostname(host)
                                                 : c10d::ProcessGroupGloo::createDefaultDevice());
    *result = new cl_group{store, c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, world, gloo)};
  });
}

void cl_process_group_free(cl_group* group) { delete group; }

int cl_all_reduce(cl_group* group, Tensor* tensor, cl_work** result) {
  return started(result, [&] {
    std::vector<Tensor> tensors{*tensor};
    return group->gloo->allreduce(tensors);
  });
}

int cl_broadcast(cl_group* group, Tensor* tensor, int root, cl_work** result) {
  return started(result, [&] {
    std::vector<Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return group->gloo->broadcast(tensors, options);
  });
}

// `output` has `world` times as many elements as `input`, ordered by rank.
int cl_all_gather(cl_group* group, Tensor* output, Tensor* input, cl_work** result) {
  return started(result, [&] { return group->gloo->_allgather_base(*output, *input); });
}

// `input` has `world` times as many elements as `output`; rank r gets part r of the sum.
int cl_reduce_scatter(cl_group* group, Tensor* output, Tensor* input, cl_work** result) {
  return started(result, [&] { return group->gloo->_reduce_scatter_base(*output, *input); });
}

int cl_barrier(cl_group* group, cl_work** result) {
  return started(result, [&] { return group->gloo->barrier(); });
}

int cl_work_wait(cl_work* work) {
  return guarded([&] { work->work->wait(); });
}

void cl_work_free(cl_work* work) { delete work; }

}  // extern "C"
