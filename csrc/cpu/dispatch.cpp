#include "cpu/dispatch.h"

#include <atomic>
#include <cstring>

#include "cpu/isa_table.h"  // written by CMakeLists.txt: kIsas

namespace cptool::cpu {
namespace {

constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

std::atomic<int> last_allowed{kIsaCount};  // kIsaCount: none is asked for by name

template <class Offers>
const Isa& fastest(const Offers& offers) {
  const int last = last_allowed.load(std::memory_order_relaxed);
  for (int i = last < kIsaCount ? last : kIsaCount - 1; i > 0; --i) {
    const Isa& isa = *kIsas[i];
    if (isa.supported() && (i == last || is_preferred(isa)) && offers(isa)) return isa;
  }
  return *kIsas[0];
}

}  // namespace

bool is_preferred(const Isa& isa) { return isa.preferred == nullptr || isa.preferred(); }

const Isa* const* isas(int* count) {
  *count = kIsaCount;
  return kIsas;
}

bool force_isa(const char* name) {
  if (name == nullptr) {
    last_allowed = kIsaCount;
    return true;
  }
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(kIsas[i]->name, name) == 0 && kIsas[i]->supported()) {
      last_allowed = i;
      return true;
    }
  }
  return false;
}

const Isa& attention_isa(ScalarType q_dtype, ScalarType dtype, int64_t head_dim, Kind kind) {
  return fastest([=](const Isa& isa) {
    return isa.attention.handles != nullptr && isa.attention.handles(q_dtype, dtype, head_dim) &&
           (kind == Kind::kSoftmax || isa.attention.silu_partial != nullptr);
  });
}

const Isa& merge_isa() {
  return fastest([](const Isa& isa) { return isa.merge_partials != nullptr; });
}

const Isa& few_rows_isa(ScalarType dtype) {
  return fastest([=](const Isa& isa) {
    return isa.few_rows.handles != nullptr && isa.few_rows.handles(dtype);
  });
}

const Isa& tokenwise_isa() {
  return fastest([](const Isa& isa) { return isa.tokenwise.rms_norm != nullptr; });
}

const Isa& stored_isa(Encoding encoding) {
  return fastest([=](const Isa& isa) {
    return isa.stored.handles != nullptr && isa.stored.handles(encoding);
  });
}

const Isa& widen_isa() {
  return fastest([](const Isa& isa) { return isa.stored.widen != nullptr; });
}

const Isa* product_isa() {
  const Isa* const few_rows = &few_rows_isa(ScalarType::kFloat32);
  const Isa& found =
      fastest([=](const Isa& isa) { return isa.product.compute != nullptr || &isa == few_rows; });
  return found.product.compute == nullptr ? nullptr : &found;
}

}  // namespace cptool::cpu
