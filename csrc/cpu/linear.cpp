#include "linear.h"

#include <utility>

namespace nsru::cpu {

namespace {

Tensor transposed(const Tensor& t) {
    return {t.data, t.columns, t.rows, t.column_stride, t.row_stride};
}

Tensor some_rows(const Tensor& t, int64_t first, int64_t count) {
    bf16* data = static_cast<bf16*>(t.data) + first * t.row_stride;
    return {data, count, t.columns, t.row_stride, t.column_stride};
}

Tensor some_columns(const Tensor& t, int64_t first, int64_t count) {
    return transposed(some_rows(transposed(t), first, count));
}

bool has_contiguous_rows(const Tensor& t) { return t.column_stride == 1 || t.columns == 1; }

// A row for each index, the reduction along the columns.
Matrix matrix(const Tensor& t) {
    const bf16* data = static_cast<const bf16*>(t.data);
    if (has_contiguous_rows(t)) return {data, t.row_stride, false};
    return {data, t.column_stride, true};
}

Left left(const Tensor& t) { return {matrix(t), t.columns}; }

Output output(const Tensor& t, float scale, std::vector<Term> terms, const bf16* bias = nullptr) {
    const bool rows = has_contiguous_rows(t);
    const int64_t stride = rows ? t.row_stride : t.column_stride;
    return {t.data, false, stride, !rows, t.columns, scale, bias, std::move(terms)};
}

Output in_float32(Output made) {
    made.wide = true;
    return made;
}

}  // namespace

void forward(const Tensor& x, const Tensor& a, const Tensor& s, const std::vector<Member>& members,
             int threads) {
    // x is packed once for S and for all y.
    Product product{x.rows, {left(x)}, {}, {}};
    int64_t rank = 0;
    for (const Member& member : members) {
        const int64_t r = member.b.columns;
        const int index = product.narrows.size() + 1;
        product.narrows.push_back(
            {output(some_columns(s, rank, r), 1.0f, {{0, matrix(some_rows(a, rank, r))}}),
             member.scaling});
        product.outputs.push_back(output(
            *member.y, 1.0f, {{0, matrix(member.w)}, {index, matrix(member.b)}}, member.bias));
        rank += r;
    }
    multiply({product}, threads);
}

void backward(const Tensor& x, const Tensor& a, const Tensor& s, const Tensor& ds, const Maybe& dx,
              const Maybe& da, const std::vector<Member>& members, int threads) {
    // All but dB are computed as their transposes: a left operand is packed once, a right one for
    // every 128 rows, and W, which has to be interleaved, costs more than dY, which lies in tiles.
    std::vector<Product> first, then;
    std::vector<std::pair<Tensor, Tensor>> wide, narrow;  // what dX is the sum of
    int64_t rank = 0;
    for (const auto& [w, b, scaling, bias, y, dy, db] : members) {
        const int64_t r = b.columns, column = std::exchange(rank, rank + r);
        if (!dy) continue;
        const Tensor s_i = some_columns(s, column, r), ds_i = some_columns(ds, column, r);
        if (dx || da)
            first.push_back({r,
                             {left(transposed(b))},
                             {},
                             {output(transposed(ds_i), scaling, {{0, matrix(*dy)}})}});
        if (db)
            first.push_back({dy->columns,
                             {left(transposed(*dy))},
                             {},
                             {in_float32(output(*db, scaling, {{0, matrix(transposed(s_i))}}))}});
        wide.push_back({w, *dy});
        narrow.push_back({some_rows(a, column, r), ds_i});
    }
    if (dx) {
        Product sum{dx->columns, {}, {}, {output(transposed(*dx), 1.0f, {})}};
        wide.insert(wide.end(), narrow.begin(), narrow.end());
        for (const auto& [weight, gradient] : wide) {
            sum.outputs[0].terms.push_back({int(sum.lefts.size()), matrix(gradient)});
            sum.lefts.push_back(left(transposed(weight)));
        }
        then.push_back(std::move(sum));
    }
    if (da)
        then.push_back(
            {x.columns,
             {left(transposed(x))},
             {},
             {in_float32(output(transposed(*da), 1.0f, {{0, matrix(transposed(ds))}}))}});
    multiply(first, threads);
    multiply(then, threads);
}

}  // namespace nsru::cpu
