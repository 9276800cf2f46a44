// Everything that nsru_kernels._cpu exports. Compiled for any x86-64 CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>

#include "amx.h"
#include "product.h"

namespace py = pybind11;
using namespace nsru::cpu;

namespace {

// Addresses are integers in Python; sizes and strides count elements.
using MatrixTuple = std::tuple<uintptr_t, int64_t, bool>;
using LeftTuple = std::tuple<MatrixTuple, int64_t>;
using TermTuple = std::tuple<int, MatrixTuple>;
using OutputTuple =
    std::tuple<uintptr_t, int64_t, bool, int64_t, float, uintptr_t, std::vector<TermTuple>>;
using NarrowTuple = std::tuple<OutputTuple, float>;
using ProductTuple =
    std::tuple<int64_t, std::vector<LeftTuple>, std::vector<NarrowTuple>, std::vector<OutputTuple>>;

bf16* pointer(uintptr_t address) { return reinterpret_cast<bf16*>(address); }

Matrix matrix(const MatrixTuple& m) {
    const auto& [data, stride, reduction_first] = m;
    return {pointer(data), stride, reduction_first};
}

Output output(const OutputTuple& o) {
    const auto& [data, stride, transposed, width, scale, bias, terms] = o;
    if (transposed && bias)
        throw std::invalid_argument("multiply: a transposed output takes no bias");
    Output made{pointer(data), stride, transposed, width, scale, pointer(bias), {}};
    for (const auto& [left, right] : terms) made.terms.push_back({left, matrix(right)});
    return made;
}

Product product(const ProductTuple& p) {
    const auto& [rows, lefts, narrows, outputs] = p;
    Product made{rows, {}, {}, {}};
    for (const auto& [operand, depth] : lefts) made.lefts.push_back({matrix(operand), depth});
    for (const auto& [out, scale] : narrows) made.narrows.push_back({output(out), scale});
    for (const OutputTuple& o : outputs) made.outputs.push_back(output(o));
    return made;
}

void check_available() {
    if (const std::string reason = unavailable(); !reason.empty()) throw std::runtime_error(reason);
}

void multiply_all(const std::vector<ProductTuple>& products, int threads) {
    check_available();
    std::vector<Product> made;
    for (const ProductTuple& p : products) made.push_back(product(p));
    py::gil_scoped_release unlocked;
    multiply(made, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU backend of nsru_kernels; independent of torch.";
    m.attr("interface") = 2;  // to be raised with cpu_extension.py's when arguments change
    m.def("unavailable", &unavailable, "Why this CPU cannot run the kernels; '' where it can.");
    m.def("multiply", &multiply_all, py::arg("products"), py::arg("threads"),
          "Sums of bf16 products; each (rows, lefts, narrows, outputs) as in csrc/cpu/product.h.");
}
