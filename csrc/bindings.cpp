// The functions that Python calls, which take addresses, sizes and strides. Their callers in cptool
// have checked every tensor; offsets and positions on the CPU are checked by cpu/attention.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "attention.h"
#include "cpu/decoder_layer.h"
#include "cpu/dispatch.h"
#include "cpu/ops.h"
#include "cpu/schedule.h"
#include "peer_memory.h"
#if defined(CPTOOL_HAS_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

using cptool::AttentionArgs;
using cptool::MergeArgs;
using cptool::RmsNormArgs;
using cptool::RotateArgs;
using cptool::ScalarType;
using cptool::SwigluArgs;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

AttentionArgs attention_args(uintptr_t q, int64_t q_token_stride, int64_t q_head_stride,
                             uintptr_t k, int64_t k_token_stride, int64_t k_head_stride,
                             uintptr_t v, int64_t v_token_stride, int64_t v_head_stride,
                             uintptr_t q_pos, uintptr_t k_pos, uintptr_t cu_q, uintptr_t cu_k,
                             int64_t batch, int64_t q_tokens, int64_t k_tokens, int64_t q_heads,
                             int64_t kv_heads, int64_t head_dim, double scale, int q_dtype,
                             int dtype, int out_dtype, uintptr_t out, uintptr_t lse,
                             bool accumulate, int64_t window, double cap, int sm_margin,
                             double max_len) {
  AttentionArgs args;
  args.q = pointer<const void>(q);
  args.k = pointer<const void>(k);
  args.v = pointer<const void>(v);
  args.q_token_stride = q_token_stride;
  args.q_head_stride = q_head_stride;
  args.k_token_stride = k_token_stride;
  args.k_head_stride = k_head_stride;
  args.v_token_stride = v_token_stride;
  args.v_head_stride = v_head_stride;
  args.q_pos = pointer<const int32_t>(q_pos);
  args.k_pos = pointer<const int32_t>(k_pos);
  args.cu_q = pointer<const int32_t>(cu_q);
  args.cu_k = pointer<const int32_t>(cu_k);
  args.batch = batch;
  args.q_tokens = q_tokens;
  args.k_tokens = k_tokens;
  args.q_heads = q_heads;
  args.kv_heads = kv_heads;
  args.head_dim = head_dim;
  args.scale = static_cast<float>(scale);
  args.q_dtype = static_cast<ScalarType>(q_dtype);
  args.dtype = static_cast<ScalarType>(dtype);
  args.out_dtype = static_cast<ScalarType>(out_dtype);
  args.out = pointer<void>(out);
  args.lse = pointer<float>(lse);
  args.accumulate = accumulate;
  args.window = window;
  args.cap = static_cast<float>(cap);
  args.sm_margin = sm_margin;
  args.max_len = static_cast<float>(max_len);
  return args;
}

// Calls `run(args, extra...)` with what attention_args makes of the other parameters, without the
// GIL.
template <class Result, class... Extra, class... Parameters>
auto with_attention_args(Result (*run)(const AttentionArgs&, Extra...),
                         AttentionArgs (*)(Parameters...)) {
  return [run](Parameters... parameters, Extra... extra) {
    const AttentionArgs args = attention_args(parameters...);
    py::gil_scoped_release released;
    return run(args, extra...);
  };
}

// The same for partials.
template <class Extra>
auto with_merge_args(void (*run)(const MergeArgs&, Extra)) {
  return
      [run](const std::vector<uintptr_t>& outs, const std::vector<uintptr_t>& lses, int64_t rows,
            int64_t head_dim, int dtype, int out_dtype, uintptr_t out, uintptr_t lse, Extra extra) {
        std::vector<const void*> out_pointers;
        std::vector<const float*> lse_pointers;
        for (size_t i = 0; i < outs.size(); ++i) {
          out_pointers.push_back(pointer<const void>(outs[i]));
          lse_pointers.push_back(pointer<const float>(lses[i]));
        }
        MergeArgs args;
        args.outs = out_pointers.data();
        args.lses = lse_pointers.data();
        args.partials = static_cast<int64_t>(outs.size());
        args.rows = rows;
        args.head_dim = head_dim;
        args.dtype = static_cast<ScalarType>(dtype);
        args.out_dtype = static_cast<ScalarType>(out_dtype);
        args.out = pointer<void>(out);
        args.lse = pointer<float>(lse);
        py::gil_scoped_release released;
        run(args, extra);
      };
}

// The token-wise steps: `extra` is a number of threads or a stream.
template <class Extra>
auto with_rms_norm_args(void (*run)(const RmsNormArgs&, Extra)) {
  return [run](uintptr_t hidden, int64_t hidden_stride, uintptr_t added, uintptr_t weight,
               uintptr_t out, int64_t rows, int64_t width, double eps, int dtype, Extra extra) {
    py::gil_scoped_release released;
    run({pointer<void>(hidden), pointer<const void>(added), pointer<const void>(weight),
         pointer<void>(out), hidden_stride, rows, width, static_cast<float>(eps),
         static_cast<ScalarType>(dtype)},
        extra);
  };
}

template <class Extra>
auto with_rotate_args(void (*run)(const RotateArgs&, Extra)) {
  return [run](uintptr_t heads, int64_t token_stride, int64_t head_stride, uintptr_t cos,
               uintptr_t sin, int64_t tokens, int64_t num_heads, int64_t head_dim, int dtype,
               Extra extra) {
    py::gil_scoped_release released;
    run({pointer<void>(heads), token_stride, head_stride, pointer<const float>(cos),
         pointer<const float>(sin), tokens, num_heads, head_dim, static_cast<ScalarType>(dtype)},
        extra);
  };
}

template <class Extra>
auto with_swiglu_args(void (*run)(const SwigluArgs&, Extra)) {
  return [run](uintptr_t gate, int64_t gate_stride, uintptr_t up, int64_t up_stride, int64_t rows,
               int64_t width, int dtype, Extra extra) {
    py::gil_scoped_release released;
    run({pointer<void>(gate), pointer<const void>(up), gate_stride, up_stride, rows, width,
         static_cast<ScalarType>(dtype)},
        extra);
  };
}

void linear(uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, uintptr_t out,
            int64_t rows, int64_t columns, int64_t depth, int dtype, int threads) {
  py::gil_scoped_release released;
  cptool::cpu::linear({pointer<const void>(x), pointer<const void>(w), pointer<void>(out), x_stride,
                       w_stride, rows, columns, depth, static_cast<ScalarType>(dtype)},
                      threads);
}

cptool::StoredMatrix stored(uintptr_t at, int64_t stride, int64_t rows, int64_t depth,
                            int64_t head_dim, int encoding) {
  return {pointer<const void>(at),
          stride,
          rows,
          depth,
          head_dim,
          static_cast<cptool::Encoding>(encoding)};
}

void stored_linear(uintptr_t w, int64_t w_stride, int64_t columns, int64_t depth, int64_t head_dim,
                   int encoding, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t out,
                   int64_t out_stride, int threads) {
  py::gil_scoped_release released;
  cptool::cpu::stored_linear(
      {stored(w, w_stride, columns, depth, head_dim, encoding), pointer<const float>(x),
       pointer<float>(out), x_stride, out_stride, rows},
      threads);
}

void product(uintptr_t w, int64_t w_stride, int64_t columns, int64_t depth, int64_t head_dim,
             int encoding, uintptr_t x, int64_t x_stride, int64_t rows, uintptr_t out,
             int64_t out_stride, int threads) {
  py::gil_scoped_release released;
  cptool::cpu::product({stored(w, w_stride, columns, depth, head_dim, encoding),
                        pointer<const float>(x), pointer<float>(out), x_stride, out_stride, rows},
                       threads);
}

void widen(uintptr_t w, int64_t w_stride, int64_t rows, int64_t depth, int64_t head_dim,
           int encoding, uintptr_t index, int64_t first, int64_t count, uintptr_t out,
           int threads) {
  py::gil_scoped_release released;
  cptool::cpu::widen({stored(w, w_stride, rows, depth, head_dim, encoding),
                      pointer<const int64_t>(index), first, count, pointer<float>(out)},
                     threads);
}

// A weight, as Python gives it: its address and the elements from row to row, or the address of
// `parts` times the arguments of `stored`.
struct LayerWeight {
  LayerWeight(uintptr_t at, int64_t stride, int64_t parts)
      : weight{pointer<const void>(at), stride, nullptr, parts} {
    const int64_t* from = pointer<const int64_t>(at);
    for (int64_t i = 0; i < parts; ++i, from += 6) {
      matrices.push_back(stored(static_cast<uintptr_t>(from[0]), from[1], from[2], from[3], from[4],
                                static_cast<int>(from[5])));
    }
    weight.stored = matrices.data();
  }
  std::vector<cptool::StoredMatrix> matrices;
  cptool::cpu::Weight weight;
};

void layer_input(uintptr_t hidden, int64_t stride, int64_t rows, int64_t width, int dtype,
                 uintptr_t norm, double eps, uintptr_t qkv, int64_t qkv_stride, int64_t qkv_parts,
                 int64_t columns, int64_t rotated, int64_t head_dim, uintptr_t cos, uintptr_t sin,
                 uintptr_t scratch, uintptr_t out, int threads) {
  py::gil_scoped_release released;
  const LayerWeight qkv_weight(qkv, qkv_stride, qkv_parts);
  cptool::cpu::layer_input(
      {{pointer<void>(hidden), stride, rows, width, static_cast<ScalarType>(dtype)},
       pointer<const void>(norm),
       static_cast<float>(eps),
       qkv_weight.weight,
       columns,
       rotated,
       head_dim,
       pointer<const float>(cos),
       pointer<const float>(sin),
       pointer<void>(scratch),
       pointer<void>(out)},
      threads);
}

void layer_output(uintptr_t hidden, int64_t stride, int64_t rows, int64_t width, int dtype,
                  uintptr_t attended, int64_t depth, uintptr_t o, int64_t o_stride, int64_t o_parts,
                  uintptr_t norm, double eps, uintptr_t gate_up, int64_t gate_up_stride,
                  int64_t gate_up_parts, uintptr_t down, int64_t down_stride, int64_t down_parts,
                  int64_t ffn, uintptr_t scratch, int threads) {
  py::gil_scoped_release released;
  const LayerWeight o_weight(o, o_stride, o_parts), down_weight(down, down_stride, down_parts);
  const LayerWeight gate_up_weight(gate_up, gate_up_stride, gate_up_parts);
  cptool::cpu::layer_output(
      {{pointer<void>(hidden), stride, rows, width, static_cast<ScalarType>(dtype)},
       pointer<const void>(attended),
       depth,
       o_weight.weight,
       pointer<const void>(norm),
       static_cast<float>(eps),
       gate_up_weight.weight,
       down_weight.weight,
       ffn,
       pointer<void>(scratch)},
      threads);
}

template <class Wanted>
std::vector<std::string> cpu_isas(const Wanted& wanted) {
  int count;
  const cptool::cpu::Isa* const* isas = cptool::cpu::isas(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    if (wanted(*isas[i])) names.push_back(isas[i]->name);
  }
  return names;
}

bool any_isa(const cptool::cpu::Isa&) { return true; }
bool usable_isa(const cptool::cpu::Isa& isa) { return isa.supported(); }
bool slow_isa(const cptool::cpu::Isa& isa) {
  return isa.supported() && !cptool::cpu::is_preferred(isa);
}

void define_cpu_ops(py::module_& m) {
  m.def("attention_partial_cpu",
        with_attention_args(cptool::cpu::attention_partial, attention_args));
  m.def("merge_partials_cpu", with_merge_args<int>(cptool::cpu::merge_partials));
  m.def("linear_cpu", linear);
  m.def("stored_linear_cpu", stored_linear);
  m.def("widen_cpu", widen);
  m.def("product_cpu", product);
  m.def("layer_input_cpu", layer_input);
  m.def("layer_output_cpu", layer_output);
  m.def("rms_norm_cpu", with_rms_norm_args<int>(cptool::cpu::rms_norm));
  m.def("rotate_cpu", with_rotate_args<int>(cptool::cpu::rotate));
  m.def("swiglu_cpu", with_swiglu_args<int>(cptool::cpu::swiglu));
}

void define_cpu_dispatch(py::module_& m) {
  m.attr("isas_compiled") = cpu_isas(any_isa);
  m.def("cpu_isas", [] { return cpu_isas(usable_isa); });
  m.def("cpu_slow_isas", [] { return cpu_isas(slow_isa); });
  m.def("cpu_isa", [](int q_dtype, int dtype, int64_t head_dim) {
    return cptool::cpu::attention_isa(static_cast<ScalarType>(q_dtype),
                                      static_cast<ScalarType>(dtype), head_dim)
        .name;
  });
  m.def("cpu_stream_rows", [](int q_dtype, int dtype, int64_t head_dim) {
    const auto q = static_cast<ScalarType>(q_dtype), kv = static_cast<ScalarType>(dtype);
    const auto rows = cptool::cpu::attention_isa(q, kv, head_dim).attention.stream_rows;
    return rows == nullptr ? 0 : rows(q, kv);
  });
  m.def("cpu_linear_isa",
        [](int dtype) { return cptool::cpu::few_rows_isa(static_cast<ScalarType>(dtype)).name; });
  m.def("cpu_stored_rows", [](int encoding) {
    const auto of = static_cast<cptool::Encoding>(encoding);
    return cptool::cpu::stored_isa(of).stored.most_rows(of);
  });
  m.def("cpu_product_isa", [] {
    const cptool::cpu::Isa* const isa = cptool::cpu::product_isa();
    return isa == nullptr ? "" : isa->name;
  });
  m.def("cpu_stored_isa", [](int encoding) {
    return cptool::cpu::stored_isa(static_cast<cptool::Encoding>(encoding)).name;
  });
  m.def("watch_attention_cpu", [](uintptr_t pairs, uintptr_t cancelled) {
    cptool::cpu::watch_attention({pointer<int64_t>(pairs), pointer<const int64_t>(cancelled)});
  });
  m.def("force_cpu_isa", cptool::cpu::force_isa, py::arg("name").none(true));
}

// The last arguments are the workspace's address and a cudaStream_t of the current device.
void define_cuda_ops([[maybe_unused]] py::module_& m) {
#if defined(CPTOOL_HAS_CUDA)
  m.def("attention_partial_cuda",
        with_attention_args(cptool::cuda::attention_partial, attention_args));
  m.def("attention_workspace_cuda",
        with_attention_args(cptool::cuda::attention_workspace, attention_args));
  m.attr("cuda_kernels_compiled") = cptool::cuda::kernel_names(false);
  m.def("cuda_kernels", [] { return cptool::cuda::kernel_names(true); });
  m.def("cuda_kernel", with_attention_args(cptool::cuda::kernel_name, attention_args));
  m.def("force_cuda_kernel", cptool::cuda::force_kernel, py::arg("name").none(true));
  m.def("merge_partials_cuda", with_merge_args<uintptr_t>(cptool::cuda::merge_partials));
  m.def("rms_norm_cuda", with_rms_norm_args<uintptr_t>(cptool::cuda::rms_norm));
  m.def("rotate_cuda", with_rotate_args<uintptr_t>(cptool::cuda::rotate));
  m.def("swiglu_cuda", with_swiglu_args<uintptr_t>(cptool::cuda::swiglu));
#endif
}

void define_peer_memory(py::module_& m) {
  m.def("read_peer", [](int64_t pid, uintptr_t from, uintptr_t to, int64_t bytes) {
    py::gil_scoped_release released;
    return cptool::read_peer(pid, from, pointer<void>(to), bytes);
  });
  m.def("signal_word", [](uintptr_t word, uint32_t value) {
    cptool::signal_word(pointer<uint32_t>(word), value);
  });
  m.def("wait_word", [](uintptr_t word, uint32_t value, int64_t spin_us, int64_t sleep_ms) {
    py::gil_scoped_release released;
    return cptool::wait_word(pointer<const uint32_t>(word), value, spin_us, sleep_ms);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = CPTOOL_VERSION;
  m.attr("source_hash") = CPTOOL_SOURCE_HASH;
  m.attr("compiler") = CPTOOL_COMPILER;
  m.attr("cuda_archs") = CPTOOL_CUDA_ARCHS_BUILT;  // empty: no CUDA kernels
  m.attr("watchdog") = CPTOOL_WATCHDOG_BUILT;
  define_cpu_ops(m);
  define_cpu_dispatch(m);
  define_cuda_ops(m);
  define_peer_memory(m);
}
