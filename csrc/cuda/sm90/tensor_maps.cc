#include "cuda/sm90/tensor_maps.h"

namespace jax_flashattn::cuda {
namespace {

// The driver's encoder, looked up at run time so that the library does not link libcuda.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &status);
    const bool ok = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(ok ? entry : nullptr);
  }();
  return found;
}

}  // namespace

bool make_tensor_map(CUtensorMap* map, const void* data, DType dtype, int64_t b, int64_t s,
                     int64_t h, int64_t d, int rows) {
  const auto encode = encoder();
  if (!encode) return false;
  const cuuint64_t dims[4] = {cuuint64_t(d), cuuint64_t(h), cuuint64_t(s), cuuint64_t(b)};
  const cuuint64_t strides[3] = {cuuint64_t(d * 2), cuuint64_t(h * d * 2),
                                 cuuint64_t(s * h * d * 2)};
  const cuuint32_t box[4] = {kChunk, 1, cuuint32_t(rows), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const auto type =
      dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 4, const_cast<void*>(data), dims, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace jax_flashattn::cuda
