// Packing for the tile unit, its inner loop, and what becomes of an accumulator.
//
// A tile is 16 rows of 64 bytes. One step is 32 elements of the reduction. Of 32 indices i and one
// step, a left operand needs two tiles with a row for each i; a right operand needs the transpose
// of that in units of two elements: a row for each pair of the reduction. So what lies in memory as
// [i, d] is a left tile as it is, what lies as [d, i] becomes a right tile by interleaving two
// rows, and either is turned into the other by a transpose of 32-bit words.
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
constexpr int kPair = 2 * kTile;        // one step of a left or right operand
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

inline void transpose_tile(bf16* tile) {
    __m512i v[16];
    for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(tile + i * kStep);
    transpose_words(v);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + i * kStep, v[i]);
}

// One step from d on, which is reduction-first in memory, of 32 indices from i on as a right
// operand; then of the 32 that follow, `distance` elements further, and so on: rows are read in
// long runs. Zeros beyond `count` and `depth`.
inline void interleave(const Matrix& m, int64_t i, int64_t count, int64_t d, int64_t depth,
                       bf16* tiles, int64_t panels, int64_t distance) {
    // Lanes 2 j and 2 j + 1 are lane j of the even and of the odd row; j < 16, then the others.
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int pair = 0; pair < 16; ++pair) {
        const bf16* even = m.data + (d + 2 * pair) * m.stride + i;
        bf16* to = tiles + pair * kStep;
        for (int64_t p = 0; p < panels; ++p, even += kEdge, to += distance) {
            const __mmask32 lanes = first_lanes(count - p * kEdge);
            const __m512i a = _mm512_maskz_loadu_epi16(2 * pair < depth ? lanes : 0, even);
            const __m512i b =
                _mm512_maskz_loadu_epi16(2 * pair + 1 < depth ? lanes : 0, even + m.stride);
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(to + kTile, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

// 32 indices from i on and one step from d on, which is not reduction-first in memory, as a left
// or, transposed, as a right operand; zeros beyond `count` and `depth`.
template <bool RIGHT>
void copy_rows(const Matrix& m, int64_t i, int64_t count, int64_t d, int64_t depth, bf16* tiles) {
    const __mmask32 lanes = first_lanes(depth);
    for (int tile = 0; tile < 2; ++tile) {
        __m512i v[16];
        for (int r = 0; r < 16; ++r) {
            const int64_t row = 16 * tile + r;
            v[r] = _mm512_maskz_loadu_epi16(row < count ? lanes : 0,
                                            m.data + (i + row) * m.stride + d);
        }
        if (RIGHT) transpose_words(v);
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(tiles + tile * kTile + r * kStep, v[r]);
    }
}

inline void pack_left(const Matrix& m, int64_t i, int64_t count, int64_t d, int64_t depth,
                      bf16* tiles) {
    if (!m.reduction_first) return copy_rows<false>(m, i, count, d, depth, tiles);
    interleave(m, i, count, d, depth, tiles, 1, 0);
    transpose_tile(tiles);
    transpose_tile(tiles + kTile);
}

// For `panels` times 32 indices, `distance` elements apart.
inline void pack_right(const Matrix& m, int64_t i, int64_t count, int64_t d, int64_t depth,
                       bf16* tiles, int64_t panels, int64_t distance) {
    if (m.reduction_first) return interleave(m, i, count, d, depth, tiles, panels, distance);
    for (int64_t p = 0; p < panels; ++p)
        copy_rows<true>(m, i + p * kEdge, count - p * kEdge, d, depth, tiles + p * distance);
}

inline void start_square(const float* square, bool zero) {
    order_memory();
    if (zero) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, square, 64);
        _tile_loadd(1, square + 256, 64);
        _tile_loadd(2, square + 512, 64);
        _tile_loadd(3, square + 768, 64);
    }
}

// The right operand stays in the first-level cache, so the left one streams past it.
inline void add_steps(const bf16* left, const bf16* right, int64_t steps) {
    for (int64_t s = 0; s < steps; ++s, left += kPair, right += kPair) {
        _tile_stream_loadd(4, left, 64);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(5, left + kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

inline void stop_square(float* square) {
    _tile_stored(0, square, 64);
    _tile_stored(1, square + 256, 64);
    _tile_stored(2, square + 512, 64);
    _tile_stored(3, square + 768, 64);
    order_memory();
}

// Turns a square round its diagonal.
inline void transpose_square(float* square) {
    __m512i v[4][16];
    for (int tile = 0; tile < 4; ++tile) {
        for (int r = 0; r < 16; ++r) v[tile][r] = _mm512_loadu_si512(square + tile * 256 + r * 16);
        transpose_words(v[tile]);
    }
    for (int tile = 0; tile < 4; ++tile)
        for (int r = 0; r < 16; ++r)
            _mm512_storeu_si512(square + tile * 256 + r * 16, v[tile % 2 * 2 + tile / 2][r]);
}

inline __m512 widened(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// write(row, values) for 32 rows of scale · square + bias, rounded; a bias belongs to a column.
template <class WRITE>
void round_rows(const float* square, float scale, const bf16* bias, __mmask32 lanes, WRITE write) {
    const __m512i b = bias ? _mm512_maskz_loadu_epi16(lanes, bias) : _mm512_setzero_si512();
    const __m512 low = widened(_mm512_castsi512_si256(b));
    const __m512 high = widened(_mm512_extracti64x4_epi64(b, 1));
    const __m512 factor = _mm512_set1_ps(scale);
    for (int r = 0; r < kEdge; ++r) {
        const float* at = square + r / 16 * 512 + r % 16 * 16;
        const __m512 a = _mm512_fmadd_ps(_mm512_loadu_ps(at), factor, low);
        const __m512 c = _mm512_fmadd_ps(_mm512_loadu_ps(at + 256), factor, high);
        write(r, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(c, a)));
    }
}

}  // namespace nsru::cpu
