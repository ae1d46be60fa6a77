// A list of tensors as one kernel's work: a table in the kernel's parameters, which a CUDA graph keeps, and the list
// cut into chunks that the blocks of a fixed grid take in turn. Since CUDA 12.1 parameters may be 32,764 bytes.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda.cuh"

namespace fastgpt {

// `at[k][t]` is tensor t of the k-th list, for up to kTensors tensors that have elements.
template <int kLists, int kTensors>
struct TensorTable {
  void* at[kLists][kTensors];
  int64_t numel[kTensors];
  int first_chunk[kTensors + 1];  // tensor t is chunks first_chunk[t] and on
  int tensors;
};

struct TensorList {
  const std::vector<Tensor>& tensors;
  bool written;
};

// Calls launch(table) for as many tables as `lists` need; tensors without elements are left out. All lists are as long
// as the first; a list that is not there is empty, and its pointers are null.
template <int kLists, int kTensors, typename Launch>
void for_tables(const TensorList (&lists)[kLists], int64_t chunk, const char* name, Launch launch) {
  TensorTable<kLists, kTensors> table;
  table.tensors = table.first_chunk[0] = 0;
  for (size_t i = 0; i < lists[0].tensors.size(); ++i) {
    const int64_t n = lists[0].tensors[i].numel();
    if (n == 0) continue;
    const int t = table.tensors;
    for (int k = 0; k < kLists; ++k) {
      const auto& [tensors, written] = lists[k];
      table.at[k][t] = tensors.empty() ? nullptr
          : written                    ? tensors[i].mutable_data_ptr()
                                       : const_cast<void*>(tensors[i].const_data_ptr());
    }
    const int64_t next = table.first_chunk[t] + (n + chunk - 1) / chunk;
    STD_TORCH_CHECK(next <= INT32_MAX, name, ": more elements than one call takes");
    table.numel[t] = n;
    table.first_chunk[t + 1] = static_cast<int>(next);
    if (++table.tensors == kTensors) {
      launch(table);
      table.tensors = table.first_chunk[0] = 0;
    }
  }
  if (table.tensors > 0) launch(table);
}

// Calls f(tensor, first element, elements) for each of this block's chunks.
template <int kLists, int kTensors, typename F>
__device__ __forceinline__ void for_chunks(const TensorTable<kLists, kTensors>& table, int64_t chunk, F f) {
  int t = 0;
  for (int c = blockIdx.x; c < table.first_chunk[table.tensors]; c += gridDim.x) {
    while (table.first_chunk[t + 1] <= c) ++t;
    const int64_t first = static_cast<int64_t>(c - table.first_chunk[t]) * chunk, left = table.numel[t] - first;
    f(t, first, static_cast<int>(left < chunk ? left : chunk));
  }
}

// N elements from or to memory on a 16-byte boundary, in accesses of 16 bytes.
template <int N, typename T>
__device__ __forceinline__ void get(T (&to)[N], const T* from) {
  constexpr int kPart = 16 / sizeof(T);
#pragma unroll
  for (int j = 0; j < N / kPart; ++j) {
    const Vec<T, kPart> v = reinterpret_cast<const Vec<T, kPart>*>(from)[j];
#pragma unroll
    for (int k = 0; k < kPart; ++k) to[j * kPart + k] = v.at[k];
  }
}

template <int N, typename T>
__device__ __forceinline__ void put(T* to, const T (&from)[N]) {
  constexpr int kPart = 16 / sizeof(T);
#pragma unroll
  for (int j = 0; j < N / kPart; ++j) {
    Vec<T, kPart> v;
#pragma unroll
    for (int k = 0; k < kPart; ++k) v.at[k] = from[j * kPart + k];
    reinterpret_cast<Vec<T, kPart>*>(to)[j] = v;
  }
}

__device__ __forceinline__ bool on_16_bytes(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

}  // namespace fastgpt
