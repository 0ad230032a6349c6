// The operations on the CPU. Each selects an instruction set (dispatch.h) and divides its work over
// threads; results do not depend on `threads`.
#pragma once

#include "attention.h"
#include "stored.h"
#include "tokenwise.h"

namespace cptool::cpu {

// Checks offsets and positions first. Throws std::invalid_argument.
void attention_partial(const AttentionArgs& args, int threads);
void merge_partials(const MergeArgs& args, int threads);

// A row's result does not depend on the other rows of a call.
void linear(const LinearArgs& args, int threads);

// The same, with weights in the type in which they are stored.
void stored_linear(const StoredLinearArgs& args, int threads);
void widen(const WidenArgs& args, int threads);

// The same for many rows, where an instruction set has a kernel for it.
void product(const StoredLinearArgs& args, int threads);

void rms_norm(const RmsNormArgs& args, int threads);
void rotate(const RotateArgs& args, int threads);
void swiglu(const SwigluArgs& args, int threads);

}  // namespace cptool::cpu
