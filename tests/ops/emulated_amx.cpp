// The AMX kernel on emulated tiles (emulated_tiles/), as a library for test_emulated_amx.py. Calls
// of few rows go through it too.
#include "cpu/amx_kernel.h"

extern "C" {

void attention_partial(const cptool::AttentionArgs* args, int threads) {
  cptool::cpu::run<cptool::cpu::AmxKernel>(*args, threads);
}

void tile_counts(int64_t* loads, int64_t* stores, int64_t* products) {
  *loads = cptool::cpu::tile_counts.loads.exchange(0);
  *stores = cptool::cpu::tile_counts.stores.exchange(0);
  *products = cptool::cpu::tile_counts.products.exchange(0);
}

}  // extern "C"
