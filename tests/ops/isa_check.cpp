// Fails unless csrc/cpu/dispatch.cpp selects, among toy instruction sets, the fastest that is
// supported, allowed and offers the kernel. Prints the line of each check that fails.
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "cpu/dispatch.h"

namespace cptool::cpu {
namespace {

bool yes() { return true; }
bool no() { return false; }
bool any_attention(ScalarType, ScalarType, int64_t) { return true; }
bool any_product(ScalarType) { return true; }
bool is_bfloat16(ScalarType dtype) { return dtype == ScalarType::kBFloat16; }
bool bfloat16_attention(ScalarType q_dtype, ScalarType dtype, int64_t head_dim) {
  return is_bfloat16(q_dtype) && is_bfloat16(dtype) && head_dim % 16 == 0;
}
void merge(const MergeArgs&, int) {}
void norm(const RmsNormArgs&, int64_t, int64_t) {}

}  // namespace

extern constexpr Isa isa_portable = {"portable", yes,           {any_attention},
                                     merge,      {any_product}, {norm}};
extern constexpr Isa isa_wide = {"wide", yes, {any_attention}, merge, {any_product}, {norm}};
extern constexpr Isa isa_absent = {"absent", no, {any_attention}, merge, {any_product}, {norm}};
extern constexpr Isa isa_pairs = {"pairs", yes, {bfloat16_attention}, nullptr, {is_bfloat16}};
extern constexpr Isa isa_steps = {"steps", yes, {}, nullptr, {}, {norm}};

}  // namespace cptool::cpu

using cptool::ScalarType;
using namespace cptool::cpu;

#define CHECK(condition) \
  if (!(condition)) return std::printf("line %d: %s\n", __LINE__, #condition), 1

static bool is(const Isa& isa, const char* name) { return std::strcmp(isa.name, name) == 0; }

int main() {
  int count;
  const Isa* const* all = isas(&count);
  CHECK(count == 5 && is(*all[0], "portable") && is(*all[4], "steps"));

  for (const char* cap : {static_cast<const char*>(nullptr), "steps"}) {
    CHECK(force_isa(cap));
    CHECK(is(attention_isa(ScalarType::kBFloat16, ScalarType::kBFloat16, 64), "pairs"));
    CHECK(is(attention_isa(ScalarType::kBFloat16, ScalarType::kBFloat16, 72), "wide"));
    CHECK(is(attention_isa(ScalarType::kFloat32, ScalarType::kBFloat16, 64), "wide"));
    CHECK(is(attention_isa(ScalarType::kFloat32, ScalarType::kFloat32, 64), "wide"));
    CHECK(is(merge_isa(), "wide"));
    CHECK(is(few_rows_isa(ScalarType::kBFloat16), "pairs"));
    CHECK(is(few_rows_isa(ScalarType::kFloat32), "wide"));
    CHECK(is(tokenwise_isa(), "steps"));
  }

  CHECK(force_isa("pairs"));
  CHECK(is(attention_isa(ScalarType::kBFloat16, ScalarType::kBFloat16, 64), "pairs"));
  CHECK(is(tokenwise_isa(), "wide"));

  CHECK(force_isa("wide"));
  CHECK(!force_isa("absent"));   // leaves the cap as it is
  CHECK(!force_isa("unknown"));  // this, too
  CHECK(is(attention_isa(ScalarType::kBFloat16, ScalarType::kBFloat16, 64), "wide"));
  CHECK(is(few_rows_isa(ScalarType::kBFloat16), "wide"));

  CHECK(force_isa("portable"));
  CHECK(is(attention_isa(ScalarType::kBFloat16, ScalarType::kBFloat16, 64), "portable"));
  CHECK(is(merge_isa(), "portable"));
  CHECK(is(few_rows_isa(ScalarType::kFloat32), "portable"));
  CHECK(is(tokenwise_isa(), "portable"));

  CHECK(force_isa(nullptr));
  CHECK(is(tokenwise_isa(), "steps"));
  return 0;
}
