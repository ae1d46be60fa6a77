// The sum of each row of a (rows, C) matrix, with faults to choose from: what the emulator must find.
//   y[row] = sum over c of x[row, c]
// A block of two warps takes a row. `fault` 0 is the right kernel.

#include "cuda.cuh"

namespace fastgpt {
namespace {

enum Fault {
  kNone, kNoBarrierBeforeRead, kNoBarrierBeforeWrite, kOneTooFar, kWriteTooFar, kConst, kMisaligned, kScratchTooSmall,
  kIndex, kDynamicTooSmall, kBarrierInBranch, kBarrierElsewhere, kEarlyExit, kShuffleOutOfRange, kShuffleOfAbsent,
  kWarpRace, kBlocksRace, kNoGuard, kTooMuchShared, kOverflow, kUnset,
};

__global__ void row_sums_kernel(const float* x, float* y, int* count, int64_t C, int fault) {
  __shared__ float scratch[2], all;
  extern __shared__ __align__(16) float mine[];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const float* row = x + blockIdx.x * C;
  if (fault == kEarlyExit && thread == 40) return;
  float sum = 0;
  for (int64_t c = thread; c < C + (fault == kOneTooFar); c += blockDim.x) sum += row[c];
  if (fault == kMisaligned && thread == 0) sum += __ldg(reinterpret_cast<const float4*>(x + 1)).x;
  if (fault == kConst && thread == 0) const_cast<float*>(row)[0] = 1;
  if (fault == kOverflow) sum += static_cast<float>(0x7ffffff0 + lane);

  mine[thread] = sum;  // and back from the next lane's place, by the next lane
  if (fault != kWarpRace) __syncwarp();
  sum = mine[thread ^ 1];
  if (fault == kDynamicTooSmall) mine[thread + 1] = 0;

  const int first = fault == kShuffleOutOfRange ? 32 : 16;
  for (int offset = first; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (fault == kShuffleOfAbsent && lane < 8) sum += __shfl_down_sync(0xffu, sum, 4);
  if (fault != kUnset && lane == 0) scratch[warp + (fault == kIndex ? lane + 1 : 0)] = sum;
  if (fault == kScratchTooSmall && lane == 0) *(scratch + 2 + warp) = sum;
  if (fault == kBarrierElsewhere && warp == 1) {
    __syncthreads();
  } else if (fault != kNoBarrierBeforeRead && (fault != kBarrierInBranch || warp == 0)) {
    __syncthreads();
  }
  if (thread == 32) all = scratch[0] + scratch[1];
  __syncthreads();
  if (thread == 0) y[fault == kBlocksRace ? 0 : blockIdx.x + (fault == kWriteTooFar)] = all;
  if (__syncthreads_count(thread < 10) == 10 && __ballot_sync(0xffffffffu, lane < 3) == 7u && thread == 0) {
    atomicAdd(count, 1);
  }
  if (fault != kNoBarrierBeforeWrite) __syncthreads();
  if (thread == 63) scratch[0] = 0;
  if (fault == kNoBarrierBeforeWrite) y[blockIdx.x] = scratch[0];
}

}  // namespace

Tensor row_sums(Tensor x, Tensor count, int64_t fault) {
  const int64_t rows = x.size(0);
  Tensor y = make_empty(x, {rows}, ScalarType::Float);
  auto run = [&](auto kernel) {
    const size_t shared = fault == kTooMuchShared ? 49 * 1024 : 64 * sizeof(float);
    kernel<<<dim3(static_cast<unsigned>(rows)), 64, shared, current_stream(x)>>>(
        static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(y.mutable_data_ptr()),
        static_cast<int*>(count.mutable_data_ptr()), x.size(1), static_cast<int>(fault));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (fault == kNoGuard) {
    run(row_sums_kernel);
  } else {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    run(row_sums_kernel);
  }
  return y;
}

}  // namespace fastgpt

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) { m.impl("row_sums", TORCH_BOX(&fastgpt::row_sums)); }
