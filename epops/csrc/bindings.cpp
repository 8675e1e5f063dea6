// The pybind11 module epops._C: parameter structs as Python objects, and the launches. No torch headers: tensors come
// as addresses, streams as integers, so one build serves every torch of the same CUDA major version.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

#ifndef EPOPS_CUDA_ARCHS
#define EPOPS_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using namespace epops;

namespace {

void check(int error, const char* op, const Launch* launch = nullptr) {
  if (error == cudaSuccess) return;
  std::string text = std::string("epops.") + op +
                     ": the kernel could not be launched: " + cudaGetErrorString(static_cast<cudaError_t>(error));
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    text += std::string("; epops was built for ") + EPOPS_CUDA_ARCHS +
            ", not for this GPU: build it again on this machine, or with EPOPS_CUDA_ARCHS";
  }
  if (launch != nullptr) {
    text += " (" + std::to_string(launch->num_blocks) + " blocks of " + std::to_string(launch->num_threads) +
            " threads, teams of " + std::to_string(launch->send_warps) + " warps, rows as " +
            std::to_string(launch->rows_as) + ")";
  }
  (void)cudaGetLastError();
  throw std::runtime_error(text);
}

// An address member as an int in Python; None is null.
template <class C, class T>
void address(py::class_<C>& cls, const char* name, T* C::* member) {
  cls.def_property(
      name, [member](const C& self) { return reinterpret_cast<uintptr_t>(self.*member); },
      [member](C& self, uintptr_t value) { self.*member = reinterpret_cast<T*>(value); });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA kernels of epops: dispatch, combine, their gradients and all_to_all over peer-mapped memory";
  m.attr("cuda_archs") = EPOPS_CUDA_ARCHS;
  m.attr("cuda_version") = CUDART_VERSION;
  m.attr("max_ranks") = kMaxRanks;
  m.attr("max_top_k") = kMaxTopK;
  m.attr("max_slots") = kMaxSlots;
  m.attr("max_tokens") = kMaxTokens;
  m.attr("max_dims") = kMaxDims;
  m.attr("all_to_all_threads") = kAllToAllThreads;
  m.attr("small_ranks") = kSmallRanks;
  m.attr("count_words") = kCountWords;
  m.attr("error_words") = kErrorWords;
  m.def("max_chunks", &max_chunks);
  m.def("lines_bytes", &lines_bytes, "Bytes of a record of so many bytes as lines.");

  py::class_<Workspace> ws(m, "Workspace");
  ws.def(py::init([] { return Workspace{}; }))
      .def_readwrite("rank", &Workspace::rank)
      .def_readwrite("num_ranks", &Workspace::num_ranks)
      .def_readwrite("max_tokens", &Workspace::max_tokens)
      .def_readwrite("max_top_k", &Workspace::max_top_k)
      .def_readwrite("max_slots", &Workspace::max_slots)
      .def_readwrite("board_tokens", &Workspace::board_tokens)
      .def_readwrite("line_tokens", &Workspace::line_tokens)
      .def_readwrite("line_bytes", &Workspace::line_bytes)
      .def_readwrite("data_bytes", &Workspace::data_bytes)
      .def_readwrite("ring_bytes", &Workspace::ring_bytes)
      .def_readonly("ring_slots", &Workspace::ring_slots)
      .def_readonly("slot_bytes", &Workspace::slot_bytes)
      .def_readonly("tagged_bytes", &Workspace::tagged_bytes)
      .def_readwrite("timeout_ns", &Workspace::timeout_ns)
      .def("layout", [](Workspace& self) { return layout_workspace(self); })
      .def("set_peers", [](Workspace& self, const std::vector<uint64_t>& peers) {
        for (size_t i = 0; i < peers.size() && i < kMaxRanks; ++i) self.base[i] = peers[i];
      });
  address(ws, "error_host", &Workspace::error_host);

  py::class_<Launch>(m, "Launch")
      .def(py::init([] { return Launch{}; }))
      .def_readwrite("num_blocks", &Launch::num_blocks)
      .def_readwrite("num_senders", &Launch::num_senders)
      .def_readwrite("num_threads", &Launch::num_threads)
      .def_readwrite("send_warps", &Launch::send_warps)
      .def_readwrite("recv_warps", &Launch::recv_warps)
      .def_readwrite("dynamic", &Launch::dynamic)
      .def_readwrite("phases", &Launch::phases)
      .def_readwrite("rows_as", &Launch::rows_as)
      .def_readwrite("pdl", &Launch::pdl);

  py::class_<Quant>(m, "Quant")
      .def(py::init([] { return Quant{}; }))
      .def_readwrite("block", &Quant::block)
      .def_readwrite("format", &Quant::format)
      .def_readwrite("math", &Quant::math)
      .def_readwrite("eps_on_scale", &Quant::eps_on_scale)
      .def_readwrite("clamp", &Quant::clamp)
      .def_readwrite("e5m2", &Quant::e5m2)
      .def_readwrite("usual", &Quant::usual)
      .def_readwrite("eps", &Quant::eps)
      .def_readwrite("top", &Quant::top)
      .def_readwrite("top_inverse", &Quant::top_inverse);

  py::class_<DispatchParams> d(m, "DispatchParams");
  d.def(py::init([] { return DispatchParams{}; }))
      .def_readwrite("ws", &DispatchParams::ws)
      .def_readwrite("launch", &DispatchParams::launch)
      .def_readwrite("quant", &DispatchParams::quant)
      .def_readwrite("scale_token_stride", &DispatchParams::scale_token_stride)
      .def_readwrite("scale_block_stride", &DispatchParams::scale_block_stride)
      .def_readwrite("out_scale_row_stride", &DispatchParams::out_scale_row_stride)
      .def_readwrite("out_scale_block_stride", &DispatchParams::out_scale_block_stride)
      .def_readwrite("x_dtype", &DispatchParams::x_dtype)
      .def_readwrite("idx64", &DispatchParams::idx64)
      .def_readwrite("num_tokens", &DispatchParams::num_tokens)
      .def_readwrite("max_tokens", &DispatchParams::max_tokens)
      .def_readwrite("top_k", &DispatchParams::top_k)
      .def_readwrite("num_experts", &DispatchParams::num_experts)
      .def_readwrite("num_slots", &DispatchParams::num_slots)
      .def_readwrite("capacity", &DispatchParams::capacity)
      .def_readwrite("alignment", &DispatchParams::alignment)
      .def_readwrite("layout", &DispatchParams::layout)
      .def_readwrite("lane", &DispatchParams::lane)
      .def_readwrite("hidden", &DispatchParams::hidden)
      .def_readwrite("row_bytes", &DispatchParams::row_bytes)
      .def_readwrite("num_scales", &DispatchParams::num_scales)
      .def_readwrite("wire_scale_bytes", &DispatchParams::wire_scale_bytes)
      .def_readwrite("out_scale_bytes", &DispatchParams::out_scale_bytes)
      .def_readwrite("record_bytes", &DispatchParams::record_bytes)
      .def_readwrite("sent_bytes", &DispatchParams::sent_bytes)
      .def_readwrite("tiles", &DispatchParams::tiles)
      .def_readwrite("chunk_tokens", &DispatchParams::chunk_tokens)
      .def_readwrite("num_chunks", &DispatchParams::num_chunks)
      .def_readwrite("num_stages", &DispatchParams::num_stages)
      .def_readwrite("num_land", &DispatchParams::num_land)
      .def_readwrite("stage_bytes", &DispatchParams::stage_bytes)
      .def_readwrite("piece_bytes", &DispatchParams::piece_bytes)
      .def_readwrite("call_hash", &DispatchParams::call_hash)
      .def("shared_bytes", &dispatch_shared_bytes)
      .def("lines_shared_bytes", &dispatch_lines_shared_bytes);
  address(d, "x", &DispatchParams::x);
  address(d, "x_scales", &DispatchParams::x_scales);
  address(d, "topk_idx", &DispatchParams::topk_idx);
  address(d, "topk_weights", &DispatchParams::topk_weights);
  address(d, "expert_slot", &DispatchParams::expert_slot);
  address(d, "mask", &DispatchParams::mask);
  address(d, "rows", &DispatchParams::rows);
  address(d, "scales", &DispatchParams::scales);
  address(d, "row_weights", &DispatchParams::row_weights);
  address(d, "row_expert", &DispatchParams::row_expert);
  address(d, "row_source", &DispatchParams::row_source);
  address(d, "expert_counts", &DispatchParams::expert_counts);
  address(d, "expert_ends", &DispatchParams::expert_ends);
  address(d, "route", &DispatchParams::route);
  address(d, "status", &DispatchParams::status);

  py::class_<CombineParams> c(m, "CombineParams");
  c.def(py::init([] { return CombineParams{}; }))
      .def_readwrite("ws", &CombineParams::ws)
      .def_readwrite("launch", &CombineParams::launch)
      .def_readwrite("out_scale", &CombineParams::out_scale)
      .def_readwrite("addend_scale", &CombineParams::addend_scale)
      .def_readwrite("in_dtype", &CombineParams::in_dtype)
      .def_readwrite("out_dtype", &CombineParams::out_dtype)
      .def_readwrite("num_tokens", &CombineParams::num_tokens)
      .def_readwrite("max_tokens", &CombineParams::max_tokens)
      .def_readwrite("top_k", &CombineParams::top_k)
      .def_readwrite("num_experts", &CombineParams::num_experts)
      .def_readwrite("num_slots", &CombineParams::num_slots)
      .def_readwrite("num_rows", &CombineParams::num_rows)
      .def_readwrite("hidden", &CombineParams::hidden)
      .def_readwrite("rank_layout", &CombineParams::rank_layout)
      .def_readwrite("record_bytes", &CombineParams::record_bytes)
      .def_readwrite("sent_bytes", &CombineParams::sent_bytes)
      .def_readwrite("stream_steps", &CombineParams::stream_steps)
      .def_readwrite("stream_rows", &CombineParams::stream_rows)
      .def_readwrite("call_hash", &CombineParams::call_hash)
      .def("lines_shared_bytes", &combine_lines_shared_bytes)
      .def("streams_shared_bytes", &combine_streams_shared_bytes);
  address(c, "y", &CombineParams::y);
  address(c, "row_weights", &CombineParams::row_weights);
  address(c, "grad_row_weights", &CombineParams::grad_row_weights);
  address(c, "addend", &CombineParams::addend);
  address(c, "route", &CombineParams::route);
  address(c, "out", &CombineParams::out);
  address(c, "grad_topk_weights", &CombineParams::grad_topk_weights);
  address(c, "status", &CombineParams::status);

  py::class_<ScatterParams> s(m, "ScatterParams");
  s.def(py::init([] { return ScatterParams{}; }))
      .def_readwrite("ws", &ScatterParams::ws)
      .def_readwrite("launch", &ScatterParams::launch)
      .def_readwrite("out_scale", &ScatterParams::out_scale)
      .def_readwrite("grad_scale", &ScatterParams::grad_scale)
      .def_readwrite("grad_dtype", &ScatterParams::grad_dtype)
      .def_readwrite("y_dtype", &ScatterParams::y_dtype)
      .def_readwrite("num_tokens", &ScatterParams::num_tokens)
      .def_readwrite("max_tokens", &ScatterParams::max_tokens)
      .def_readwrite("top_k", &ScatterParams::top_k)
      .def_readwrite("num_experts", &ScatterParams::num_experts)
      .def_readwrite("num_slots", &ScatterParams::num_slots)
      .def_readwrite("num_rows", &ScatterParams::num_rows)
      .def_readwrite("hidden", &ScatterParams::hidden)
      .def_readwrite("rank_layout", &ScatterParams::rank_layout)
      .def_readwrite("record_bytes", &ScatterParams::record_bytes)
      .def_readwrite("call_hash", &ScatterParams::call_hash);
  address(s, "grad_out", &ScatterParams::grad_out);
  address(s, "y", &ScatterParams::y);
  address(s, "row_weights", &ScatterParams::row_weights);
  address(s, "route", &ScatterParams::route);
  address(s, "grad_y", &ScatterParams::grad_y);
  address(s, "grad_row_weights", &ScatterParams::grad_row_weights);
  address(s, "status", &ScatterParams::status);

  py::class_<AllToAllParams> a(m, "AllToAllParams");
  a.def(py::init([] { return AllToAllParams{}; }))
      .def_readwrite("ws", &AllToAllParams::ws)
      .def_readwrite("launch", &AllToAllParams::launch)
      .def_readwrite("scatter_in", &AllToAllParams::scatter_in)
      .def_readwrite("gather_in", &AllToAllParams::gather_in)
      .def_readwrite("scatter_out", &AllToAllParams::scatter_out)
      .def_readwrite("gather_out", &AllToAllParams::gather_out)
      .def_readwrite("scatter_unit", &AllToAllParams::scatter_unit)
      .def_readwrite("gather_unit", &AllToAllParams::gather_unit)
      .def_readwrite("even_split", &AllToAllParams::even_split)
      .def_readwrite("cell_bytes", &AllToAllParams::cell_bytes)
      .def_readwrite("scatter_at", &AllToAllParams::scatter_at)
      .def_readwrite("gather_at", &AllToAllParams::gather_at)
      .def_readwrite("element_bytes", &AllToAllParams::element_bytes)
      .def_readwrite("num_receivers", &AllToAllParams::num_receivers)
      .def_readwrite("min_chunk", &AllToAllParams::min_chunk)
      .def_readwrite("whole_units", &AllToAllParams::whole_units)
      .def_readwrite("call_hash", &AllToAllParams::call_hash)
      .def("set_dims", [](AllToAllParams& self, const std::vector<int64_t>& size, const std::vector<int64_t>& x_stride,
                          const std::vector<int64_t>& out_stride) {
        if (size.empty() || size.size() > kMaxDims || x_stride.size() != size.size() ||
            out_stride.size() != size.size())
          throw std::invalid_argument("epops.all_to_all: 1 … " + std::to_string(kMaxDims) + " dims, as many strides");
        self.num_dims = static_cast<int32_t>(size.size());
        for (size_t d = 0; d < size.size(); ++d) {
          self.size[d] = size[d];
          self.x_stride[d] = x_stride[d];
          self.out_stride[d] = out_stride[d];
        }
      });
  address(a, "x", &AllToAllParams::x);
  address(a, "out", &AllToAllParams::out);
  address(a, "input_splits", &AllToAllParams::input_splits);
  address(a, "output_splits", &AllToAllParams::output_splits);
  address(a, "plan", &AllToAllParams::plan);
  address(a, "counts", &AllToAllParams::counts);
  address(a, "status", &AllToAllParams::status);

  m.def("launch_dispatch", [](const DispatchParams& p, uintptr_t stream) {
    const auto launch = p.launch.rows_as == kLines ? launch_dispatch_lines : launch_dispatch;
    check(launch(p, reinterpret_cast<void*>(stream)), "dispatch", &p.launch);
  });
  m.def("launch_combine", [](const CombineParams& p, uintptr_t stream) {
    const auto launch = p.launch.rows_as == kLines      ? launch_combine_lines
                        : p.launch.rows_as == kStreamed ? launch_combine_streams
                                                        : launch_combine;
    check(launch(p, reinterpret_cast<void*>(stream)), "combine", &p.launch);
  });
  m.def("launch_scatter", [](const ScatterParams& p, uintptr_t stream) {
    check(launch_scatter(p, reinterpret_cast<void*>(stream)), "combine_backward");
  });
  m.def("launch_all_to_all", [](const AllToAllParams& p, uintptr_t stream) {
    check(launch_all_to_all(p, reinterpret_cast<void*>(stream)), "all_to_all");
  });
  m.def("launch_all_to_all_small", [](const AllToAllParams& p, uintptr_t stream) {
    check(launch_all_to_all_small(p, reinterpret_cast<void*>(stream)), "all_to_all");
  });
#ifdef EPOPS_TRACE
  m.def("read_trace", [](const std::string& op) {
    std::vector<uint64_t> clocks(256 * 12);
    const auto read = op == "dispatch"          ? read_dispatch_trace
                      : op == "dispatch_lines"  ? read_dispatch_lines_trace
                      : op == "combine_lines"   ? read_combine_lines_trace
                      : op == "combine_streams" ? read_combine_streams_trace
                                                : read_combine_trace;
    check(read(clocks.data()), "read_trace");
    return clocks;
  });
#endif
}
