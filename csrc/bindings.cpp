// Everything that nsru_kernels._cuda exports.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"
#include "fold.h"
#include "narrow.h"
#include "sketch.h"
#ifdef NSRU_KEXT_GEMM
#include "kext_gemm.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

std::string version(int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

py::dict device_report() {
    const nsru::DeviceReport report = nsru::device_report();
    py::list devices;
    for (const nsru::Device& device : report.devices) {
        devices.append(py::dict(
            "name"_a = device.name, "capability"_a = py::make_tuple(device.major, device.minor),
            "multiprocessors"_a = device.multiprocessors,
            "shared_bytes_per_block_optin"_a = device.shared_bytes_per_block_optin,
            "l2_bytes"_a = device.l2_bytes, "memory_bytes"_a = device.memory_bytes));
    }
    return py::dict(
        "runtime"_a = version(report.runtime_version),
        "driver"_a = report.driver_version ? py::cast(version(report.driver_version)) : py::none(),
        "devices"_a = devices,
        "reason"_a = report.reason.empty() ? py::none() : py::cast(report.reason));
}

py::dict build_info() {
    return py::dict("version"_a = NSRU_VERSION, "archs"_a = NSRU_ARCHS,
                    "cuda"_a = version(nsru::toolkit_version()));
}

const char* const kDtypeNames[] = {"bf16", "fp16", "fp32"};

template <class ENUM, size_t COUNT>
ENUM named(const char* what, const std::string& name, const char* const (&names)[COUNT]) {
    std::string all;
    for (size_t i = 0; i < COUNT; ++i) {
        if (name == names[i]) return static_cast<ENUM>(i);
        all += std::string(i ? " or '" : "'") + names[i] + "'";
    }
    throw std::invalid_argument(std::string(what) + " must be " + all + ", got '" + name + "'");
}

nsru::Dtype dtype_of(const std::string& name) {
    return named<nsru::Dtype>("dtype", name, kDtypeNames);
}

// Addresses and streams are integers in Python.
void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Defines a function of RowsProductArgs.
template <class RESULT>
void define_rows(py::module_& m, const char* name, RESULT (*function)(const nsru::RowsProductArgs&),
                 const char* doc) {
    const auto call = [function](uintptr_t x, uintptr_t v, uintptr_t out, int64_t m, int64_t c,
                                 int64_t r, int64_t ldx, int64_t ldv, int64_t ldo, float scaling,
                                 const std::string& dtype, int device, uintptr_t stream,
                                 uintptr_t workspace, size_t workspace_bytes) {
        return function({pointer(x), pointer(v), pointer(out), m, c, r, ldx, ldv, ldo, scaling,
                         dtype_of(dtype), device, pointer(stream), pointer(workspace),
                         workspace_bytes});
    };
    m.def(name, call, py::kw_only(), "x"_a, "v"_a, "out"_a, "m"_a, "c"_a, "r"_a, "ldx"_a, "ldv"_a,
          "ldo"_a, "scaling"_a, "dtype"_a, "device"_a, "stream"_a, "workspace"_a = 0,
          "workspace_bytes"_a = 0, py::call_guard<py::gil_scoped_release>(), doc);
}

// Defines a function of ColumnsProductArgs.
template <class RESULT>
void define_columns(py::module_& m, const char* name,
                    RESULT (*function)(const nsru::ColumnsProductArgs&), const char* doc) {
    const auto call = [function](uintptr_t x, uintptr_t p, uintptr_t d, uintptr_t v, uintptr_t rows,
                                 int64_t m, int64_t c, int64_t r, int64_t ldx, int64_t ldp,
                                 int64_t ldv, int64_t ldrows, float scaling, float rows_scaling,
                                 bool rank_first, const std::string& dtype, int device,
                                 uintptr_t stream, uintptr_t workspace, size_t workspace_bytes) {
        return function({pointer(x),
                         pointer(p),
                         pointer(d),
                         pointer(v),
                         pointer(rows),
                         m,
                         c,
                         r,
                         ldx,
                         ldp,
                         ldv,
                         ldrows,
                         scaling,
                         rows_scaling,
                         rank_first,
                         dtype_of(dtype),
                         device,
                         pointer(stream),
                         pointer(workspace),
                         workspace_bytes});
    };
    m.def(name, call, py::kw_only(), "x"_a, "p"_a, "d"_a, "v"_a, "rows"_a, "m"_a, "c"_a, "r"_a,
          "ldx"_a, "ldp"_a, "ldv"_a, "ldrows"_a, "scaling"_a, "rows_scaling"_a, "rank_first"_a,
          "dtype"_a, "device"_a, "stream"_a, "workspace"_a = 0, "workspace_bytes"_a = 0,
          py::call_guard<py::gil_scoped_release>(), doc);
}

// Defines a function of SketchUpdateArgs.
template <class RESULT>
void define_sketch(py::module_& m, const char* name,
                   RESULT (*function)(const nsru::SketchUpdateArgs&), const char* doc) {
    const auto call = [function](uintptr_t x, uintptr_t omega, uintptr_t mask, uintptr_t y,
                                 uintptr_t h, uintptr_t trace, int64_t m, int64_t k, int64_t l,
                                 int64_t ldx, int64_t ldomega, bool split, double limit,
                                 int64_t panel_bytes, const std::string& dtype, int device,
                                 uintptr_t stream, uintptr_t workspace, size_t workspace_bytes) {
        return function({pointer(x), pointer(omega), pointer(mask), static_cast<float*>(pointer(y)),
                         static_cast<float*>(pointer(h)), static_cast<double*>(pointer(trace)), m,
                         k, l, ldx, ldomega, split, limit, panel_bytes, dtype_of(dtype), device,
                         pointer(stream), pointer(workspace), workspace_bytes});
    };
    m.def(name, call, py::kw_only(), "x"_a, "omega"_a, "mask"_a, "y"_a, "h"_a, "trace"_a, "m"_a,
          "k"_a, "l"_a, "ldx"_a, "ldomega"_a, "split"_a, "limit"_a, "panel_bytes"_a, "dtype"_a,
          "device"_a, "stream"_a, "workspace"_a = 0, "workspace_bytes"_a = 0,
          py::call_guard<py::gil_scoped_release>(), doc);
}

void launch_fold(uintptr_t table, int64_t table_size, int64_t problems, int64_t rows, int64_t items,
                 uintptr_t counters, int64_t counters_size, const std::string& adapter,
                 const std::string& basis, bool has_core, bool aligned, int device,
                 uintptr_t stream, uintptr_t workspace, size_t workspace_bytes) {
    nsru::launch_fold({static_cast<const int64_t*>(pointer(table)), table_size, problems, rows,
                       items, static_cast<int*>(pointer(counters)), counters_size,
                       named<nsru::Dtype>("adapter", adapter, kDtypeNames),
                       named<nsru::Dtype>("basis", basis, kDtypeNames), has_core, aligned, device,
                       pointer(stream), pointer(workspace), workspace_bytes});
}

void launch_write_table(uintptr_t values, int64_t size, uintptr_t table, int device,
                        uintptr_t stream) {
    nsru::launch_write_table({static_cast<const int64_t*>(pointer(values)), size,
                              static_cast<int64_t*>(pointer(table)), device, pointer(stream)});
}

#ifdef NSRU_KEXT_GEMM
const char* const kLayoutNames[] = {"NK", "KN"};

py::list kext_kernels() {
    py::list kernels;
    for (const nsru::KextKernel& kernel : nsru::kext_kernels()) {
        kernels.append(py::dict(
            "config"_a = kernel.config, "dtype"_a = kDtypeNames[static_cast<int>(kernel.dtype)],
            "layout"_a = kLayoutNames[static_cast<int>(kernel.layout)], "stages"_a = kernel.stages,
            "threads"_a = kernel.threads, "shared_bytes"_a = kernel.shared_bytes));
    }
    return kernels;
}

// Defines a function of KextGemmArgs whose pointers and stream are integers in Python.
template <class RESULT>
void define_kext(py::module_& m, const char* name, RESULT (*function)(const nsru::KextGemmArgs&),
                 const char* doc) {
    const auto call = [function](uintptr_t x, uintptr_t w, uintptr_t p, uintptr_t v, uintptr_t bias,
                                 uintptr_t out, int64_t m, int64_t n, int64_t k, int64_t r,
                                 int64_t ldx, int64_t ldw, int64_t ldp, int64_t ldv, int64_t ldo,
                                 const std::string& dtype, const std::string& layout, int config,
                                 int swizzle, bool after_narrow, int device, uintptr_t stream,
                                 uintptr_t workspace, size_t workspace_bytes) {
        return function({pointer(x),
                         pointer(w),
                         pointer(p),
                         pointer(v),
                         pointer(bias),
                         pointer(out),
                         m,
                         n,
                         k,
                         r,
                         ldx,
                         ldw,
                         ldp,
                         ldv,
                         ldo,
                         dtype_of(dtype),
                         named<nsru::KextLayout>("layout", layout, kLayoutNames),
                         config,
                         swizzle,
                         after_narrow,
                         device,
                         pointer(stream),
                         pointer(workspace),
                         workspace_bytes});
    };
    m.def(name, call, py::kw_only(), "x"_a, "w"_a, "p"_a, "v"_a, "bias"_a, "out"_a, "m"_a, "n"_a,
          "k"_a, "r"_a, "ldx"_a, "ldw"_a, "ldp"_a, "ldv"_a, "ldo"_a, "dtype"_a, "layout"_a,
          "config"_a, "swizzle"_a, "after_narrow"_a, "device"_a, "stream"_a, "workspace"_a = 0,
          "workspace_bytes"_a = 0, py::call_guard<py::gil_scoped_release>(), doc);
}
#endif

}  // namespace

PYBIND11_MODULE(NSRU_MODULE, m) {
    m.doc() = "CUDA backend of nsru_kernels; independent of torch.";
    m.def("build_info", &build_info, "Package version, architectures and CUDA version built for.");
    m.def("device_report", &device_report,
          "CUDA versions and one dict per GPU; an empty list with the reason where there is none.");
    m.def("kernel_image", &nsru::kernel_image,
          "SM version of the code the current GPU would run; RuntimeError where there is none.");
    define_rows(m, "rows_product_workspace", &nsru::rows_product_workspace,
                "Bytes of workspace that launch_rows_product needs for the same arguments.");
    define_rows(m, "launch_rows_product", &nsru::launch_rows_product,
                "out [M, R] = scaling · X [M, C]·V [R, C]ᵀ on a stream; sizes in elements.");
    define_columns(m, "columns_product_workspace", &nsru::columns_product_workspace,
                   "Bytes of workspace that launch_columns_product needs for the same arguments.");
    define_columns(m, "launch_columns_product", &nsru::launch_columns_product,
                   "d = scaling · X [M, C]ᵀ·P [M, R], and rows [M, R] = rows_scaling · X·V [C, R] "
                   "where v is not 0, on a stream.");
    define_sketch(m, "sketch_update_workspace", &nsru::sketch_update_workspace,
                  "Bytes of workspace that launch_sketch_update needs for the same arguments.");
    define_sketch(m, "launch_sketch_update", &nsru::launch_sketch_update,
                  "y += x [M, K]ᵀ·S and h += Sᵀ·S with S = round(x·omega [K, L]) where "
                  "trace = ‖x‖² < limit, over the rows that mask keeps, on a stream.");
    m.def("launch_fold", &launch_fold, py::kw_only(), "table"_a, "table_size"_a, "problems"_a,
          "rows"_a, "items"_a, "counters"_a, "counters_size"_a, "adapter"_a, "basis"_a,
          "has_core"_a, "aligned"_a, "device"_a, "stream"_a, "workspace"_a, "workspace_bytes"_a,
          py::call_guard<py::gil_scoped_release>(),
          "A - (A·U)·C·Uᵀ for every adapter that the table in device memory describes, on a "
          "stream; counters start as zeros.");
    m.def("launch_write_table", &launch_write_table, py::kw_only(), "values"_a, "size"_a, "table"_a,
          "device"_a, "stream"_a, py::call_guard<py::gil_scoped_release>(),
          "Copies int64 values from host to device memory as kernel arguments, on a stream.");
#ifdef NSRU_KEXT_GEMM
    m.def("kext_kernels", &kext_kernels, "One dict per compiled kernel of the K-extended GEMM.");
    define_kext(m, "kext_gemm_workspace", &nsru::kext_gemm_workspace,
                "Bytes of workspace that launch_kext_gemm needs for the same arguments.");
    define_kext(m, "launch_kext_gemm", &nsru::launch_kext_gemm,
                "out = X·W + P·V + bias on a stream; addresses as integers, sizes in elements.");
#endif
}
