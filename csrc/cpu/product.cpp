// How a product is cut up.
//
//   chunk    up to 128 rows of the left operands, packed once as pair tiles; where the sums have
//            up to some 4000 elements, it stays in the second-level cache
//   panel    32 columns of one output and so of its right operands, as row tiles
//   pass     up to 20 steps of the reduction: a panel's part of it fits the first-level cache
//   square   the accumulator of a panel and 32 rows of the chunk, so transposed
//
// A panel's pass meets all rows of the chunk, then the next pass does; squares wait in memory.
// A right operand that lies in memory with its columns one behind the other is packed by the first
// rows of the chunk that meet it; other ones before. Threads share out the (chunk, panel) pairs.
#include "product.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#include "parallel.h"
#include "tiles.h"

namespace nsru::cpu {

namespace {

constexpr int64_t kChunkRows = 128;
constexpr int64_t kPassSteps = 20;
constexpr int64_t kPartSteps = 16;

// Steps of one term that go into one pass together.
struct Part {
    const Term* term;
    int64_t first, steps;
};
using Pass = std::vector<Part>;

// One output or narrow product: what is summed into it, in passes.
struct Sum {
    const Output* output;
    std::vector<Pass> passes;
    int64_t panels;
};

struct Plan {
    explicit Plan(const Product& product, int threads);

    const Product& product;
    int64_t rows, chunks, blocks;  // rows of a chunk; chunks; squares next to each other in one
    std::vector<int64_t> depths, offsets;  // of every left operand; offsets in the packed chunk
    int64_t packed = 0;                    // bf16 elements of a packed chunk
    std::vector<Sum> narrows, outputs;
    int64_t panels = 0;  // of all outputs

    int64_t steps(int left) const { return ceil_div(depths[left], kStep); }

  private:
    Sum sum(const Output& output) const;
};

Plan::Plan(const Product& p, int threads) : product(p) {
    for (const Left& left : p.lefts) depths.push_back(left.depth);
    for (const Narrow& narrow : p.narrows) depths.push_back(narrow.out.width);
    for (const Narrow& narrow : p.narrows) narrows.push_back(sum(narrow.out));
    for (const Output& output : p.outputs) {
        outputs.push_back(sum(output));
        panels += outputs.back().panels;
    }
    chunks = ceil_div(p.rows, kChunkRows);
    if (chunks > threads) chunks = ceil_div(chunks, threads) * threads;
    const int64_t spare = threads / std::max<int64_t>(panels, 1);
    chunks = std::max(chunks, std::min(ceil_div(p.rows, kEdge), spare));
    rows = ceil_div(ceil_div(p.rows, chunks), kEdge) * kEdge;
    chunks = ceil_div(p.rows, rows);
    blocks = rows / kEdge;
    for (size_t i = 0; i < depths.size(); ++i) {
        offsets.push_back(packed);
        packed += steps(i) * blocks * kPair;
    }
}

Sum Plan::sum(const Output& output) const {
    Sum made{&output, {}, ceil_div(output.width, kEdge)};
    int64_t used = kPassSteps;
    for (const Term& term : output.terms) {
        const int64_t all = steps(term.left);
        if (all == 0) continue;
        const int64_t size = ceil_div(all, ceil_div(all, kPartSteps));
        for (int64_t first = 0; first < all; first += size) {
            const int64_t count = std::min(size, all - first);
            if (used + count > kPassSteps) {
                made.passes.emplace_back();
                used = 0;
            }
            made.passes.back().push_back({&term, first, count});
            used += count;
        }
    }
    if (made.passes.empty()) made.passes.emplace_back();  // a sum of nothing
    return made;
}

// Grows, and is given back only when it was unusually large. Mapped for itself, so that its pages
// are huge ones.
class Workspace {
  public:
    ~Workspace() { release(); }
    void* at_least(size_t bytes) {
        if (bytes > size_) {
            release();
            const size_t size = ceil_div(bytes, kHugePage) * kHugePage;
            void* map = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (map == MAP_FAILED) throw std::bad_alloc();
            map_ = map;
            size_ = size;
            madvise(data(), size_, MADV_HUGEPAGE);
        }
        return data();
    }

    void shrink() {
        if (size_ > kKept) release();
    }

  private:
    static constexpr size_t kHugePage = size_t{2} << 20;
    static constexpr size_t kKept = size_t{32} << 20;

    void* data() const {
        const auto address = reinterpret_cast<uintptr_t>(map_);
        return reinterpret_cast<void*>((address + kHugePage - 1) / kHugePage * kHugePage);
    }
    void release() {
        if (map_) munmap(map_, size_ + kHugePage);
        map_ = nullptr;
        size_ = 0;
    }

    void* map_ = nullptr;
    size_t size_ = 0;
};

// One thread's share of one product.
class Worker {
  public:
    Worker(const Plan& plan, Workspace& workspace) : plan_(plan), product_(plan.product) {
        const int64_t panel = kPassSteps * kPair, squares = plan.blocks * kSquare;
        chunk_ = static_cast<bf16*>(
            workspace.at_least(sizeof(bf16) * (plan.packed + panel) + sizeof(float) * squares));
        panel_ = chunk_ + plan.packed;
        squares_ = reinterpret_cast<float*>(panel_ + panel);
    }

    // Of the panels of all chunks, one chunk after the other; a product without outputs counts as
    // one panel.
    void run(int64_t first, int64_t last) {
        const int64_t panels = std::max<int64_t>(plan_.panels, 1);
        while (first < last) {
            const int64_t chunk = first / panels, end = std::min(last, (chunk + 1) * panels);
            pack_chunk(chunk, first == chunk * panels);
            int64_t at = chunk * panels;
            for (const Sum& sum : plan_.outputs) {
                const int64_t from = std::max(first, at), to = std::min(end, at + sum.panels);
                if (from < to)
                    add_up(sum, from - at, to - at,
                           [&](float* square, int64_t row, int64_t column) {
                               write(square, *sum.output, row, column);
                           });
                at += sum.panels;
            }
            first = end;
        }
    }

  private:
    // Whoever has its first panel writes the narrow products out.
    void pack_chunk(int64_t chunk, bool first_panel) {
        row_ = chunk * plan_.rows;
        const int64_t rows = product_.rows - row_, lefts = product_.lefts.size();
        blocks_ = ceil_div(std::min(plan_.rows, rows), kEdge);
        for (int64_t i = 0; i < lefts; ++i) {
            const auto& [matrix, depth] = product_.lefts[i];
            const int64_t steps = plan_.steps(i);
            if (matrix.reduction_first) {
                for (int64_t s = 0; s < steps; ++s)
                    interleave(matrix, row_, rows, s * kStep, depth - s * kStep,
                               chunk_tiles(i, 0, s), blocks_, steps * kPair);
                continue;
            }
            for (int64_t block = 0; block < blocks_; ++block) {
                const int64_t row = block * kEdge;
                for (int64_t s = 0; s < steps; ++s)
                    copy_rows<true>(matrix, row_ + row, rows - row, s * kStep, depth - s * kStep,
                                    chunk_tiles(i, block, s));
            }
        }
        for (size_t i = 0; i < product_.narrows.size(); ++i) {
            const auto& [out, scale] = product_.narrows[i];
            const Sum& sum = plan_.narrows[i];
            add_up(sum, 0, sum.panels,
                   [&, &out = out, &scale = scale](float* square, int64_t row, int64_t column) {
                       keep(square, scale, out.width - column,
                            chunk_tiles(lefts + i, (row - row_) / kEdge, column / kStep));
                       if (first_panel) write(square, out, row, column);
                   });
        }
    }

    // One step of the packed chunk from a square of a narrow product. What lies beyond its width
    // is multiplied by zeros, so it must not be infinite.
    static void keep(const float* square, float scale, int64_t width, bf16* tiles) {
        alignas(64) static const float no_bias[kEdge] = {};
        for (int tile = 0; tile < 2; ++tile) {
            __m512i pairs[16];
            round_pairs(square, tile, scale, no_bias, pairs);
            for (int p = 0; p < 16; ++p) {
                const int64_t rows = width - 2 * p;
                const __mmask32 lanes = rows > 1 ? ~0u : rows > 0 ? 0x55555555u : 0u;
                _mm512_storeu_si512(tiles + tile * kTile + p * kStep,
                                    _mm512_maskz_mov_epi16(lanes, pairs[p]));
            }
        }
    }

    // A square of an output from (row, column) on.
    void write(const float* square, const Output& out, int64_t row, int64_t column) {
        const int64_t rows = product_.rows - row, columns = out.width - column;
        // What is contiguous in memory is a row of the square where the output is transposed, else
        // a column.
        const int64_t runs = out.transposed ? columns : rows;
        const __mmask32 lanes = first_lanes(out.transposed ? rows : columns);
        const int64_t at = out.transposed ? column * out.stride + row : row * out.stride + column;
        if (out.wide) {
            const auto store = [&](int run, __m512 low, __m512 high) {
                if (run >= runs) return;
                float* to = static_cast<float*>(out.data) + at + run * out.stride;
                _mm512_mask_storeu_ps(to, __mmask16(lanes), low);
                _mm512_mask_storeu_ps(to + 16, lanes >> 16, high);
            };
            out.transposed ? widen_rows(square, out.scale, store)
                           : widen_columns(square, out.scale, store);
            return;
        }
        const auto store = [&](int run, __m512i values) {
            bf16* to = static_cast<bf16*>(out.data) + at + run * out.stride;
            if (run < runs) _mm512_mask_storeu_epi16(to, lanes, values);
        };
        if (out.transposed) return round_rows(square, out.scale, store);
        float bias[kEdge] = {};
        for (int64_t c = 0; out.bias && c < std::min<int64_t>(columns, kEdge); ++c) {
            const uint32_t bits = uint32_t{out.bias[column + c]} << 16;
            std::memcpy(&bias[c], &bits, sizeof(float));
        }
        round_columns(square, out.scale, bias, store);
    }

    // Σ left · right for the chunk's rows and some panels, in the order of the reduction;
    // sink(square, row, column).
    template <class SINK>
    void add_up(const Sum& sum, int64_t first, int64_t last, SINK sink) {
        if (first == last) return;
        struct {
            float* square;
            int64_t row, column;
            bool complete;
        } open{};  // its accumulators are in the tiles
        for (int64_t column = first * kEdge; column < last * kEdge; column += kEdge) {
            for (const Pass& pass : sum.passes) {
                const bool first_pass = &pass == &sum.passes.front();
                const bool last_pass = &pass == &sum.passes.back();
                const int64_t columns = sum.output->width - column;
                pack_panel(pass, column, columns);
                for (int64_t block = 0; block < blocks_; ++block) {
                    float* square = squares_ + block * kSquare;
                    const Ahead ahead = last_pass ? rows_ahead(sum.passes[0], column + kEdge,
                                                               columns - kEdge, block)
                                                  : rows_ahead((&pass)[1], column, columns, block);
                    add_pass(pass, column, columns, block, open.square,
                             first_pass ? nullptr : square, ahead);
                    if (open.complete) sink(open.square, open.row, open.column);
                    open = {square, row_ + block * kEdge, column, last_pass};
                }
            }
        }
        exchange_square(open.square, nullptr);
        sink(open.square, open.row, open.column);
    }

    // All of a panel that `add_pass` does not pack by the way.
    void pack_panel(const Pass& pass, int64_t column, int64_t columns) {
        bf16* tiles = panel_;
        for (const Part& part : pass) {
            const int64_t depth = plan_.depths[part.term->left];
            for (int64_t s = part.first; s < part.first + part.steps; ++s, tiles += kPair)
                if (!lies_in_tiles(part, columns))
                    pack_rows(part.term->right, column, columns, s * kStep, depth - s * kStep,
                              tiles);
        }
    }

    // Whether a panel's part of a pass is made of whole row tiles in memory.
    bool lies_in_tiles(const Part& part, int64_t columns) const {
        return !part.term->right.reduction_first && columns >= kEdge &&
               (part.first + part.steps) * kStep <= plan_.depths[part.term->left];
    }

    // A block's share of a panel's rows in memory.
    Ahead rows_ahead(const Pass& pass, int64_t column, int64_t columns, int64_t block) const {
        if (pass.empty() || !lies_in_tiles(pass[0], columns)) return {};
        const auto& [data, stride, reduction_first] = pass[0].term->right;
        const int64_t rows = kEdge / blocks_;
        return {data + (column + block * rows) * stride + pass[0].first * kStep, stride, rows};
    }

    // One pass of the square of a block and a panel.
    void add_pass(const Pass& pass, int64_t column, int64_t columns, int64_t block, float* done,
                  const float* next, Ahead ahead) {
        if (pass.empty()) exchange_square(done, next);
        bf16* panel = panel_;
        for (const Part& part : pass) {
            const bf16* pairs = chunk_tiles(part.term->left, block, part.first);
            const auto& [data, stride, reduction_first] = part.term->right;
            if (block == 0 && lies_in_tiles(part, columns))
                add_steps<RowTiles::kInMemory>(panel, pairs, part.steps,
                                               data + column * stride + part.first * kStep, stride,
                                               done, next, ahead);
            else if (columns <= kEdge / 2)
                add_steps<RowTiles::kOne>(panel, pairs, part.steps, nullptr, 0, done, next, ahead);
            else
                add_steps<RowTiles::kPacked>(panel, pairs, part.steps, nullptr, 0, done, next,
                                             ahead);
            panel += part.steps * kPair;
            next = done = squares_;  // the accumulators stay for the other parts
            ahead = {};
        }
    }

    bf16* chunk_tiles(int64_t left, int64_t block, int64_t step) {
        return chunk_ + plan_.offsets[left] + (block * plan_.steps(left) + step) * kPair;
    }

    const Plan& plan_;
    const Product& product_;
    bf16* chunk_;
    bf16* panel_;
    float* squares_;
    int64_t row_ = 0, blocks_ = 0;
};

}  // namespace

void multiply(const std::vector<Product>& products, int threads) {
    std::vector<Plan> plans;
    plans.reserve(products.size());
    for (const Product& product : products)
        if (product.rows > 0) plans.emplace_back(product, threads);
    if (plans.empty()) return;
    parallel(threads, [&](int thread) {
        static thread_local Workspace workspace;
        const TileConfig config;
        for (const Plan& plan : plans) {
            const int64_t items = plan.chunks * std::max<int64_t>(plan.panels, 1);
            const auto [first, last] = share(items, thread, threads);
            if (first < last) Worker(plan, workspace).run(first, last);
        }
        workspace.shrink();
    });
}

}  // namespace nsru::cpu
