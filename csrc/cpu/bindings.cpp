// Everything that nsru_kernels._cpu exports. Compiled for any x86-64 CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "amx.h"
#include "linear.h"
#include "project.h"

namespace py = pybind11;
using namespace nsru::cpu;

namespace {

// Addresses are integers in Python; sizes and strides count elements.
using TensorTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int64_t>;
using MaybeTuple = std::optional<TensorTuple>;
using ForwardTuple = std::tuple<TensorTuple, TensorTuple, float, uintptr_t, TensorTuple>;
using BackwardTuple = std::tuple<TensorTuple, TensorTuple, float, MaybeTuple, MaybeTuple>;

Tensor tensor(const TensorTuple& t) {
    const auto& [data, rows, columns, row_stride, column_stride] = t;
    return {reinterpret_cast<void*>(data), rows, columns, row_stride, column_stride};
}

Maybe maybe(const MaybeTuple& t) { return t ? Maybe(tensor(*t)) : std::nullopt; }

void check_available() {
    if (const std::string reason = unavailable(); !reason.empty()) throw std::runtime_error(reason);
}

void run_forward(const TensorTuple& x, const TensorTuple& a, const TensorTuple& s,
                 const std::vector<ForwardTuple>& tuples, int threads) {
    check_available();
    std::vector<Member> members;
    for (const auto& [w, b, scaling, bias, y] : tuples)
        members.push_back({tensor(w), tensor(b), scaling, reinterpret_cast<const bf16*>(bias),
                           tensor(y), std::nullopt, std::nullopt});
    py::gil_scoped_release unlocked;
    forward(tensor(x), tensor(a), tensor(s), members, threads);
}

void run_backward(const TensorTuple& x, const TensorTuple& a, const TensorTuple& s,
                  const TensorTuple& ds, const MaybeTuple& dx, const MaybeTuple& da,
                  const std::vector<BackwardTuple>& tuples, int threads) {
    check_available();
    std::vector<Member> members;
    for (const auto& [w, b, scaling, dy, db] : tuples)
        members.push_back(
            {tensor(w), tensor(b), scaling, nullptr, std::nullopt, maybe(dy), maybe(db)});
    py::gil_scoped_release unlocked;
    backward(tensor(x), tensor(a), tensor(s), tensor(ds), maybe(dx), maybe(da), members, threads);
}

// (address of A, address of Ā, rank)
using AdapterTuple = std::tuple<uintptr_t, uintptr_t, int64_t>;

void run_project(const TensorTuple& basis, const std::vector<AdapterTuple>& tuples, int threads) {
    check_available();
    const auto& [data, k, q, stride, column_stride] = basis;
    if (column_stride != 1 && q > 1)
        throw std::invalid_argument("project: rows of the basis must be contiguous");
    const Basis u{reinterpret_cast<const float*>(data), k, q, stride};
    std::vector<Adapter> adapters;
    for (const auto& [a, projected, rank] : tuples)
        adapters.push_back(
            {reinterpret_cast<const float*>(a), reinterpret_cast<float*>(projected), rank});
    py::gil_scoped_release unlocked;
    project(u, adapters, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU backend of nsru_kernels; independent of torch.";
    m.attr("interface") = 3;  // to be raised with cpu_extension.py's when arguments change
    m.def("unavailable", &unavailable, "Why this CPU cannot run the kernels; '' where it can.");
    m.def("forward", &run_forward, py::arg("x"), py::arg("a"), py::arg("s"), py::arg("members"),
          py::arg("threads"), "y and S; members are (w, b, scaling, bias, y).");
    m.def("backward", &run_backward, py::arg("x"), py::arg("a"), py::arg("s"), py::arg("ds"),
          py::arg("dx"), py::arg("da"), py::arg("members"), py::arg("threads"),
          "dX, dS and, in float32, dA and dB; members are (w, b, scaling, dy, db).");
    m.def("project", &run_project, py::arg("basis"), py::arg("adapters"), py::arg("threads"),
          "Projects float32 adapters of one basis; adapters are (A, projected, rank), contiguous.");
}
