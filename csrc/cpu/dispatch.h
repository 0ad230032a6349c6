// Selects the instruction set for each kind of work: the highest that this machine supports, that
// is preferred here or asked for by name, that the cap allows and that offers it (isa.h).
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace cptool::cpu {

// All instruction sets compiled in, slowest first. The first is "portable", which runs everywhere
// and handles everything.
const Isa* const* isas(int* count);

// Whether it is chosen where it is not asked for by name.
bool is_preferred(const Isa& isa);

// Caps every choice at this instruction set, which is then asked for by name; null lifts the cap.
// Returns false if it is not compiled in or not supported here.
bool force_isa(const char* name);

const Isa& attention_isa(ScalarType q_dtype, ScalarType dtype, int64_t head_dim,
                         Kind kind = Kind::kSoftmax);
const Isa& merge_isa();
const Isa& few_rows_isa(ScalarType dtype);
const Isa& tokenwise_isa();
const Isa& stored_isa(Encoding encoding);  // for products of few rows
const Isa& widen_isa();

// The instruction set for float32 products of many rows; null if the one for few rows is faster
// than any that has such a kernel.
const Isa* product_isa();

}  // namespace cptool::cpu
