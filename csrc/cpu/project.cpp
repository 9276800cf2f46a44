// Two reads of U, the second from the cache of the thread that has read it first:
//
//     A U       summed up for every 256 rows of U by itself, then in their order
//     (A U) Uᵀ  for 16 rows of U at a time, which are transposed in registers
#include "project.h"

#include <algorithm>

#include "parallel.h"
#include "tiles.h"

namespace nsru::cpu {

namespace {

constexpr int64_t kSumRows = 256;   // rows of U in a partial sum
constexpr int64_t kCacheRows = 32;  // of those, in the first-level cache at a time
constexpr int64_t kLanes = 16;
constexpr int kBlock = 8;  // rows of A at a time

constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

__mmask16 first_floats(int64_t count) { return __mmask16(first_lanes(count)); }

// A block of rows of [rank, stride]; the last one stands in for those beyond.
struct Rows {
    Rows(const float* data, int64_t stride, int64_t first, int64_t rank) {
        for (int i = 0; i < kBlock; ++i) at[i] = data + std::min(first + i, rank - 1) * stride;
    }
    const float* at[kBlock];
};

// along [rank, width] += A U over the rows [first, last) of U.
void add_along(const Basis& u, const Adapter& adapter, int64_t first, int64_t last, float* along,
               int64_t width) {
    for (; first < last; first += kCacheRows) {
        const int64_t end = std::min(first + kCacheRows, last);
        for (int64_t q = 0; q < width; q += 2 * kLanes) {
            const __mmask16 low = first_floats(u.q - q), high = first_floats(u.q - q - kLanes);
            for (int64_t r = 0; r < adapter.rank; r += kBlock) {
                const Rows a(adapter.a, u.k, r, adapter.rank);
                float* to = along + r * width + q;
                __m512 sums[kBlock][2];
                for (int i = 0; i < kBlock; ++i) {
                    sums[i][0] = _mm512_loadu_ps(to + i * width);
                    sums[i][1] = _mm512_loadu_ps(to + i * width + kLanes);
                }
                for (int64_t k = first; k < end; ++k) {
                    const float* row = u.data + k * u.stride + q;
                    if (r == 0) {
                        const float* soon = row + kCacheRows * u.stride;
                        _mm_prefetch(reinterpret_cast<const char*>(soon), _MM_HINT_T1);
                        _mm_prefetch(reinterpret_cast<const char*>(soon + kLanes), _MM_HINT_T1);
                    }
                    const __m512 left = _mm512_maskz_loadu_ps(low, row);
                    const __m512 right = _mm512_maskz_loadu_ps(high, row + kLanes);
                    for (int i = 0; i < kBlock; ++i) {
                        const __m512 factor = _mm512_set1_ps(a.at[i][k]);
                        sums[i][0] = _mm512_fmadd_ps(factor, left, sums[i][0]);
                        sums[i][1] = _mm512_fmadd_ps(factor, right, sums[i][1]);
                    }
                }
                for (int i = 0; i < kBlock; ++i) {
                    _mm512_storeu_ps(to + i * width, sums[i][0]);
                    _mm512_storeu_ps(to + i * width + kLanes, sums[i][1]);
                }
            }
        }
    }
}

// Column k + lane of Uᵀ, [width, 16], for 16 lanes; zeros beyond U.
void transpose_rows(const Basis& u, int64_t k, int64_t width, float* columns) {
    for (int64_t q = 0; q < width; q += kLanes) {
        const __mmask16 lanes = first_floats(u.q - q);
        const float* row = u.data + k * u.stride + q;
        __m512i v[kLanes];
        for (int i = 0; i < kLanes; ++i, row += u.stride)
            v[i] = _mm512_castps_si512(_mm512_maskz_loadu_ps(i < u.k - k ? lanes : 0, row));
        transpose_words(v);
        for (int i = 0; i < kLanes; ++i) _mm512_storeu_si512(columns + (q + i) * kLanes, v[i]);
    }
}

// Ā = A - along Uᵀ for 16 columns from k on.
void subtract(const Adapter& adapter, const float* along, const float* columns, int64_t width,
              int64_t k, int64_t end) {
    const __mmask16 lanes = first_floats(end - k);
    for (int64_t r = 0; r < adapter.rank; r += kBlock) {
        __m512 sums[kBlock] = {};
        for (int64_t q = 0; q < width; ++q) {
            const __m512 column = _mm512_loadu_ps(columns + q * kLanes);
            for (int i = 0; i < kBlock; ++i) {
                const __m512 factor = _mm512_set1_ps(along[(r + i) * width + q]);
                sums[i] = _mm512_fmadd_ps(factor, column, sums[i]);
            }
        }
        for (int64_t i = 0; i < std::min<int64_t>(kBlock, adapter.rank - r); ++i) {
            const int64_t at = (r + i) * end + k;
            const __m512 a = _mm512_maskz_loadu_ps(lanes, adapter.a + at);
            _mm512_mask_storeu_ps(adapter.projected + at, lanes, _mm512_sub_ps(a, sums[i]));
        }
    }
}

}  // namespace

void project(const Basis& u, const std::vector<Adapter>& adapters, int threads) {
    const int64_t width = round_up(u.q, 2 * kLanes), blocks = ceil_div(u.k, kSumRows);
    std::vector<int64_t> offsets{0};
    for (const Adapter& adapter : adapters)
        offsets.push_back(offsets.back() + round_up(adapter.rank, kBlock) * width);
    const int64_t size = offsets.back();
    std::vector<float> along(blocks * size);  // of every block; the first takes all of them
    const auto each_block = [&](auto body) {
        parallel(threads, [&](int thread) {
            const auto [first, last] = share(blocks, thread, threads);
            for (int64_t block = first; block < last; ++block) body(block);
        });
    };
    each_block([&](int64_t block) {
        for (size_t i = 0; i < adapters.size(); ++i)
            add_along(u, adapters[i], block * kSumRows, std::min((block + 1) * kSumRows, u.k),
                      along.data() + block * size + offsets[i], width);
    });
    for (int64_t block = 1; block < blocks; ++block)
        for (int64_t i = 0; i < size; ++i) along[i] += along[block * size + i];
    each_block([&](int64_t block) {
        std::vector<float> columns(width * kLanes);
        const int64_t last = std::min((block + 1) * kSumRows, u.k);
        for (int64_t k = block * kSumRows; k < last; k += kLanes) {
            transpose_rows(u, k, width, columns.data());
            for (size_t i = 0; i < adapters.size(); ++i)
                subtract(adapters[i], along.data() + offsets[i], columns.data(), width, k, u.k);
        }
    });
}

}  // namespace nsru::cpu
