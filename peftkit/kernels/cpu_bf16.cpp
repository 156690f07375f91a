// The low-rank products of an adapted linear in bf16, for CPUs with AVX512-BF16 (Zen 4, Cooper Lake and later).
//
//     x (m, k)   A (r, k)   h, dh (m, r)   B (n, r)   y, G (m, n)   W (n, k)
//
// Factors of rank r do little arithmetic on each number of x, y and G: what counts is how often those come from memory. So each
// kernel does all that one of them is wanted for while some of its rows are in the cache. Tensors of activations are bf16, A, B
// and their gradients fp32; products are of bf16, summed in fp32 and rounded once. k and n are multiples of 32, m is at least 1.
// Dropout is a bit for each number of x, which is 1 where the number is kept; `kept` is null where there is none.
// Python's side, which also decides when these serve, is cpu_bf16.py.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

using bf16 = uint16_t;
using i64 = int64_t;

namespace {

constexpr i64 LANES = 16;      // fp32 numbers in a register
constexpr i64 ROWS = 8;        // rows that one product takes at a time: sixteen sums, enough to hide the latency of adding
constexpr i64 BLOCK = 64;      // rows that stay in the cache from one use to the next
constexpr i64 PADDING = 32;    // columns between copied rows, lest rows of 4 KB all fall on one set of the cache

using Sums = __m512[ROWS][2];

i64 round_up(i64 count, i64 unit) { return (count + unit - 1) / unit * unit; }

// Memory that a thread keeps from call to call: fresh pages would cost more than what is done with them. `for_team` is that of the
// thread that calls, which its team shares through a pointer; `for_one` is each thread's own.
struct Scratch {
    char* data = nullptr;
    i64 size = 0;
    char* of(i64 bytes) {
        if (bytes > size) {
            free(data);
            size = round_up(bytes, 4096);
            data = static_cast<char*>(aligned_alloc(4096, size));
            if (data == nullptr) abort();
        }
        return data;
    }
    ~Scratch() { free(data); }
};
thread_local Scratch for_team, for_one;

// The part [from, to) of `count` that falls to the calling thread, in whole units.
struct Share {
    i64 from, to;
    Share(i64 count, i64 unit) {
        i64 units = (count + unit - 1) / unit, threads = omp_get_num_threads(), me = omp_get_thread_num();
        from = std::min(count, units * me / threads * unit);
        to = std::min(count, units * (me + 1) / threads * unit);
    }
};

// -------------------------------------------------------------------------------------------------------------- numbers

__m512 load(const bf16* at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))), 16));
}

__m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

void store(bf16* at, __m512 first, __m512 second) { _mm512_storeu_si512(at, (__m512i)_mm512_cvtne2ps_pbh(second, first)); }

__mmask16 lanes(i64 count) { return count >= LANES ? 0xffff : static_cast<__mmask16>((1u << std::max<i64>(count, 0)) - 1); }

// Asks for the line of `at`, which may lie past the end: rows are read in an order that the CPU does not foresee.
void prefetch(const bf16* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0); }

// sum += a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1] in each lane i
__m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// Two neighbouring numbers, in every lane.
__m512i both(const bf16* at) {
    int32_t pair;
    std::memcpy(&pair, at, 4);
    return _mm512_set1_epi32(pair);
}

// Pairs (low, high) of bf16, one in each lane.
__m512i paired(__m256i low, __m256i high) { return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)); }

// -------------------------------------------------------------------------------------------------------------- packing

// A factor M as the right side of products: packed[block][i / 2][lane] holds M[lane][i] and M[lane][i + 1], 16 lanes a block,
// zero where there are none. Here lanes are rows of `m` (lanes, inner), for pairs [from, to) of one block.
void pack_rows(const float* m, i64 count, i64 inner, i64 block, i64 from, i64 to, i64 pairs, uint32_t* packed) {
    for (i64 lane = 0; lane < LANES; lane++) {
        const i64 row = block * LANES + lane;
        uint32_t* out = packed + block * pairs * LANES + lane;
        for (i64 i = from; i < to; i += 8) {
            alignas(32) uint32_t some[8];
            __mmask16 there = row < count ? lanes(inner - 2 * i) : 0;
            _mm256_store_si256(reinterpret_cast<__m256i*>(some), narrow(_mm512_maskz_loadu_ps(there, m + row * inner + 2 * i)));
            for (i64 j = 0; j < std::min<i64>(8, to - i); j++) out[(i + j) * LANES] = some[j];
        }
    }
}

// The same where lanes are columns of `m` (inner, lanes), for one pair of one block.
void pack_columns(const float* m, i64 count, i64 inner, i64 block, i64 pair, i64 pairs, uint32_t* packed) {
    const float* at = m + 2 * pair * count + block * LANES;
    __mmask16 there = lanes(count - block * LANES);
    __m256i low = narrow(_mm512_maskz_loadu_ps(there, at)), high = narrow(_mm512_maskz_loadu_ps(2 * pair + 1 < inner ? there : 0, at + count));
    _mm512_store_si512(packed + (block * pairs + pair) * LANES, paired(low, high));
}

// Rows of h (m, r) for `outer`: out[t / 2][j] holds h[t][j] and h[t + 1][j], zero beyond.
void pack_pairs(const bf16* h, i64 stride, i64 rows, i64 r, i64 width, uint32_t* out) {
    for (i64 t = 0; t < rows; t += 2)
        for (i64 j = 0; j < width; j++) {
            uint32_t low = j < r ? h[t * stride + j] : 0, high = j < r && t + 1 < rows ? h[(t + 1) * stride + j] : 0;
            out[t / 2 * width + j] = low | high << 16;
        }
}

// ROWS rows of `from`, zero beyond `rows` of them and beyond `width` columns.
void pad(const bf16* from, i64 stride, i64 rows, i64 width, bf16* to, i64 to_stride) {
    for (i64 i = 0; i < ROWS; i++) {
        i64 count = i < rows ? width : 0;
        std::memcpy(to + i * to_stride, from + i * stride, count * sizeof(bf16));
        std::memset(to + i * to_stride + count, 0, (to_stride - count) * sizeof(bf16));
    }
}

// ROWS rows of k numbers, zero where they are dropped and beyond `rows` of them; they lie k + PADDING apart.
void drop(const bf16* from, const uint32_t* kept, i64 rows, i64 k, bf16* to) {
    for (i64 i = 0; i < ROWS; i++, to += k + PADDING)
        for (i64 column = 0; column < k; column += 32) {
            const uint32_t some = i >= rows ? 0 : kept == nullptr ? ~0u : kept[(i * k + column) / 32];
            _mm512_storeu_si512(to + column, _mm512_maskz_loadu_epi16(some, from + i * k + column));
        }
}

// ------------------------------------------------------------------------------------------------------------- products

// sums[i][0] and [1] = row i of `rows` times two blocks of 16 lanes, of `pairs` pairs each.
inline void product(Sums& sums, const bf16* rows, i64 stride, const uint32_t* first, const uint32_t* second, i64 pairs) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (i64 k = 0; k < pairs; k++) {
        __m512i right = _mm512_load_si512(first + k * LANES), other = _mm512_load_si512(second + k * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            __m512i left = both(rows + i * stride + 2 * k);
            sums[i][0] = dot(sums[i][0], left, right);
            sums[i][1] = dot(sums[i][1], left, other);
        }
    }
}

// sums[i][0] = row i times one block; even and odd pairs are summed apart, so that there are sixteen sums again.
inline void product(Sums& sums, const bf16* rows, i64 stride, const uint32_t* block, i64 pairs) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (i64 k = 0; k < pairs; k += 2) {
        __m512i even = _mm512_load_si512(block + k * LANES), odd = _mm512_load_si512(block + (k + 1) * LANES);
        if (k % 16 == 0)
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) prefetch(rows + (ROWS + i) * stride + 2 * k);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            sums[i][0] = dot(sums[i][0], both(rows + i * stride + 2 * k), even);
            sums[i][1] = dot(sums[i][1], both(rows + i * stride + 2 * k + 2), odd);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) sums[i][0] = _mm512_add_ps(sums[i][0], sums[i][1]);
}

// rows (ROWS, k) times M of `blocks` blocks: then(block, row, sum) for each. `pairs` is even.
template <class Then>
inline void into_lanes(const bf16* rows, i64 stride, const uint32_t* packed, i64 pairs, i64 blocks, Then then) {
    Sums sums;
    i64 block = 0;
    for (; block + 2 <= blocks; block += 2) {
        product(sums, rows, stride, packed + block * pairs * LANES, packed + (block + 1) * pairs * LANES, pairs);
        for (i64 i = 0; i < ROWS; i++) then(block, i, sums[i][0]), then(block + 1, i, sums[i][1]);
    }
    if (block < blocks) {
        product(sums, rows, stride, packed + block * pairs * LANES, pairs);
        for (i64 i = 0; i < ROWS; i++) then(block, i, sums[i][0]);
    }
}

// h (rows, r) = scale * (rows times M), in bf16.
inline void times_factor(const bf16* x, i64 stride, i64 rows, const uint32_t* packed, i64 pairs, i64 r, float scale, bf16* h) {
    into_lanes(x, stride, packed, pairs, (r + LANES - 1) / LANES, [&](i64 block, i64 i, __m512 sum) {
        if (i < rows) _mm256_mask_storeu_epi16(h + i * r + block * LANES, lanes(r - block * LANES), narrow(_mm512_mul_ps(sum, _mm512_set1_ps(scale))));
    });
}

// y (rows, n) <- gain * (y + scale * (h times M)), rounded once, where it is kept; `h` has ROWS rows of 2 * pairs.
template <bool GAIN>
inline void add_product(bf16* y, i64 n, i64 rows, const bf16* h, const uint32_t* packed, i64 pairs, float scale, const float* gain, const uint32_t* kept) {
    Sums sums;
    for (i64 column = 0; column < n; column += 2 * LANES) {
        const uint32_t* block = packed + column * pairs;
        product(sums, h, 2 * pairs, block, block + pairs * LANES, pairs);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            if (i >= rows) break;
            bf16* at = y + i * n + column;
            prefetch(at + ROWS * n);
            __m512 first = _mm512_fmadd_ps(_mm512_set1_ps(scale), sums[i][0], load(at));
            __m512 second = _mm512_fmadd_ps(_mm512_set1_ps(scale), sums[i][1], load(at + LANES));
            if constexpr (GAIN) {
                first = _mm512_mul_ps(first, _mm512_loadu_ps(gain + column));
                second = _mm512_mul_ps(second, _mm512_loadu_ps(gain + column + LANES));
            }
            _mm512_mask_storeu_epi16(at, kept == nullptr ? ~0u : kept[(i * n + column) / 32], (__m512i)_mm512_cvtne2ps_pbh(second, first));
        }
    }
}

// sum (width, n) += h^T d(G) for up to BLOCK rows of G (rows, n), or = where `first`; h as `pack_pairs` gives it.
template <bool DROPOUT>
inline void outer(const bf16* g, const uint32_t* kept, i64 rows, i64 n, const uint32_t* h, i64 width, float* sum, bool first) {
    alignas(64) uint32_t columns[BLOCK / 2][2][LANES];
    const i64 pairs = (rows + 1) / 2;
    for (i64 column = 0; column < n; column += 2 * LANES) {
        for (i64 t = 0; t < pairs; t++) {  // each line of G is read once, and lies in order then
            const i64 at = 2 * t * n + column;
            const bool there = 2 * t + 1 < rows;
            const uint32_t even = DROPOUT ? kept[at / 32] : ~0u, odd = !there ? 0 : DROPOUT ? kept[(at + n) / 32] : ~0u;
            prefetch(g + at + 2 * LANES);
            prefetch(g + at + n + 2 * LANES);
            for (i64 half = 0; half < 2; half++) {
                __m256i low = _mm256_maskz_loadu_epi16(even >> half * LANES, g + at + half * LANES);
                __m256i high = _mm256_maskz_loadu_epi16(odd >> half * LANES, g + at + n + half * LANES);
                _mm512_store_si512(columns[t][half], paired(low, high));
            }
        }
        for (i64 from = 0; from < width; from += LANES)
            for (i64 half = 0; half < 2; half++) {
                __m512 sums[LANES];
                float* at = sum + from * n + column + half * LANES;
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) sums[j] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(at + j * n);
                for (i64 t = 0; t < pairs; t++) {
                    __m512i right = _mm512_load_si512(columns[t][half]);
#pragma GCC unroll 16
                    for (int j = 0; j < LANES; j++) sums[j] = dot(sums[j], _mm512_set1_epi32(h[t * width + from + j]), right);
                }
#pragma GCC unroll 16
                for (int j = 0; j < LANES; j++) _mm512_storeu_ps(at + j * n, sums[j]);
            }
    }
}

// scaled (rows, n) = gain * G and sum (n) += sum_t G y, unless that is null, for up to ROWS rows.
inline void scale_columns(const bf16* g, const bf16* y, const float* gain, bf16* scaled, float* sum, i64 rows, i64 n) {
    for (i64 i = 0; i < rows * n; i += n)
        for (i64 column = 0; column < n; column += 2 * LANES) {
            const __m512 first = load(g + i + column), second = load(g + i + column + LANES);
            if (sum != nullptr) {
                float *to = sum + column, *next = to + LANES;
                _mm512_storeu_ps(to, _mm512_fmadd_ps(first, load(y + i + column), _mm512_loadu_ps(to)));
                _mm512_storeu_ps(next, _mm512_fmadd_ps(second, load(y + i + column + LANES), _mm512_loadu_ps(next)));
            }
            const __m512 gains = _mm512_loadu_ps(gain + column), others = _mm512_loadu_ps(gain + column + LANES);
            store(scaled + i + column, _mm512_mul_ps(first, gains), _mm512_mul_ps(second, others));
        }
}

// What all threads have summed at [row][column], of parts that lie `apart` numbers apart.
__m512 total(const float* sums, i64 apart) {
    __m512 found = _mm512_loadu_ps(sums);
    for (int i = 1; i < omp_get_num_threads(); i++) found = _mm512_add_ps(found, _mm512_loadu_ps(sums + i * apart));
    return found;
}

// Eight streams of xorshift128+ (Vigna 2017, arXiv 1404.0390), started by splitmix64.
struct Random {
    __m512i s, t;
    explicit Random(uint64_t seed) {
        alignas(64) uint64_t state[16];
        for (uint64_t& word : state) {
            uint64_t z = seed += 0x9e3779b97f4a7c15;
            z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
            z = (z ^ z >> 27) * 0x94d049bb133111eb;
            word = z ^ z >> 31;
        }
        s = _mm512_load_si512(state), t = _mm512_load_si512(state + 8);
    }
    __m512i next() {
        const __m512i x = _mm512_xor_si512(s, _mm512_slli_epi64(s, 23)), found = _mm512_add_epi64(s, t);
        s = t;
        t = _mm512_xor_si512(_mm512_xor_si512(x, _mm512_srli_epi64(x, 18)), _mm512_xor_si512(t, _mm512_srli_epi64(t, 5)));
        return found;
    }
};

}  // namespace

extern "C" {

// A mask of `words` x 32 numbers, each of which is dropped if 32 random bits are below `dropped`. It depends on the seed alone.
void draw(uint32_t* kept, i64 words, uint64_t seed, uint32_t dropped, int threads) {
    constexpr i64 STRETCH = 1024;  // words of one start of the generator
    const __m512i limit = _mm512_set1_epi32(dropped);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 from = 0; from < words; from += STRETCH) {
        const uint64_t start = seed ^ static_cast<uint64_t>(from) * 0xd1342543de82ef95;
        Random one(start), other(~start);  // two, each of which waits for its own last step only
        for (i64 i = from; i < std::min(words, from + STRETCH); i++) {
            const uint32_t low = _mm512_cmpge_epu32_mask(one.next(), limit), high = _mm512_cmpge_epu32_mask(other.next(), limit);
            kept[i] = low | high << 16;
        }
    }
}

// d(x) of words x 32 numbers; `out` may be x.
void drop_all(const bf16* x, const uint32_t* kept, bf16* out, i64 words, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < words; i++) _mm512_storeu_si512(out + 32 * i, _mm512_maskz_loadu_epi16(kept[i], x + 32 * i));
}

// h (m, r) = scale d(x) A^T.
void down(const bf16* x, const float* a, bf16* h, const uint32_t* kept, i64 m, i64 k, i64 r, float scale, int threads) {
    const i64 blocks = (r + LANES - 1) / LANES, pairs = k / 2;
    uint32_t* packed = reinterpret_cast<uint32_t*>(for_team.of(blocks * LANES * k * sizeof(bf16)));
#pragma omp parallel num_threads(threads)
    {
        Share part(pairs, 8);
        for (i64 block = 0; block < blocks; block++) pack_rows(a, r, k, block, part.from, part.to, pairs, packed);
        bf16* copy = reinterpret_cast<bf16*>(for_one.of(ROWS * (k + PADDING) * sizeof(bf16)));
#pragma omp barrier
        Share mine(m, ROWS);
        for (i64 t = mine.from; t < mine.to; t += ROWS) {
            const i64 rows = std::min(ROWS, m - t);
            const bool as_is = kept == nullptr && rows == ROWS;
            if (!as_is) drop(x + t * k, kept == nullptr ? nullptr : kept + t * k / 32, rows, k, copy);
            times_factor(as_is ? x + t * k : copy, as_is ? k : k + PADDING, rows, packed, pairs, r, scale, h + t * r);
        }
    }
}

// y (m, n) <- gain * (y + scale h B^T); rows of h lie `stride` apart; gain (n) may be null.
void update(bf16* y, const bf16* h, i64 stride, const float* b, const float* gain, i64 m, i64 n, i64 r, float scale, int threads) {
    const i64 pairs = (r + 1) / 2, blocks = n / LANES;
    uint32_t* packed = reinterpret_cast<uint32_t*>(for_team.of(n * pairs * sizeof(uint32_t)));
#pragma omp parallel num_threads(threads)
    {
        Share part(blocks, 1);
        for (i64 block = part.from; block < part.to; block++) pack_rows(b, n, r, block, 0, pairs, pairs, packed);
        bf16* padded = reinterpret_cast<bf16*>(for_one.of(ROWS * 2 * pairs * sizeof(bf16)));
#pragma omp barrier
        Share mine(m, ROWS);
        for (i64 t = mine.from; t < mine.to; t += ROWS) {
            const i64 rows = std::min(ROWS, m - t);
            pad(h + t * stride, stride, rows, r, padded, 2 * pairs);
            if (gain != nullptr) add_product<true>(y + t * n, n, rows, padded, packed, pairs, scale, gain, nullptr);
            else add_product<false>(y + t * n, n, rows, padded, packed, pairs, scale, nullptr, nullptr);
        }
    }
}

// From G = dL/dy (m, n), each unless its pointer is null:
//     scaled (m, n) = gain * G, and dm (n) = sum_t G y / magnitude     for DoRA; what follows is of `scaled` then
//     dh (m, r) = scale_h G B,  db (n, r) = scale G^T h
void output_backward(
    const bf16* g, const bf16* y, const float* magnitude, const float* gain, bf16* scaled, float* dm, const bf16* h, i64 stride, const float* b,
    bf16* dh, float* db, i64 m, i64 n, i64 r, float scale, float scale_h, int threads
) {
    const i64 blocks = (r + LANES - 1) / LANES, width = blocks * LANES, pairs = n / 2;
    const i64 packed_bytes = dh == nullptr ? 0 : width * n * sizeof(bf16), for_b = db == nullptr ? 0 : width * n;
    const i64 each = for_b + (dm == nullptr ? 0 : n);
    char* memory = for_team.of(packed_bytes + threads * each * sizeof(float));
    uint32_t* packed = reinterpret_cast<uint32_t*>(memory);
    float* sums = reinterpret_cast<float*>(memory + packed_bytes);
    const bf16* factor = gain == nullptr ? g : scaled;
#pragma omp parallel num_threads(threads)
    {
        if (dh != nullptr) {
            Share part(pairs, 1);
            for (i64 block = 0; block < blocks; block++)
                for (i64 pair = part.from; pair < part.to; pair++) pack_columns(b, r, n, block, pair, pairs, packed);
        }
        const i64 left_bytes = BLOCK / 2 * width * sizeof(uint32_t);
        char* own = for_one.of(left_bytes + ROWS * (n + PADDING) * sizeof(bf16));
        uint32_t* left = reinterpret_cast<uint32_t*>(own);
        bf16* copy = reinterpret_cast<bf16*>(own + left_bytes);
        float *sum_b = sums + omp_get_thread_num() * each, *sum_m = sum_b + for_b;
        Share mine(m, BLOCK);
        if (mine.from == mine.to) std::memset(sum_b, 0, each * sizeof(float));
        else if (dm != nullptr) std::memset(sum_m, 0, n * sizeof(float));
#pragma omp barrier
        for (i64 t = mine.from; t < mine.to; t += BLOCK) {
            const i64 rows = std::min(BLOCK, m - t);
            for (i64 i = t; i < t + rows; i += ROWS) {
                const i64 some = std::min(ROWS, t + rows - i);
                if (gain != nullptr) scale_columns(g + i * n, y + i * n, gain, scaled + i * n, dm == nullptr ? nullptr : sum_m, some, n);
                if (dh == nullptr) continue;
                const bool as_is = some == ROWS;
                if (!as_is) drop(factor + i * n, nullptr, some, n, copy);
                times_factor(as_is ? factor + i * n : copy, as_is ? n : n + PADDING, some, packed, pairs, r, scale_h, dh + i * r);
            }
            if (db != nullptr) {
                pack_pairs(h + t * stride, stride, rows, r, width, left);
                outer<false>(factor + t * n, nullptr, rows, n, left, width, sum_b, t == mine.from);
            }
        }
#pragma omp barrier
        Share part(n, LANES);
        for (i64 column = part.from; column < part.to; column += LANES) {
            if (dm != nullptr) {  // a row of magnitude 0 gives no signal
                const __m512 divisor = _mm512_loadu_ps(magnitude + column);
                const __mmask16 there = _mm512_cmp_ps_mask(divisor, _mm512_setzero_ps(), _CMP_NEQ_UQ);
                _mm512_storeu_ps(dm + column, _mm512_maskz_div_ps(there, total(sums + for_b + column, each), divisor));
            }
            for (i64 j = 0; db != nullptr && j < r; j++) {
                alignas(64) float some[LANES];
                _mm512_store_ps(some, _mm512_mul_ps(total(sums + j * n + column, each), _mm512_set1_ps(scale)));
                for (i64 i = 0; i < LANES; i++) db[(column + i) * r + j] = some[i];
            }
        }
    }
}

// da (r, k) = scale dh^T d(x) and dx (m, k) += scale d(dh A), each unless its pointer is null.
void input_backward(
    const bf16* x, const bf16* dh, const float* a, bf16* dx, float* da, const uint32_t* kept, i64 m, i64 k, i64 r, float scale, int threads
) {
    const i64 width = round_up(r, LANES), pairs = (r + 1) / 2, blocks = k / LANES, each = width * k;
    const i64 packed_bytes = round_up(dx == nullptr ? 0 : k * pairs * sizeof(uint32_t), 64);
    char* memory = for_team.of(packed_bytes + (da == nullptr ? 0 : threads * each * sizeof(float)));
    uint32_t* packed = reinterpret_cast<uint32_t*>(memory);
    float* sums = reinterpret_cast<float*>(memory + packed_bytes);
#pragma omp parallel num_threads(threads)
    {
        if (dx != nullptr) {
            Share part(blocks, 1);
            for (i64 block = part.from; block < part.to; block++)
                for (i64 pair = 0; pair < pairs; pair++) pack_columns(a, k, r, block, pair, pairs, packed);
        }
        const i64 left_bytes = BLOCK / 2 * width * sizeof(uint32_t), padded_bytes = round_up(ROWS * 2 * pairs * sizeof(bf16), 64);
        char* own = for_one.of(left_bytes + padded_bytes);
        uint32_t* left = reinterpret_cast<uint32_t*>(own);
        bf16* padded = reinterpret_cast<bf16*>(own + left_bytes);
        float* sum = sums + omp_get_thread_num() * each;
        Share mine(m, BLOCK);
        if (da != nullptr && mine.from == mine.to) std::memset(sum, 0, each * sizeof(float));
#pragma omp barrier
        for (i64 t = mine.from; t < mine.to; t += BLOCK) {
            const i64 rows = std::min(BLOCK, m - t);
            const uint32_t* some_kept = kept == nullptr ? nullptr : kept + t * k / 32;
            if (da != nullptr) {
                pack_pairs(dh + t * r, r, rows, r, width, left);
                if (kept == nullptr) outer<false>(x + t * k, nullptr, rows, k, left, width, sum, t == mine.from);
                else outer<true>(x + t * k, some_kept, rows, k, left, width, sum, t == mine.from);
            }
            if (dx != nullptr)
                for (i64 i = 0; i < rows; i += ROWS) {
                    const i64 some = std::min(ROWS, rows - i);
                    pad(dh + (t + i) * r, r, some, r, padded, 2 * pairs);
                    add_product<false>(dx + (t + i) * k, k, some, padded, packed, pairs, scale, nullptr, kept == nullptr ? nullptr : some_kept + i * k / 32);
                }
        }
#pragma omp barrier
        Share part(k, LANES);
        for (i64 j = 0; da != nullptr && j < r; j++)
            for (i64 column = part.from; column < part.to; column += LANES)
                _mm512_storeu_ps(da + j * k + column, _mm512_mul_ps(total(sums + j * k + column, each), _mm512_set1_ps(scale)));
    }
}

// found (n) = |W + s B A| by row, or with a magnitude (n) the gain magnitude / |W + s B A|, and 1 where that norm is 0. squares (n) = |W|^2 by row.
void norm(
    const bf16* w, const float* squares, const float* a, const float* b, const float* magnitude, float* found, i64 n, i64 k, i64 r, float s, int threads
) {
    const i64 blocks = (r + LANES - 1) / LANES, pairs = k / 2, packed_bytes = blocks * LANES * k * sizeof(bf16);
    char* memory = for_team.of(packed_bytes + r * r * sizeof(float));
    uint32_t* packed = reinterpret_cast<uint32_t*>(memory);
    float* gram = reinterpret_cast<float*>(memory + packed_bytes);  // A A^T (r, r)
#pragma omp parallel num_threads(threads)
    {
        Share part(pairs, 8);
        for (i64 block = 0; block < blocks; block++) pack_rows(a, r, k, block, part.from, part.to, pairs, packed);
        const Share products(r * r, 1);
        for (i64 at = products.from; at < products.to; at++) {
            const i64 i = at / r, j = at % r;
            if (j > i) continue;
            __m512 sum = _mm512_setzero_ps(), other = sum;
            for (i64 column = 0; column < k; column += 2 * LANES) {
                const float *one = a + i * k + column, *two = a + j * k + column;
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(one), _mm512_loadu_ps(two), sum);
                other = _mm512_fmadd_ps(_mm512_loadu_ps(one + LANES), _mm512_loadu_ps(two + LANES), other);
            }
            gram[i * r + j] = gram[j * r + i] = _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
        }
#pragma omp barrier
        Share mine(n, ROWS);
        for (i64 row = mine.from; row < mine.to; row += ROWS) {
            __m512 sums[ROWS];
            for (i64 i = 0; i < ROWS; i++) sums[i] = _mm512_setzero_ps();
            into_lanes(w + row * k, k, packed, pairs, blocks, [&](i64 block, i64 i, __m512 cross) {
                const float* of_row = b + (row + i) * r;
                __mmask16 there = lanes(r - block * LANES);
                __m512 inner = _mm512_mul_ps(_mm512_set1_ps(2 * s), cross);
                for (i64 j = 0; j < r; j++)
                    inner = _mm512_fmadd_ps(_mm512_set1_ps(s * s * of_row[j]), _mm512_maskz_loadu_ps(there, gram + j * r + block * LANES), inner);
                sums[i] = _mm512_fmadd_ps(inner, _mm512_maskz_loadu_ps(there, of_row + block * LANES), sums[i]);
            });
            for (i64 i = row; i < row + ROWS; i++) {  // |W|^2 + 2 s <B, W A^T> + s^2 <B (A A^T), B>
                const float square = squares[i] + _mm512_reduce_add_ps(sums[i - row]), of_row = square < 0 ? 0 : std::sqrt(square);
                found[i] = magnitude == nullptr ? of_row : of_row == 0 ? 1 : magnitude[i] / of_row;
            }
        }
    }
}

// A number for the exact bits of `bytes` bytes. Every step is a bijection of what came before, so that a change of one word
// always shows; the rotation keeps changes of highest bits from cancelling each other.
uint64_t fingerprint(const char* data, i64 bytes) {
    const __m512i factor = _mm512_set1_epi64(0x9e3779b97f4a7c15);
    __m512i state[4];
    for (int i = 0; i < 4; i++) state[i] = _mm512_set_epi64(i, 8 + i, 16 + i, 24 + i, 32 + i, 40 + i, 48 + i, 56 + i);
    auto mix = [&](__m512i& to, __m512i words) { to = _mm512_mullo_epi64(_mm512_rol_epi64(_mm512_xor_si512(to, words), 29), factor); };
    i64 at = 0;
    for (; at + 256 <= bytes; at += 256)
        for (int i = 0; i < 4; i++) mix(state[i], _mm512_loadu_si512(data + at + 64 * i));
    for (int i = 0; at < bytes; at += 64, i++) {
        const i64 rest = std::min<i64>(64, bytes - at);
        mix(state[i], _mm512_maskz_loadu_epi8(rest == 64 ? ~0ull : (1ull << rest) - 1, data + at));
    }
    alignas(64) uint64_t words[8];
    uint64_t found = bytes;
    for (int i = 0; i < 4; i++) {
        _mm512_store_si512(words, state[i]);
        for (uint64_t word : words) {
            found = (found ^ word) * 0x9e3779b97f4a7c15;
            found ^= found >> 32;
        }
    }
    return found;
}
}
