// Matrix descriptors: how wgmma finds its operands in shared memory. Host and device.
//
// A tile is cut into panels of 64 columns of 16 bits. A panel's rows are 128 bytes apart, and the
// panel starts at a multiple of 1024. TMA and wgmma agree on the 128-byte swizzle: 16-byte chunk c
// of row r lies at chunk c ^ (r % 8), so that eight rows' chunks of one column lie in different
// banks. It is a function of the address alone, bits 4 to 6 ^= bits 7 to 9; hence a descriptor may
// start within the first row of the swizzle's eight, at the address that its first chunk would have
// if nothing were swizzled.
#pragma once

#include <cstdint>

#include "softmax_state.h"

namespace cptool::cuda::sm90 {
namespace {

constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 128;
constexpr int kSwizzleBytes = 8 * kRowBytes;  // after which the swizzle repeats
constexpr int kDepth = 16;                    // columns of a and rows of b in one product

// Returns a matrix descriptor (PTX ISA 9.7.15.5.1): addresses and offsets without their lowest 4
// bits; bits 62 and 63 are 1 for the 128-byte swizzle.
CPTOOL_HOST_DEVICE constexpr uint64_t descriptor(uint32_t address, uint32_t leading_bytes,
                                                 uint32_t stride_bytes) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// Q and K, whose rows lie along the products' sum ("K-major"): groups of eight rows follow each
// other. The leading offset has no meaning for a swizzled operand; 16 encodes the 1 that the manual
// requires.
CPTOOL_HOST_DEVICE constexpr uint64_t rows_descriptor(uint32_t panel) {
  return descriptor(panel, 16, kSwizzleBytes);
}

// V, whose rows lie across the sum ("MN-major"): 64 columns per panel, panels `panel_bytes` apart,
// and again consecutive groups of eight rows.
CPTOOL_HOST_DEVICE constexpr uint64_t columns_descriptor(uint32_t panel, uint32_t panel_bytes) {
  return descriptor(panel, panel_bytes, kSwizzleBytes);
}

// The same operand `bytes` further. Shared memory ends below 2^18, so nothing carries into the
// leading offset, and the upper half does not change.
CPTOOL_HOST_DEVICE constexpr uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & ~static_cast<uint64_t>(UINT32_MAX)) |
         (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// The offset of depth step `step` in a K-major tile: four steps per panel.
CPTOOL_HOST_DEVICE constexpr uint32_t step_along_rows(int step, uint32_t panel_bytes) {
  constexpr int kSteps = kPanelColumns / kDepth;
  return static_cast<uint32_t>(step / kSteps) * panel_bytes +
         static_cast<uint32_t>(step % kSteps * kDepth * 2);
}

// The same in an MN-major tile: 16 rows further.
CPTOOL_HOST_DEVICE constexpr uint32_t step_across_rows(int step) {
  return static_cast<uint32_t>(step * kDepth * kRowBytes);
}

}  // namespace
}  // namespace cptool::cuda::sm90
