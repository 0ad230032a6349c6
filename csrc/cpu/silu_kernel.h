// Which kernel computes a call of SiLU attention: the same as for softmax attention. Unnamed
// namespace: see isa.h.
#pragma once

#include "cpu/panel_kernel.h"
#include "cpu/stream_kernel.h"

namespace cptool::cpu {
namespace {

template <class Math>
inline void run_silu(const AttentionArgs& args, int threads) {
  if (few_rows(args, kStreamRows)) return run_stream<Math, Kind::kSilu>(args, threads);
  run<PanelKernel<Math, Kind::kSilu>>(args, threads);
}

}  // namespace
}  // namespace cptool::cpu
