// Packing for the tile unit, its inner loop, and what becomes of an accumulator.
//
// A tile is 16 rows of 64 bytes. One step is 32 elements of the reduction, and an operand of the
// tile unit is 32 indices i of one step in two tiles: row tiles with a row for each i, or pair
// tiles with a row for each pair of the reduction, the two elements of every i side by side. So
// what lies in memory as [i, d] is row tiles as it is, what lies as [d, i] becomes pair tiles by
// interleaving two rows, and either is turned into the other by a transpose of 32-bit words.
//
// Interleaving goes by lanes of 128 bits. The indices of pair tiles, and so the columns of
// accumulators, stay in the order in which it leaves them (`index_of`) until results are written.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "product.h"

namespace nsru::cpu {

constexpr int kStep = 32;               // elements of the reduction in a tile
constexpr int kEdge = 32;               // rows and columns of an accumulator: 2 x 2 tiles
constexpr int kTile = 16 * kStep;       // bf16 elements
constexpr int kPair = 2 * kTile;        // one step of an operand
constexpr int kSquare = kEdge * kEdge;  // float32 elements of an accumulator

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The intrinsics of tiles do not tell the compiler that they touch memory.
inline void order_memory() { std::atomic_signal_fence(std::memory_order_seq_cst); }

// Every tile with 16 rows of 64 bytes, for as long as this lives.
class TileConfig {
  public:
    TileConfig() {
        alignas(64) Config config{};
        config.palette = 1;
        std::fill_n(config.row_bytes, 8, 64);
        std::fill_n(config.rows, 8, 16);
        order_memory();
        _tile_loadconfig(&config);
    }
    ~TileConfig() { _tile_release(); }
    TileConfig(const TileConfig&) = delete;
    TileConfig& operator=(const TileConfig&) = delete;

  private:
    struct Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
};

inline __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1;
}

// Of 16 x 16 words of 32 bits.
inline void transpose_words(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int half = 0; half < 2; ++half) {
            v[i + 2 * half] = _mm512_unpacklo_epi64(t[i + half], t[i + 2 + half]);
            v[i + 2 * half + 1] = _mm512_unpackhi_epi64(t[i + half], t[i + 2 + half]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        for (int half = 0; half < 2; ++half) {
            t[8 * half + i] = _mm512_shuffle_i32x4(v[8 * half + i], v[8 * half + i + 4], 0x88);
            t[8 * half + i + 4] = _mm512_shuffle_i32x4(v[8 * half + i], v[8 * half + i + 4], 0xdd);
        }
    }
    for (int i = 0; i < 8; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

// Of the 32 indices of pair tiles, the one in a column of a tile.
constexpr int index_of(int tile, int column) { return column / 4 * 8 + tile * 4 + column % 4; }

// Pair tiles of one step from d on, reduction-first in memory, for 32 indices from i on; then for
// the 32 that follow, `distance` elements further, and so on `blocks` times: rows are read in long
// runs. Zeros beyond `count` and `depth`.
inline void interleave(const Matrix& m, int64_t i, int64_t count, int64_t d, int64_t depth,
                       bf16* tiles, int64_t blocks, int64_t distance) {
    for (int pair = 0; pair < 16; ++pair) {
        const bf16* even = m.data + (d + 2 * pair) * m.stride + i;
        bf16* to = tiles + pair * kStep;
        for (int64_t block = 0; block < blocks; ++block, even += kEdge, to += distance) {
            const __mmask32 lanes = first_lanes(count - block * kEdge);
            const __m512i a = _mm512_maskz_loadu_epi16(2 * pair < depth ? lanes : 0, even);
            const __m512i b =
                _mm512_maskz_loadu_epi16(2 * pair + 1 < depth ? lanes : 0, even + m.stride);
            _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
            _mm512_storeu_si512(to + kTile, _mm512_unpackhi_epi16(a, b));
        }
    }
}

// Row tiles or, transposed, pair tiles of 32 indices from i on and one step from d on, which is not
// reduction-first in memory. Zeros beyond `count` and `depth`.
template <bool PAIRS>
void copy_rows(const Matrix& m, int64_t i, int64_t count, int64_t d, int64_t depth, bf16* tiles) {
    const __mmask32 lanes = first_lanes(depth);
    const int tiles_used = !PAIRS && count <= kEdge / 2 ? 1 : 2;
    for (int tile = 0; tile < tiles_used; ++tile) {
        __m512i v[16];
        for (int r = 0; r < 16; ++r) {
            const int64_t row = PAIRS ? index_of(tile, r) : 16 * tile + r;
            v[r] = _mm512_maskz_loadu_epi16(row < count ? lanes : 0,
                                            m.data + (i + row) * m.stride + d);
        }
        if (PAIRS) transpose_words(v);
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(tiles + tile * kTile + r * kStep, v[r]);
    }
}

inline void pack_rows(const Matrix& m, int64_t i, int64_t count, int64_t d, int64_t depth,
                      bf16* tiles) {
    if (!m.reduction_first) return copy_rows<false>(m, i, count, d, depth, tiles);
    alignas(64) bf16 pairs[kPair];
    interleave(m, i, count, d, depth, pairs, 1, 0);
    for (int tile = 0; tile < 2; ++tile) {
        __m512i v[16];
        for (int r = 0; r < 16; ++r) v[r] = _mm512_load_si512(pairs + tile * kTile + r * kStep);
        transpose_words(v);
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(tiles + index_of(tile, r) * kStep, v[r]);
    }
}

// An accumulator leaves its tile for `done`, another comes from `next`; nullptr stands for none and
// for zeros. Where both are one square it stays. A macro, for the compiler wants tiles as literals.
#define NSRU_EXCHANGE(tile, done, next)                              \
    do {                                                             \
        if (!(done) || (done) != (next)) {                           \
            if (done) _tile_stored(tile, (done) + (tile) * 256, 64); \
            if (next)                                                \
                _tile_loadd(tile, (next) + (tile) * 256, 64);        \
            else                                                     \
                _tile_zero(tile);                                    \
        }                                                            \
    } while (false)

inline void exchange_square(float* done, const float* next) {
    order_memory();
    NSRU_EXCHANGE(0, done, next);
    NSRU_EXCHANGE(1, done, next);
    NSRU_EXCHANGE(2, done, next);
    NSRU_EXCHANGE(3, done, next);
    order_memory();
}

// Rows in memory that are needed soon: one step of each is fetched during each step.
struct Ahead {
    const bf16* data;
    int64_t stride;
    int64_t rows;

    void fetch(int64_t step) const {
        for (int64_t row = 0; row < rows; ++row)
            _mm_prefetch(reinterpret_cast<const char*>(data + row * stride + step * kStep),
                         _MM_HINT_T1);
    }
};

// Where row tiles come from: they are packed; they are, but the second one would be empty; they lie
// whole in memory and are packed by the way.
enum class RowTiles { kPacked, kOne, kInMemory };

// Adds rows · pairs over some steps. The row tiles stay in the first-level cache while the pair
// tiles stream past it. Accumulators are exchanged one by one, just before the first step needs
// them.
template <RowTiles ROWS>
void add_steps(bf16* rows, const bf16* pairs, int64_t steps, const bf16* memory, int64_t stride,
               float* done, const float* next, Ahead ahead) {
    const int64_t bytes = stride * sizeof(bf16);
    order_memory();
    for (int64_t s = 0; s < steps; ++s, rows += kPair, pairs += kPair) {
        ahead.fetch(s);
        if (ROWS == RowTiles::kInMemory) {
            _tile_stream_loadd(4, memory + s * kStep, bytes);
            _tile_stored(4, rows, 64);
        } else {
            _tile_loadd(4, rows, 64);
        }
        _tile_stream_loadd(6, pairs, 64);
        if (s == 0) NSRU_EXCHANGE(0, done, next);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, pairs + kTile, 64);
        if (s == 0) NSRU_EXCHANGE(1, done, next);
        _tile_dpbf16ps(1, 4, 7);
        if (ROWS == RowTiles::kOne) {
            if (s == 0) NSRU_EXCHANGE(2, done, next);
            if (s == 0) NSRU_EXCHANGE(3, done, next);
            continue;
        }
        if (ROWS == RowTiles::kInMemory) {
            _tile_stream_loadd(5, memory + 16 * stride + s * kStep, bytes);
            _tile_stored(5, rows + kTile, 64);
        } else {
            _tile_loadd(5, rows + kTile, 64);
        }
        if (s == 0) NSRU_EXCHANGE(2, done, next);
        _tile_dpbf16ps(2, 5, 6);
        if (s == 0) NSRU_EXCHANGE(3, done, next);
        _tile_dpbf16ps(3, 5, 7);
    }
    order_memory();
}

inline __m512i rounded(__m512 low, __m512 high) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// use(row, low, high) for the 32 rows of scale · square: what the first and the second tile hold.
template <class USE>
void scale_rows(const float* square, float scale, USE use) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int r = 0; r < kEdge; ++r) {
        const float* at = square + r / 16 * 512 + r % 16 * 16;
        use(r, _mm512_mul_ps(_mm512_loadu_ps(at), factor),
            _mm512_mul_ps(_mm512_loadu_ps(at + 256), factor));
    }
}

// write(row, values) for the 32 rows of scale · square, rounded.
template <class WRITE>
void round_rows(const float* square, float scale, WRITE write) {
    const __m512i ordered = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);  // by four columns
    scale_rows(square, scale, [&](int row, __m512 low, __m512 high) {
        write(row, _mm512_permutexvar_epi64(ordered, rounded(low, high)));
    });
}

// write(row, low, high) for the 32 rows of scale · square.
template <class WRITE>
void widen_rows(const float* square, float scale, WRITE write) {
    const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);  // by four columns
    const __m512i second = _mm512_add_epi64(first, _mm512_set1_epi64(4));
    scale_rows(square, scale, [&](int row, __m512 low, __m512 high) {
        const __m512d a = _mm512_castps_pd(low), c = _mm512_castps_pd(high);
        write(row, _mm512_castpd_ps(_mm512_permutex2var_pd(a, first, c)),
              _mm512_castpd_ps(_mm512_permutex2var_pd(a, second, c)));
    });
}

// write(column, low, high) for the 32 columns of scale · square.
template <class WRITE>
void widen_columns(const float* square, float scale, WRITE write) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int tile = 0; tile < 2; ++tile) {
        __m512i low[16], high[16];
        for (int r = 0; r < 16; ++r) {
            const float* at = square + tile * 256 + r * 16;
            low[r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(at), factor));
            high[r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(at + 512), factor));
        }
        transpose_words(low);
        transpose_words(high);
        for (int c = 0; c < 16; ++c)
            write(index_of(tile, c), _mm512_castsi512_ps(low[c]), _mm512_castsi512_ps(high[c]));
    }
}

// Pairs of rows of scale · square + bias, rounded, as in pair tiles, for the columns of one tile; a
// bias belongs to a row.
inline void round_pairs(const float* square, int tile, float scale, const float* bias,
                        __m512i pairs[16]) {
    const __m512i interleaved =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 factor = _mm512_set1_ps(scale);
    for (int p = 0; p < 16; ++p) {
        const float* at = square + p / 8 * 512 + tile * 256 + p % 8 * 32;
        const __m512 a = _mm512_fmadd_ps(_mm512_loadu_ps(at), factor, _mm512_set1_ps(bias[2 * p]));
        const __m512 c =
            _mm512_fmadd_ps(_mm512_loadu_ps(at + 16), factor, _mm512_set1_ps(bias[2 * p + 1]));
        pairs[p] = _mm512_permutexvar_epi16(interleaved, rounded(a, c));
    }
}

// write(column, values) for the 32 columns of scale · square + bias, rounded; a bias belongs to a
// row.
template <class WRITE>
void round_columns(const float* square, float scale, const float* bias, WRITE write) {
    for (int tile = 0; tile < 2; ++tile) {
        __m512i v[16];
        round_pairs(square, tile, scale, bias, v);
        transpose_words(v);
        for (int c = 0; c < 16; ++c) write(index_of(tile, c), v[c]);
    }
}

}  // namespace nsru::cpu
