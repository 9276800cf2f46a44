// How a product is cut up.
//
//   chunk    up to 256 rows of the left operands, packed once and kept in the second-level cache
//   group    panels of 32 columns of one output: float32 accumulators of a chunk x group, 256 KiB
//   pass     up to 20 steps of the reduction: a panel's right operand fits the first-level cache
//
// For each (chunk, group) and each pass, a panel of the right operand is packed and meets all rows
// of the chunk; what exceeds a pass is accumulated in memory. A right operand whose rows run along
// the columns of the output is packed for all panels of a group together, so that long runs of it
// are read. Threads share out the (chunk, group) pairs.
#include "product.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "parallel.h"
#include "tiles.h"

namespace nsru::cpu {

namespace {

constexpr int64_t kChunkRows = 256;
constexpr int64_t kGroupSquares = 64;  // accumulators of 4 KiB
constexpr int64_t kGroupSteps = 160;   // packed steps of 2 KiB of a group's right operand
constexpr int64_t kBlockSteps = 16;
constexpr int64_t kPassSteps = 20;

// Steps of one term that go into one pass together.
struct Part {
    const Term* term;
    int64_t first, steps;
};
using Pass = std::vector<Part>;

struct Group {
    const Output* output;
    int64_t first, panels;
};

struct Plan {
    explicit Plan(const Product& product, int threads);

    const Product& product;
    int64_t rows, chunks, blocks;  // rows of a chunk; chunks; squares on top of each other in one
    std::vector<int64_t> depths, offsets;  // of every left operand; offsets in the packed chunk
    int64_t packed = 0;                    // bf16 elements of a packed chunk
    std::vector<Group> groups;

    int64_t steps(int left) const { return ceil_div(depths[left], kStep); }
    // `together` panels of the right operand are packed at a time.
    std::vector<Pass> passes(const std::vector<Term>& terms, int64_t together) const;
};

Plan::Plan(const Product& p, int threads) : product(p) {
    int64_t panels = 0;
    for (const Output& output : p.outputs) panels += ceil_div(output.width, kEdge);
    chunks = ceil_div(p.rows, kChunkRows);
    if (chunks > threads) chunks = ceil_div(chunks, threads) * threads;
    const int64_t spare = threads / std::max<int64_t>(panels, 1);
    chunks = std::max(chunks, std::min(ceil_div(p.rows, kEdge), spare));
    rows = ceil_div(ceil_div(p.rows, chunks), kEdge) * kEdge;
    chunks = ceil_div(p.rows, rows);
    blocks = rows / kEdge;
    const int64_t wanted = ceil_div(panels, ceil_div(threads, chunks));
    const int64_t size = std::max<int64_t>(1, std::min(kGroupSquares / blocks, wanted));
    for (const Output& output : p.outputs)
        for (int64_t at = 0, all = ceil_div(output.width, kEdge); at < all; at += size)
            groups.push_back({&output, at, std::min(size, all - at)});
    if (groups.empty()) groups.push_back({nullptr, 0, 0});  // only narrow products
    for (const Left& left : p.lefts) depths.push_back(left.depth);
    for (const Narrow& narrow : p.narrows) depths.push_back(narrow.width);
    for (size_t i = 0; i < depths.size(); ++i) {
        offsets.push_back(packed);
        packed += steps(i) * blocks * kPair;
    }
}

std::vector<Pass> Plan::passes(const std::vector<Term>& terms, int64_t together) const {
    const int64_t limit = std::min(kPassSteps, kGroupSteps / together);
    const int64_t block = std::min(kBlockSteps, limit);
    std::vector<Pass> made;
    int64_t used = limit;
    for (const Term& term : terms) {
        const int64_t all = steps(term.left);
        if (all == 0) continue;
        const int64_t size = ceil_div(all, ceil_div(all, block));
        for (int64_t first = 0; first < all; first += size) {
            const int64_t count = std::min(size, all - first);
            if (used + count > limit) {
                made.emplace_back();
                used = 0;
            }
            made.back().push_back({&term, first, count});
            used += count;
        }
    }
    if (made.empty()) made.emplace_back();  // a sum of nothing
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
        const size_t rights = kGroupSteps * kPair;
        const size_t squares = kGroupSquares * kSquare;
        left_ = static_cast<bf16*>(
            workspace.at_least(sizeof(bf16) * (plan.packed + rights) + sizeof(float) * squares));
        right_ = left_ + plan.packed;
        squares_ = reinterpret_cast<float*>(right_ + rights);
    }

    void run(int64_t first, int64_t last) {
        const int64_t groups = plan_.groups.size();
        for (int64_t item = first; item < last; ++item) {
            if (item == first || item % groups == 0) pack_chunk(item / groups, item % groups == 0);
            const Group& group = plan_.groups[item % groups];
            if (!group.output) continue;
            const Output& out = *group.output;
            sum(out.terms, out.width, group.first, group.panels,
                [&](float* square, int64_t row, int64_t column) {
                    write(square, out, row, column);
                });
        }
    }

  private:
    // Packs the chunk's left operands. Whoever has its first group writes the narrow products out.
    void pack_chunk(int64_t chunk, bool first_group) {
        row_ = chunk * plan_.rows;
        blocks_ = ceil_div(std::min(plan_.rows, product_.rows - row_), kEdge);
        const int64_t lefts = product_.lefts.size();
        for (int64_t i = 0; i < lefts; ++i) {
            const auto& [matrix, depth] = product_.lefts[i];
            for (int64_t block = 0; block < blocks_; ++block) {
                const int64_t row = row_ + block * kEdge;
                for (int64_t s = 0; s < plan_.steps(i); ++s)
                    pack_left(matrix, row, product_.rows - row, s * kStep, depth - s * kStep,
                              left(i, block, s));
            }
        }
        for (size_t i = 0; i < product_.narrows.size(); ++i)
            multiply_narrow(product_.narrows[i], lefts + i, first_group);
    }

    // Rounds left · right into the packed chunk and, where `write`, into a matrix of its own.
    void multiply_narrow(const Narrow& narrow, int64_t index, bool write) {
        const auto round = [&](const float* square, int64_t row, int64_t column) {
            bf16* tiles = left(index, (row - row_) / kEdge, column / kStep);
            const __mmask32 lanes = first_lanes(narrow.width - column);
            // What lies beyond the width is multiplied by zeros, so it must not be infinite.
            round_rows(square, narrow.scale, nullptr, lanes, [&](int r, __m512i values) {
                _mm512_storeu_si512(tiles + r * kStep, _mm512_maskz_mov_epi16(lanes, values));
            });
            if (!write) return;
            bf16* out = narrow.out + row * narrow.stride + column;
            round_rows(square, narrow.out_scale, nullptr, lanes, [&](int r, __m512i values) {
                if (row + r < product_.rows)
                    _mm512_mask_storeu_epi16(out + r * narrow.stride, lanes, values);
            });
        };
        const std::vector<Term> term{{narrow.left, narrow.right}};
        for (int64_t panel = 0; panel < plan_.steps(index); ++panel)
            sum(term, narrow.width, panel, 1, round);
    }

    // A square of an output from (row, column) on.
    void write(float* square, const Output& out, int64_t row, int64_t column) {
        int64_t rows = product_.rows - row, columns = out.width - column;
        if (out.transposed) {
            transpose_square(square);
            std::swap(row, column);
            std::swap(rows, columns);
        }
        const __mmask32 lanes = first_lanes(columns);
        bf16* to = out.data + row * out.stride + column;
        round_rows(square, out.scale, out.bias ? out.bias + column : nullptr, lanes,
                   [&](int r, __m512i values) {
                       if (r < rows) _mm512_mask_storeu_epi16(to + r * out.stride, lanes, values);
                   });
    }

    // Σ left · right over the terms for the chunk's rows and some panels, in the order of the
    // reduction; sink(square, row, column).
    template <class SINK>
    void sum(const std::vector<Term>& terms, int64_t width, int64_t first, int64_t panels,
             SINK sink) {
        const int64_t together = terms[0].right.reduction_first ? panels : 1;
        const std::vector<Pass> passes = plan_.passes(terms, together);
        for (const Pass& pass : passes) {
            const bool first_pass = &pass == &passes.front(), last_pass = &pass == &passes.back();
            int64_t steps = 0;
            for (const Part& part : pass) steps += part.steps;
            for (int64_t panel = 0; panel < panels; ++panel) {
                const int64_t column = (first + panel) * kEdge;
                if (panel % together == 0) pack_rights(pass, width, column, together, steps);
                for (int64_t block = 0; block < blocks_; ++block) {
                    float* square = squares_ + (panel * blocks_ + block) * kSquare;
                    const bf16* right = right_ + panel % together * steps * kPair;
                    start_square(square, first_pass);
                    for (const Part& part : pass) {
                        add_steps(left(part.term->left, block, part.first), right, part.steps);
                        right += part.steps * kPair;
                    }
                    stop_square(square);
                    if (last_pass) sink(square, row_ + block * kEdge, column);
                }
            }
        }
    }

    // Panels from a column on, one behind the other, each of `steps` steps.
    void pack_rights(const Pass& pass, int64_t width, int64_t column, int64_t panels,
                     int64_t steps) {
        bf16* tiles = right_;
        for (const Part& part : pass) {
            const int64_t depth = plan_.depths[part.term->left];
            for (int64_t s = part.first; s < part.first + part.steps; ++s, tiles += kPair)
                pack_right(part.term->right, column, width - column, s * kStep, depth - s * kStep,
                           tiles, panels, steps * kPair);
        }
    }

    bf16* left(int64_t i, int64_t block, int64_t step) {
        return left_ + plan_.offsets[i] + (block * plan_.steps(i) + step) * kPair;
    }

    const Plan& plan_;
    const Product& product_;
    bf16* left_;
    bf16* right_;
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
            const int64_t items = plan.chunks * plan.groups.size();
            const int64_t first = items * thread / threads, last = items * (thread + 1) / threads;
            if (first < last) Worker(plan, workspace).run(first, last);
        }
        workspace.shrink();
    });
}

}  // namespace nsru::cpu
