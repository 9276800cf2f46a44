// Everything that nsru_kernels._cuda exports.
#include <pybind11/pybind11.h>

#include "device.h"

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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA backend of nsru_kernels; independent of torch.";
    m.def("build_info", &build_info, "Package version, architectures and CUDA version built for.");
    m.def("device_report", &device_report,
          "CUDA versions and one dict per GPU; an empty list with the reason where there is none.");
    m.def("kernel_image", &nsru::kernel_image,
          "SM version of the code the current GPU would run; RuntimeError where there is none.");
}
