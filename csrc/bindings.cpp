// Everything that nsru_kernels._cuda exports.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "device.h"
#include "narrow.h"
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

template <class ENUM>
const std::vector<const char*> kNames;
template <>
const std::vector<const char*> kNames<nsru::Dtype>{"bf16", "fp16"};
#ifdef NSRU_KEXT_GEMM
template <>
const std::vector<const char*> kNames<nsru::KextLayout>{"NK", "KN"};

py::list kext_kernels() {
    py::list kernels;
    for (const nsru::KextKernel& kernel : nsru::kext_kernels()) {
        kernels.append(
            py::dict("config"_a = kernel.config,
                     "dtype"_a = kNames<nsru::Dtype>[static_cast<size_t>(kernel.dtype)],
                     "layout"_a = kNames<nsru::KextLayout>[static_cast<size_t>(kernel.layout)],
                     "stages"_a = kernel.stages, "threads"_a = kernel.threads,
                     "shared_bytes"_a = kernel.shared_bytes));
    }
    return kernels;
}
#endif

// What a member of a launcher's arguments is in Python: addresses are integers, choices names.
template <class MEMBER>
using InPython =
    std::conditional_t<std::is_pointer_v<MEMBER>, uintptr_t,
                       std::conditional_t<std::is_enum_v<MEMBER>, std::string, MEMBER>>;

template <class ENUM>
ENUM named(const char* what, const std::string& name) {
    std::string all;
    for (size_t i = 0; i < kNames<ENUM>.size(); ++i) {
        if (name == kNames<ENUM>[i]) return static_cast<ENUM>(i);
        all += std::string(i ? " or '" : "'") + kNames<ENUM>[i] + "'";
    }
    throw std::invalid_argument(std::string(what) + " must be " + all + ", got '" + name + "'");
}

template <class MEMBER>
MEMBER from_python(const char* name, const InPython<MEMBER>& value) {
    if constexpr (std::is_pointer_v<MEMBER>) {
        return reinterpret_cast<MEMBER>(value);
    } else if constexpr (std::is_enum_v<MEMBER>) {
        return named<MEMBER>(name, value);
    } else {
        return value;
    }
}

template <class ARGS, class MEMBER>
struct Field {
    const char* name;
    MEMBER ARGS::* member;
};
template <class ARGS, class MEMBER>
Field(const char*, MEMBER ARGS::*) -> Field<ARGS, MEMBER>;

// Defines a launcher. Its keyword arguments are the fields and the place: device, stream, and
// allocate(bytes), which returns the address of memory that lives until the call returns.
template <class ARGS, class... MEMBERS>
void define(py::module_& m, const char* name, void (*launch)(const ARGS&, const nsru::Place&),
            const char* doc, Field<ARGS, MEMBERS>... fields) {
    const auto call = [=](const InPython<MEMBERS>&... values, int device, uintptr_t stream,
                          const py::function& allocate) {
        const auto allocate_locked = [&](size_t bytes) {
            py::gil_scoped_acquire locked;
            return reinterpret_cast<void*>(allocate(bytes).cast<uintptr_t>());
        };
        try {
            ARGS args{};
            ((args.*fields.member = from_python<MEMBERS>(fields.name, values)), ...);
            py::gil_scoped_release unlocked;
            launch(args, {device, reinterpret_cast<void*>(stream), allocate_locked});
        } catch (const std::invalid_argument& error) {
            throw std::invalid_argument(name + (": " + std::string(error.what())));
        } catch (const std::runtime_error& error) {
            throw std::runtime_error(name + (": " + std::string(error.what())));
        }
    };
    m.def(name, call, py::kw_only(), py::arg(fields.name)..., "device"_a, "stream"_a, "allocate"_a,
          doc);
}

}  // namespace

PYBIND11_MODULE(NSRU_MODULE, m) {
    m.doc() = "CUDA backend of nsru_kernels; independent of torch.";
    m.attr("interface") = 3;  // to be raised with extension.py's when arguments change
    m.def("build_info", &build_info, "Package version, architectures and CUDA version built for.");
    m.def("device_report", &device_report,
          "CUDA versions and one dict per GPU; an empty list with the reason where there is none.");
    m.def("kernel_image", &nsru::kernel_image,
          "SM version of the code the current GPU would run; RuntimeError where there is none.");

    using Columns = nsru::ColumnsProductArgs;
    define(
        m, "launch_columns_product", &nsru::launch_columns_product,
        "d = scaling · X [M, C]ᵀ·P [M, R] and rows [M, R] = rows_scaling · X·V [C, R] on a stream.",
        Field{"x", &Columns::x_gmem}, Field{"p", &Columns::p_gmem}, Field{"d", &Columns::d_gmem},
        Field{"v", &Columns::v_gmem}, Field{"rows", &Columns::rows_gmem}, Field{"m", &Columns::m},
        Field{"c", &Columns::c}, Field{"r", &Columns::r}, Field{"ldx", &Columns::ldx},
        Field{"ldp", &Columns::ldp}, Field{"ldv", &Columns::ldv}, Field{"ldrows", &Columns::ldrows},
        Field{"scaling", &Columns::scaling}, Field{"rows_scaling", &Columns::rows_scaling},
        Field{"dtype", &Columns::dtype});

#ifdef NSRU_KEXT_GEMM
    m.def("kext_kernels", &kext_kernels, "One dict per compiled kernel of the K-extended GEMM.");
    using Gemm = nsru::KextGemmArgs;
    define(m, "launch_kext_gemm", &nsru::launch_kext_gemm,
           "out = X·W + P·V + bias on a stream; addresses as integers, sizes in elements.",
           Field{"x", &Gemm::x_gmem}, Field{"w", &Gemm::w_gmem}, Field{"p", &Gemm::p_gmem},
           Field{"v", &Gemm::v_gmem}, Field{"bias", &Gemm::bias_gmem},
           Field{"out", &Gemm::out_gmem}, Field{"m", &Gemm::m}, Field{"n", &Gemm::n},
           Field{"k", &Gemm::k}, Field{"r", &Gemm::r}, Field{"ldx", &Gemm::ldx},
           Field{"ldw", &Gemm::ldw}, Field{"ldp", &Gemm::ldp}, Field{"ldv", &Gemm::ldv},
           Field{"ldo", &Gemm::ldo}, Field{"dtype", &Gemm::dtype}, Field{"layout", &Gemm::layout},
           Field{"config", &Gemm::config}, Field{"swizzle", &Gemm::swizzle},
           Field{"after_narrow", &Gemm::after_narrow});
#endif
}
