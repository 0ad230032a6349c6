// The AMX kernels on emulated tiles (emulated_tiles/), as a library for test_emulated_amx.py.
// Attention of few rows goes through them too.
#include <vector>

#include "cpu/amx_kernel.h"
#include "cpu/float32_math.h"
#include "cpu/panel_kernel.h"
#include "cpu/stream_kernel.h"
#if !defined(CPTOOL_ATTENTION_ALONE)
#include "cpu/amx_product.h"
#endif

extern "C" {

void attention_partial(const cptool::AttentionArgs* args, int threads) {
  using namespace cptool::cpu;
  if (args->q_dtype == cptool::ScalarType::kBFloat16) {
    return run<AmxKernel<BFloat16Tiles>>(*args, threads);
  }
  cptool::with_type(args->dtype, [&](auto element) {
    run<AmxKernel<Float32Tiles<decltype(element)>>>(*args, threads);
  });
}

// The kernels of AVX-512 in float32, as avx512.cpp selects them.
void attention_partial_avx512(const cptool::AttentionArgs* args, int threads) {
  using namespace cptool::cpu;
  cptool::with_type(args->dtype, [&](auto element) {
    using Math = Float32Math<decltype(element)>;
    if (few_rows(*args, kStreamRows)) return run_stream<Math>(*args, threads);
    run<PanelKernel<Math>>(*args, threads);
  });
}

#if !defined(CPTOOL_ATTENTION_ALONE)
void product(const cptool::StoredLinearArgs* args, int64_t piece_columns) {
  std::vector<char> scratch(cptool::cpu::kAmxProduct.scratch_bytes + 64);
  char* const aligned = scratch.data() + 64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64;
  for (int64_t n = 0; n < args->w.rows; n += piece_columns) {
    const int64_t columns = std::min(piece_columns, args->w.rows - n);
    cptool::cpu::kAmxProduct.compute(*args, {0, args->rows, n, columns}, aligned);
  }
}
#endif

void tile_counts(int64_t* loads, int64_t* stores, int64_t* products) {
  *loads = cptool::cpu::tile_counts.loads.exchange(0);
  *stores = cptool::cpu::tile_counts.stores.exchange(0);
  *products = cptool::cpu::tile_counts.products.exchange(0);
}

}  // extern "C"
