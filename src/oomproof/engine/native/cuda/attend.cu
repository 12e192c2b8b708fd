// A decode step's attention in one launch: queries and keys are normalised and rotated, the new key
// and value stored, each row attends to its request's tokens, and the parts are put together.
// engine/native/operators.py is the specification (rotate_and_store, then attend of a decode step),
// engine/native/attend_cuda.py launches it and says what the macros are:
//   INPUT_BF16 (0: fp16), KV_E4M3 (0: keys and values are stored as the input's type), HEAD_DIM,
//   HEAD_TILES (8 query heads of a kv head each), WARPS, STAGES.
//
// A block takes part of one row's tokens for one kv head, and all query heads of it, so that keys
// and values are read once. Each warp goes through tiles of 16 tokens of its own, brought by
// cp.async through a ring of its own: warps meet only at the end. Scores and values are products of
// tensor cores with tokens, or a head's elements, as the 16 rows and 8 query heads as the columns.
// Blocks of a cluster (compute capability 9.0) put their parts together through shared memory;
// clusters of one row through global memory, where the last one to come adds in their order.
//
// What may be read before wait_for_previous_kernel(): the kernel in front of this one may still run
// then, and those before it too, as far as each let the next one start early; certain is only what
// was complete when the first kernel of this step began. That one is launched without the attribute
// of a dependent launch (the first of a graph is), so it begins when all work before the step has
// ended. Positions, slots and pages are copied, and weights and cosines made, before the step; the
// keys and values of earlier tokens were stored in earlier steps. All of that is read early. The
// step itself writes qkv, the new token's keys and values, partials, counters and out: they are
// touched after the wait only. A block without work ends without waiting; in every launch at least
// one block waits, so that this kernel's end implies the end of all before it.

#include "primitives.cuh"

struct Params {
    const uint8_t* qkv;      // [rows, (heads + 2 kv heads) x HEAD_DIM]
    uint8_t* keys;           // [pages, kv heads, 256, HEAD_DIM]
    uint8_t* values;         // likewise
    const float* rotary;     // [2, positions, HEAD_DIM / 2]
    const int* positions;    // [rows]
    const int* slots;        // [rows]
    const int* pages;        // [slots, num_pages]
    const uint32_t* q_norm;  // [HEAD_DIM], two in a word, or null
    const uint32_t* k_norm;  // likewise
    uint8_t* out;            // [rows, heads x HEAD_DIM]
    float* partials;         // [clusters in x, kv heads, group x HEAD_DIM / 4, 6]
    uint32_t* counters;      // [rows, kv heads, blocks of a cluster], all 0 between launches
    long long qkv_stride;    // elements of a row
    long long out_stride;    // likewise
    long long rotary_stride; // floats from the cosines to the sines
    int rows;
    int kv_heads;
    int group;               // query heads of a kv head
    int num_pages;           // of a slot
    int window;              // tokens that a row looks back at; 0 for all
    int block_tokens;        // a row gets another block of a cluster for so many
    int cluster_tokens;      // and another cluster for so many, at least
    int clusters;            // for a kv head that run side by side
    float scale;             // of the scores, times log2(e)
    float eps;               // of the norms
};

constexpr bool BF16 = INPUT_BF16;
constexpr bool E4M3 = KV_E4M3;
constexpr int PAGE = 256;
constexpr int TILE = 16;
constexpr int TILES_IN_PAGE = PAGE / TILE;
constexpr int THREADS = WARPS * 32;
constexpr int STEPS = HEAD_DIM / 16;
constexpr int HEADS = HEAD_TILES * 8;

constexpr int ROW_BYTES = HEAD_DIM * (E4M3 ? 1 : 2);
constexpr int CHUNKS = ROW_BYTES / 16;
constexpr int TILE_BYTES = TILE * ROW_BYTES;
constexpr int COPIES = TILE_BYTES / 512;

// A head's weighted values as they are put together: 4 floats of padding spread them over banks.
constexpr int SUM_STRIDE = HEAD_DIM + 4;
constexpr int SUM_BYTES = (HEADS * (SUM_STRIDE + 2) * 4 + 127) / 128 * 128;
constexpr int RING_BYTES = STAGES * TILE_BYTES;
constexpr int WARP_BYTES = RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES;
// Shared memory after the warps' parts; attend_cuda.py adds it up in the same way.
constexpr int QUERY_AT = WARPS * WARP_BYTES;
constexpr int NEW_AT = QUERY_AT + HEADS * HEAD_DIM * 2;
constexpr int TOTALS_AT = NEW_AT + 2 * ROW_BYTES;
constexpr int FLAG_AT = TOTALS_AT + HEADS * 8;

constexpr float LEAST = -1e30f;

// Pairs of columns that a lane rotates: items of 2 columns of each half of a head.
constexpr int ITEMS = (HEAD_DIM / 4 + 31) / 32;
constexpr int TASKS = (HEADS + 2 + WARPS - 1) / WARPS;
constexpr int LOADED_AT_ONCE = 8;
constexpr bool QUERIES_IN_REGISTERS = HEAD_DIM * HEAD_TILES <= 256;

// Of the four e4m3 values of a word the second and fourth, or the first and third, as the input's
// type: exact.
__device__ __forceinline__ uint32_t decode_e4m3(uint32_t word, bool odd) {
    // As bits of the wider format the exponent's bias is 127 or 15 instead of 7: the value is
    // 2^120 or 2^8 times too small.
    const uint32_t sign = (odd ? word : word << 8) & 0x80008000u;
    if constexpr (BF16)
        return multiply_pairs<true>(
            sign | ((odd ? word >> 4 : word << 4) & 0x07f007f0u), 0x7b807b80u);
    return multiply_pairs<false>(sign | ((odd ? word >> 1 : word << 7) & 0x3f803f80u), 0x5c005c00u);
}

// The nearest e4m3 value's bits, ties to even, the largest one where it is too large.
__device__ __forceinline__ uint32_t encode_e4m3(float x) {
    const uint32_t sign = (bits_of(x) >> 24) & 0x80u;
    if (x != x) return sign | 0x7fu;
    const float magnitude = fminf(fabsf(x), 448.0f);
    const uint32_t wide = bits_of(magnitude);
    // 20 of float32's 23 fraction bits are dropped, and the exponent's bias goes from 127 to 7.
    const uint32_t normal = ((wide + 0x7ffffu + ((wide >> 20) & 1u)) >> 20) - (120u << 3);
    // Below 2^-6 values are multiples of 2^-9: adding 2^14 leaves exactly these bits, rounded.
    const uint32_t small = bits_of(magnitude + 16384.0f) & 0xfu;
    return sign | (magnitude < 0.015625f ? small : normal);
}

struct Work {
    int row, slot, begin, end;
    int first_cluster, clusters;  // of the row
    int part, parts;              // this block among the row's
    int meeting;                  // blocks of this cluster with a part
    int share;                    // of the four values each that they add up: a block's
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

__device__ __forceinline__ int tokens_of(int end, int slot, int window) {
    if (slot < 0) return 0;
    return window > 0 && end > window ? window : end;
}

// Which part of which row a cluster has: rows get clusters by their tokens, one at least. Every
// warp computes it by itself, a lane a row. False where there is none left.
__device__ __forceinline__ bool find_work(const Params& p, Work& work) {
    const int lane = threadIdx.x & 31;
    const int cluster = blockIdx.x / cluster_size();
    int total = 0;
    for (int base = 0; base < p.rows; base += 32) {
        const int row = base + lane;
        if (row < p.rows) total += tokens_of(p.positions[row] + 1, p.slots[row], p.window);
    }
    total = warp_sum(total);
    const int share = max(p.cluster_tokens, ceil_div(total, p.clusters));
    int before = 0;
    for (int base = 0; base < p.rows; base += 32) {
        const int row = base + lane;
        int end = 0, slot = -1, count = 0;
        if (row < p.rows) {
            end = p.positions[row] + 1;
            slot = p.slots[row];
            // A quarter of a share more than whole ones is not worth another cluster.
            count = max(1, ceil_div(4 * tokens_of(end, slot, p.window) - share, 4 * share));
        }
        int upto = count;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, upto, step);
            if (lane >= step) upto += other;
        }
        const int first = before + upto - count;
        const uint32_t mine =
            __ballot_sync(~0u, cluster >= first && cluster < first + count);
        if (mine) {
            const int owner = __ffs(mine) - 1;
            work.row = base + owner;
            work.slot = __shfl_sync(~0u, slot, owner);
            work.end = __shfl_sync(~0u, end, owner);
            work.first_cluster = __shfl_sync(~0u, first, owner);
            work.clusters = __shfl_sync(~0u, count, owner);
            break;
        }
        before += __shfl_sync(~0u, upto, 31);
        if (base + 32 >= p.rows) return false;
    }
    const int size = cluster_size(), tokens = tokens_of(work.end, work.slot, p.window);
    work.begin = work.end - tokens;
    work.meeting =
        work.clusters > 1 ? size : min(size, max(1, ceil_div(tokens, p.block_tokens)));
    work.parts = work.clusters * work.meeting;
    work.share = ceil_div(p.group * (HEAD_DIM / 4), work.meeting);
    work.part = (cluster - work.first_cluster) * size + cluster_rank();
    return cluster_rank() < work.meeting;
}

// A 16-byte chunk of a token lies where its number, with these bits turned, says: the same chunk of
// eight tokens, which are read at once, is in all banks.
__device__ __forceinline__ constexpr int turn(int token) {
    return ROW_BYTES % 128 == 0  ? token & 7
           : ROW_BYTES % 64 == 0 ? (token >> 1) & 3
                                 : (token >> 2) & 1;
}

__device__ __forceinline__ int place(int token, int chunk) {
    return token * ROW_BYTES + (chunk ^ turn(token)) * 16;
}

// The tiles of a warp on their way: keys and values of one tile after the other.
struct Ring {
    uint8_t* shared;
    uint32_t at;            // in shared memory
    const uint8_t* keys;    // of this kv head in page 0
    const uint8_t* values;
    const int* pages;       // of the slot
    long long page_bytes;
    int num_pages;
    int begin, end;         // stored tokens that count
    uint32_t tile, last;    // what comes next
    uint32_t first_page;
    int page;               // lane l holds the number of page first_page + l
    bool is_value;
    uint32_t slot;

    __device__ __forceinline__ uint8_t* current() const { return shared + at + slot * TILE_BYTES; }

    __device__ __forceinline__ void look_up_pages(uint32_t first) {
        first_page = first;
        page = pages[(first + (threadIdx.x & 31)) % num_pages];
    }

    __device__ __forceinline__ void copy_next() {
        if (tile < last) {
            const uint32_t at_page = tile / TILES_IN_PAGE - first_page;
            if (at_page >= 32) look_up_pages(tile / TILES_IN_PAGE);
            const int number = __shfl_sync(~0u, page, at_page & 31);
            const int lane = threadIdx.x & 31;
            const uint8_t* source = (is_value ? values : keys) + number * page_bytes +
                                    tile % TILES_IN_PAGE * TILE_BYTES + lane * 16;
            const int target = at + slot * TILE_BYTES;
            const int first = place(lane / CHUNKS, lane % CHUNKS);
#pragma unroll
            for (int n = 0; n < COPIES; n++) {
                int token = (n * 32 + lane) / CHUNKS;
                int to = target + place(token, (n * 32 + lane) % CHUNKS);
                if constexpr ((CHUNKS & (CHUNKS - 1)) == 0) {
                    // The same, by one operation: tokens' bits do not meet, nor do `target` and
                    // what turns.
                    token = n * (32 / CHUNKS) + lane / CHUNKS;
                    to = ((target + first) ^ turn(n * (32 / CHUNKS)) * 16) + n * 512;
                }
                const uint32_t from_begin = tile * TILE + token - begin;
                copy_async(
                    shared + to, source + n * 512,
                    from_begin < static_cast<uint32_t>(end - begin) ? 16 : 0);
            }
            if (is_value) tile += WARPS;
            is_value = !is_value;
        }
        copy_commit();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
};

// Where a query head's element lies among the operands of the scores' products: 16-bit element
// 4 x (32 x (step x HEAD_TILES + tile) + lane) + 2 x register + half. Of e4m3 keys a lane has words
// of four elements, and of each the second and fourth together, the first and third.
__device__ __forceinline__ int query_place(int head, int dimension) {
    const int within = dimension % 16;
    const int lane = head % 8 * 4 + (E4M3 ? within / 4 : within % 8 / 2);
    const int part = E4M3 ? (1 - within % 2) * 2 + within % 4 / 2 : within / 8 * 2 + within % 2;
    return ((dimension / 16 * HEAD_TILES + head / 8) * 32 + lane) * 4 + part;
}

// The dimension of row `half` x 8 + lane / 4 of a tile of weighted values.
__device__ __forceinline__ int value_dimension(int step, int half) {
    const int row = (threadIdx.x & 31) >> 2;
    return step * 16 + (E4M3 ? row * 2 + 1 - half : half * 8 + row);
}

// What a lane needs to rotate and can have before the queries are there.
struct Prepared {
    float2 cosine[ITEMS], sine[ITEMS];
    uint32_t weights[2][2][ITEMS];  // of keys and of queries, of either half
    long long new_row;              // bytes from a pool's begin to the new token's place in it

    __device__ __forceinline__ void load(const Params& p, const Work& work) {
        const int position = work.end - 1;
        new_row = p.pages[(long long)work.slot * p.num_pages + position / PAGE % p.num_pages];
        new_row = ((new_row * p.kv_heads + blockIdx.y) * PAGE + position % PAGE) * ROW_BYTES;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            const int item = min((threadIdx.x & 31) + 32 * k, HEAD_DIM / 4 - 1);
            const float* at = p.rotary + (long long)position * (HEAD_DIM / 2) + item * 2;
            cosine[k] = *reinterpret_cast<const float2*>(at);
            sine[k] = *reinterpret_cast<const float2*>(at + p.rotary_stride);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int word = item + half * (HEAD_DIM / 4);
                if (p.k_norm) weights[0][half][k] = p.k_norm[word];
                if (p.q_norm) weights[1][half][k] = p.q_norm[word];
            }
        }
    }
};

__device__ __forceinline__ void store_new(
    uint8_t* shared, uint8_t* pool, int dimension, float low, float high) {
    if (E4M3) {
        const uint16_t word = encode_e4m3(low) | encode_e4m3(high) << 8;
        *reinterpret_cast<uint16_t*>(shared + dimension) = word;
        *reinterpret_cast<uint16_t*>(pool + dimension) = word;
    } else {
        const uint32_t word = pack<BF16>(low, high);
        *reinterpret_cast<uint32_t*>(shared + dimension * 2) = word;
        *reinterpret_cast<uint32_t*>(pool + dimension * 2) = word;
    }
}

// A head of queries or keys as it came, normalised where it has to be, and rotated, in float32.
__device__ __forceinline__ void rotate(
    const uint32_t (&low)[ITEMS], const uint32_t (&high)[ITEMS], bool normed, bool is_query,
    float eps, const Prepared& prepared, float2 (&left)[ITEMS], float2 (&right)[ITEMS]) {
    float squares = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        left[k] = unpack<BF16>(low[k]);
        right[k] = unpack<BF16>(high[k]);
        squares += left[k].x * left[k].x + left[k].y * left[k].y;
        squares += right[k].x * right[k].x + right[k].y * right[k].y;
    }
    if (normed) {
        const float shrink = 1.0f / sqrtf(warp_sum(squares) / HEAD_DIM + eps);
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            // Rounded before it is multiplied with the weight and after, as the reference is.
            const float2 a = unpack<BF16>(pack<BF16>(left[k].x * shrink, left[k].y * shrink));
            const float2 b = unpack<BF16>(pack<BF16>(right[k].x * shrink, right[k].y * shrink));
            const float2 v = unpack<BF16>(
                is_query ? prepared.weights[1][0][k] : prepared.weights[0][0][k]);
            const float2 w = unpack<BF16>(
                is_query ? prepared.weights[1][1][k] : prepared.weights[0][1][k]);
            left[k] = unpack<BF16>(pack<BF16>(a.x * v.x, a.y * v.y));
            right[k] = unpack<BF16>(pack<BF16>(b.x * w.x, b.y * w.y));
        }
    }
#pragma unroll
    for (int k = 0; k < ITEMS; k++) {
        const float2 a = left[k], b = right[k], c = prepared.cosine[k], s = prepared.sine[k];
        // Products are rounded before they are added: no fused multiply-add.
        left[k].x = __fsub_rn(__fmul_rn(a.x, c.x), __fmul_rn(b.x, s.x));
        left[k].y = __fsub_rn(__fmul_rn(a.y, c.y), __fmul_rn(b.y, s.y));
        right[k].x = __fadd_rn(__fmul_rn(b.x, c.x), __fmul_rn(a.x, s.x));
        right[k].y = __fadd_rn(__fmul_rn(b.y, c.y), __fmul_rn(a.y, s.y));
    }
}

// A warp a head: the block's queries go to shared memory as operands; in the block that has the
// row's last token, its key and value go there and into their page.
__device__ __forceinline__ void take_new_token(
    const Params& p, const Work& work, const Prepared& prepared, uint8_t* shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, kv_head = blockIdx.y;
    const int heads = p.group * p.kv_heads;
    const int first = work.part == work.parts - 1 ? 0 : 2;
    const uint8_t* row = p.qkv + work.row * p.qkv_stride * 2;
    uint32_t low[TASKS][ITEMS], high[TASKS][ITEMS];
#pragma unroll
    for (int n = 0; n < TASKS; n++) {
        // 0 is the key, 1 the value, then come the queries.
        const int task = first + warp + n * WARPS;
        const int head = task == 0   ? heads + kv_head
                         : task == 1 ? heads + p.kv_heads + kv_head
                                     : kv_head * p.group + task - 2;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            const int item = lane + 32 * k;
            low[n][k] = high[n][k] = 0;
            if (task < p.group + 2 && item < HEAD_DIM / 4) {
                const uint8_t* source = row + (head * HEAD_DIM + item * 2) * 2;
                low[n][k] = load_fresh(source);
                high[n][k] = load_fresh(source + HEAD_DIM);
            }
        }
    }
    uint16_t* queries = reinterpret_cast<uint16_t*>(shared + QUERY_AT);
#pragma unroll
    for (int n = 0; n < TASKS; n++) {
        const int task = first + warp + n * WARPS;
        if (task >= p.group + 2) break;
        float2 left[ITEMS], right[ITEMS];
        if (task == 1) {
#pragma unroll
            for (int k = 0; k < ITEMS; k++) {
                left[k] = unpack<BF16>(low[n][k]);
                right[k] = unpack<BF16>(high[n][k]);
            }
        } else {
            const bool normed = (task == 0 ? p.k_norm : p.q_norm) != nullptr;
            rotate(low[n], high[n], normed, task > 0, p.eps, prepared, left, right);
        }
        uint8_t* pool = (task == 0 ? p.keys : p.values) + prepared.new_row;
#pragma unroll
        for (int k = 0; k < ITEMS; k++) {
            const int dimension = (lane + 32 * k) * 2;
            if (dimension >= HEAD_DIM / 2) break;
            if (task < 2) {
                uint8_t* kept = shared + NEW_AT + task * ROW_BYTES;
                store_new(kept, pool, dimension, left[k].x, left[k].y);
                store_new(kept, pool, dimension + HEAD_DIM / 2, right[k].x, right[k].y);
            } else {
                const uint32_t a = pack<BF16>(left[k].x, left[k].y);
                const uint32_t b = pack<BF16>(right[k].x, right[k].y);
                const int far = dimension + HEAD_DIM / 2;
                queries[query_place(task - 2, dimension)] = a;
                queries[query_place(task - 2, dimension + 1)] = a >> 16;
                queries[query_place(task - 2, far)] = b;
                queries[query_place(task - 2, far + 1)] = b >> 16;
            }
        }
    }
}

// A row's softmax so far, of a warp's tokens, and the values that it weighs.
struct Sums {
    float largest[HEAD_TILES][2];  // of columns 2 (lane % 4) + {0, 1}
    float total[HEAD_TILES][2];    // of this lane's tokens only
    float weighted[STEPS][HEAD_TILES][4];
};

// The block's queries, as operands. Columns beyond the group hold whatever lies there: a column's
// scores and sums depend on itself alone, and nobody looks at those.
struct Queries {
    const uint2* words;
    uint32_t kept[QUERIES_IN_REGISTERS ? STEPS : 1][HEAD_TILES][2];

    __device__ __forceinline__ void get(int step, int tile, uint32_t (&b)[2]) const {
        const uint2 pair = words[(step * HEAD_TILES + tile) * 32 + (threadIdx.x & 31)];
        b[0] = pair.x;
        b[1] = pair.y;
    }
    __device__ __forceinline__ explicit Queries(const uint8_t* shared)
        : words(reinterpret_cast<const uint2*>(shared + QUERY_AT)) {
        if constexpr (QUERIES_IN_REGISTERS) {
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int t = 0; t < HEAD_TILES; t++) get(step, t, kept[step][t]);
        }
    }
    __device__ __forceinline__ void multiply_add_to(
        float (&sums)[HEAD_TILES][4], const uint32_t (&a)[4], int step) const {
#pragma unroll
        for (int t = 0; t < HEAD_TILES; t++) {
            if constexpr (QUERIES_IN_REGISTERS) {
                multiply_add<BF16>(sums[t], a, kept[step][t]);
            } else {
                uint32_t b[2];
                get(step, t, b);
                multiply_add<BF16>(sums[t], a, b);
            }
        }
    }
};

// Scores [16 tokens, heads] of a tile of keys.
__device__ __forceinline__ void score(
    const uint8_t* tile, const Queries& queries, float (&scores)[HEAD_TILES][4]) {
    const int lane = threadIdx.x & 31;
    // Two chains of products: a step need not wait for the one before.
    float chain[2][HEAD_TILES][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
        // Of 16 tokens a chunk, and the next one.
        uint32_t m[4];
        load_matrices(m, tile + place(lane & 15, chunk + (lane >> 4)));
        if constexpr (E4M3) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const uint32_t a[4] = {
                    decode_e4m3(m[2 * n], true), decode_e4m3(m[2 * n + 1], true),
                    decode_e4m3(m[2 * n], false), decode_e4m3(m[2 * n + 1], false)};
                queries.multiply_add_to(chain[n], a, chunk + n);
            }
        } else {
            queries.multiply_add_to(chain[chunk / 2 & 1], m, chunk / 2);
        }
    }
#pragma unroll
    for (int t = 0; t < HEAD_TILES; t++)
#pragma unroll
        for (int c = 0; c < 4; c++) scores[t][c] = chain[0][t][c] + chain[1][t][c];
}

// The tile's share of the softmax: its weights, as operands of the values' products.
__device__ __forceinline__ void weigh(
    float (&scores)[HEAD_TILES][4], int first_token, int begin, int end, float scale, Sums& sums,
    uint32_t (&weights)[HEAD_TILES][2]) {
    const int token = first_token + ((threadIdx.x & 31) >> 2);
    const bool seen[2] = {
        token >= begin && token < end, token + 8 >= begin && token + 8 < end};
    float shrink[HEAD_TILES][2];
    bool grew = false;
#pragma unroll
    for (int t = 0; t < HEAD_TILES; t++) {
#pragma unroll
        for (int c = 0; c < 4; c++)
            scores[t][c] = seen[c >> 1] ? scores[t][c] * scale : float_of(0xff800000u);
#pragma unroll
        for (int column = 0; column < 2; column++) {
            float largest = fmaxf(scores[t][column], scores[t][column + 2]);
#pragma unroll
            for (int step = 4; step < 32; step *= 2)
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
            largest = fmaxf(largest, sums.largest[t][column]);
            grew = grew || largest > sums.largest[t][column];
            shrink[t][column] = exp2_fast(sums.largest[t][column] - largest);
            sums.largest[t][column] = largest;
            scores[t][column] = exp2_fast(scores[t][column] - largest);
            scores[t][column + 2] = exp2_fast(scores[t][column + 2] - largest);
            sums.total[t][column] = sums.total[t][column] * shrink[t][column] +
                                    scores[t][column] + scores[t][column + 2];
        }
        weights[t][0] = transpose(pack<BF16>(scores[t][0], scores[t][1]));
        weights[t][1] = transpose(pack<BF16>(scores[t][2], scores[t][3]));
    }
    // After a few tiles the largest score hardly changes.
    if (__any_sync(~0u, grew)) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int t = 0; t < HEAD_TILES; t++)
#pragma unroll
                for (int c = 0; c < 4; c++) sums.weighted[step][t][c] *= shrink[t][c & 1];
    }
}

// Adds a tile of values, each times its weight.
__device__ __forceinline__ void add_values(
    const uint8_t* tile, const uint32_t (&weights)[HEAD_TILES][2], Sums& sums) {
    const int lane = threadIdx.x & 31;
    const int token = (lane >> 4) * 8 + (lane & 7), second = (lane >> 3) & 1;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
        uint32_t m[4];
        load_transposed(m, tile + place(token, chunk + second));
        if constexpr (E4M3) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const uint32_t a[4] = {
                    decode_e4m3(m[n], true), decode_e4m3(m[n], false),
                    decode_e4m3(m[n + 2], true), decode_e4m3(m[n + 2], false)};
#pragma unroll
                for (int t = 0; t < HEAD_TILES; t++)
                    multiply_add<BF16>(sums.weighted[chunk + n][t], a, weights[t]);
            }
        } else {
#pragma unroll
            for (int t = 0; t < HEAD_TILES; t++)
                multiply_add<BF16>(sums.weighted[chunk / 2][t], m, weights[t]);
        }
    }
}

// Puts the new token where it belongs in a tile that came without it.
__device__ __forceinline__ void put_new(uint8_t* tile, const uint8_t* kept, int token) {
    const int lane = threadIdx.x & 31;
    if (lane < CHUNKS)
        *reinterpret_cast<uint4*>(tile + place(token, lane)) =
            reinterpret_cast<const uint4*>(kept)[lane];
    __syncwarp();
}

// What a warp has, to its part of shared memory: [head, SUM_STRIDE], then (largest, total) a head.
__device__ __forceinline__ void leave_sums(float* target, const Sums& sums) {
    const int lane = threadIdx.x & 31;
    float* softmax = target + HEADS * SUM_STRIDE;
#pragma unroll
    for (int t = 0; t < HEAD_TILES; t++)
#pragma unroll
        for (int column = 0; column < 2; column++) {
            const int head = t * 8 + (lane & 3) * 2 + column;
            float total = sums.total[t][column];
#pragma unroll
            for (int step = 4; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
            if (lane < 4) {
                softmax[head * 2] = sums.largest[t][column];
                softmax[head * 2 + 1] = total;
            }
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                float* at = target + head * SUM_STRIDE;
                at[value_dimension(step, 0)] = sums.weighted[step][t][column];
                at[value_dimension(step, 1)] = sums.weighted[step][t][column + 2];
            }
        }
}

// Four weighted values of a head with their softmax.
struct Part {
    float4 sum;
    float largest, total;
};

// Adds `count` parts, that `load` gives by number, always in the same order; their loads need not
// wait for each other.
template <class Load>
__device__ __forceinline__ Part add_parts(int count, Load load) {
    Part sum = {make_float4(0, 0, 0, 0), LEAST, 0.0f};
    for (int base = 0; base < count; base += LOADED_AT_ONCE) {
        Part part[LOADED_AT_ONCE];
        float top = sum.largest;
#pragma unroll
        for (int n = 0; n < LOADED_AT_ONCE; n++) {
            part[n] = {make_float4(0, 0, 0, 0), LEAST, 0.0f};
            if (base + n < count) part[n] = load(base + n);
        }
#pragma unroll
        for (int n = 0; n < LOADED_AT_ONCE; n++) top = fmaxf(top, part[n].largest);
        const float shrink = exp2_fast(sum.largest - top);
        sum = {make_float4(sum.sum.x * shrink, sum.sum.y * shrink, sum.sum.z * shrink,
                           sum.sum.w * shrink),
               top, sum.total * shrink};
#pragma unroll
        for (int n = 0; n < LOADED_AT_ONCE; n++) {
            const float factor = exp2_fast(part[n].largest - top);
            sum.sum.x += part[n].sum.x * factor;
            sum.sum.y += part[n].sum.y * factor;
            sum.sum.z += part[n].sum.z * factor;
            sum.sum.w += part[n].sum.w * factor;
            sum.total += part[n].total * factor;
        }
    }
    return sum;
}

__device__ __forceinline__ void write_out(
    const Params& p, const Work& work, int item, const float4& sum, float factor) {
    const int head = blockIdx.y * p.group + item / (HEAD_DIM / 4);
    const uint2 words = {
        pack<BF16>(sum.x * factor, sum.y * factor), pack<BF16>(sum.z * factor, sum.w * factor)};
    const long long at =
        work.row * p.out_stride + head * HEAD_DIM + item % (HEAD_DIM / 4) * 4;
    *reinterpret_cast<uint2*>(p.out + at * 2) = words;
}

// One of the places where a block's four values of a head lie: global memory, [kv head, 6 x items].
struct Partial {
    float* sums;
    float* softmax;

    __device__ __forceinline__ Partial(const Params& p, int cluster, int item) {
        const int items = p.group * (HEAD_DIM / 4);
        float* first = p.partials + ((long long)cluster * p.kv_heads + blockIdx.y) * items * 6;
        sums = first + item * 4;
        softmax = first + items * 4 + item * 2;
    }
    __device__ __forceinline__ void store(const Part& part) {
        *reinterpret_cast<float4*>(sums) = part.sum;
        *reinterpret_cast<float2*>(softmax) = make_float2(part.largest, part.total);
    }
    __device__ __forceinline__ Part load() const {
        const float2 pair = load_fresh2(softmax);
        return {load_fresh4(sums), pair.x, pair.y};
    }
};

// What the row's only cluster has goes out, that of others where the last one finds it.
__device__ __forceinline__ void hand_on(
    const Params& p, const Work& work, int item, const Part& part) {
    if (work.clusters == 1)
        write_out(p, work, item, part.sum, 1.0f / part.total);
    else
        Partial(p, work.first_cluster + work.part / work.meeting, item).store(part);
}

// The block's warps, then the cluster's blocks, then the row's clusters.
__device__ __forceinline__ void put_together(
    const Params& p, const Work& work, uint8_t* shared, int warps) {
    const int thread = threadIdx.x, items = p.group * (HEAD_DIM / 4);
    float* sums = reinterpret_cast<float*>(shared);
    float* totals = reinterpret_cast<float*>(shared + TOTALS_AT);
    const bool meets = work.meeting > 1;
    for (int item = thread; item < items; item += THREADS) {
        const int head = item / (HEAD_DIM / 4);
        const int at = head * SUM_STRIDE + item % (HEAD_DIM / 4) * 4;
        const Part part = add_parts(warps, [&](int warp) -> Part {
            const float* from = sums + warp * (WARP_BYTES / 4);
            const float2 softmax =
                *reinterpret_cast<const float2*>(from + HEADS * SUM_STRIDE + head * 2);
            return {*reinterpret_cast<const float4*>(from + at), softmax.x, softmax.y};
        });
        if (!meets) {
            hand_on(p, work, item, part);
            continue;
        }
        // No other thread reads this place of the first warp's.
        *reinterpret_cast<float4*>(sums + at) = part.sum;
        if (item % (HEAD_DIM / 4) == 0)
            *reinterpret_cast<float2*>(totals + head * 2) = make_float2(part.largest, part.total);
    }
    // Each block of the cluster adds up a share of the row's values.
    const int rank = meets ? cluster_rank() : 0;
    const int begin = rank * work.share + thread, end = min(items, (rank + 1) * work.share);
    if (meets) {
        __syncwarp();
        cluster_arrive();
        cluster_wait();
        for (int item = begin; item < end; item += THREADS) {
            const int head = item / (HEAD_DIM / 4);
            const int at = head * SUM_STRIDE + item % (HEAD_DIM / 4) * 4;
            hand_on(p, work, item, add_parts(work.meeting, [&](int other) -> Part {
                const float2 softmax = load_peer2(totals + head * 2, other);
                return {load_peer4(sums + at, other), softmax.x, softmax.y};
            }));
        }
        __syncwarp();
        cluster_arrive_relaxed();
    }
    if (work.clusters > 1) {
        uint32_t* is_last = reinterpret_cast<uint32_t*>(shared + FLAG_AT);
        __syncthreads();
        if (thread == 0) {
            const long long head = (long long)work.row * p.kv_heads + blockIdx.y;
            uint32_t* counter = p.counters + head * cluster_size() + rank;
            fence();
            const uint32_t came = fetch_add(counter, 1);
            fence();
            *is_last = came == static_cast<uint32_t>(work.clusters - 1);
            if (*is_last) *counter = 0;
        }
        __syncthreads();
        for (int item = begin; *is_last && item < end; item += THREADS) {
            const Part part = add_parts(work.clusters, [&](int n) -> Part {
                return Partial(p, work.first_cluster + n, item).load();
            });
            write_out(p, work, item, part.sum, 1.0f / part.total);
        }
    }
    // A block's shared memory stays until the others have read it.
    if (meets) {
        __syncwarp();
        cluster_wait();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attend(const __grid_constant__ Params p) {
    let_next_kernel_start();
    uint8_t* shared = shared_memory();
    const int thread = threadIdx.x, warp = thread / 32;
    const int kv_head = blockIdx.y;
    Work work;
    if (!find_work(p, work)) return;
    if (work.slot < 0) {
        wait_for_previous_kernel();
        for (int item = thread; item < p.group * (HEAD_DIM / 4); item += THREADS)
            write_out(p, work, item, make_float4(0, 0, 0, 0), 0.0f);
        return;
    }

    const int first_tile = work.begin / TILE, tiles = ceil_div(work.end, TILE) - first_tile;
    const int first = first_tile + static_cast<int>((long long)tiles * work.part / work.parts);
    const int last = first_tile + static_cast<int>((long long)tiles * (work.part + 1) / work.parts);
    const bool has_new = work.part == work.parts - 1;
    Ring ring;
    ring.shared = shared;
    ring.at = warp * WARP_BYTES;
    ring.page_bytes = (long long)p.kv_heads * PAGE * ROW_BYTES;
    ring.keys = p.keys + (long long)kv_head * PAGE * ROW_BYTES;
    ring.values = p.values + (long long)kv_head * PAGE * ROW_BYTES;
    ring.pages = p.pages + (long long)work.slot * p.num_pages;
    ring.num_pages = p.num_pages;
    ring.begin = work.begin;
    ring.end = work.end - 1;
    ring.tile = first + warp;
    ring.last = last;
    ring.is_value = false;
    ring.slot = 0;
    ring.look_up_pages(first / TILES_IN_PAGE);
#pragma unroll
    for (int n = 0; n < STAGES; n++) ring.copy_next();

    Prepared prepared;
    prepared.load(p, work);
    wait_for_previous_kernel();
    take_new_token(p, work, prepared, shared);
    __syncthreads();

    Sums sums = {};
#pragma unroll
    for (int t = 0; t < HEAD_TILES; t++) sums.largest[t][0] = sums.largest[t][1] = LEAST;
    const Queries queries(shared);

    const uint8_t* kept = shared + NEW_AT;
    for (int tile = first + warp; tile < last; tile += WARPS) {
        const bool is_last = has_new && tile == last - 1;
        const int token = (work.end - 1) % TILE;
        float scores[HEAD_TILES][4];
        uint32_t weights[HEAD_TILES][2];

        copy_wait<STAGES - 1>();
        __syncwarp();
        uint8_t* keys = ring.current();
        if (is_last) put_new(keys, kept, token);
        score(keys, queries, scores);
        __syncwarp();
        ring.copy_next();
        weigh(scores, tile * TILE, work.begin, work.end, p.scale, sums, weights);

        copy_wait<STAGES - 1>();
        __syncwarp();
        uint8_t* values = ring.current();
        if (is_last) put_new(values, kept + ROW_BYTES, token);
        add_values(values, weights, sums);
        __syncwarp();
        ring.copy_next();
    }
    leave_sums(reinterpret_cast<float*>(shared + ring.at), sums);
    __syncthreads();
    put_together(p, work, shared, min(WARPS, last - first));
}
