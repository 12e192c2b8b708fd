// kernels/cuda/primitives.cuh on a CPU, so that a kernel's text compiles as C++ and runs without a
// GPU: every thread of a cluster is a fiber, and warps, blocks and clusters wait for each other as
// they do on a GPU. Included by the compiler's command line, before the kernel.
//
// A seed shuffles the order in which threads run. A copy in the background is made at once, or (of
// odd seeds) when its thread waits for it: what is read too early comes out as wrong values, and
// what is overwritten too early, too.
#define OOMPROOF_PRIMITIVES

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index {
    int x, y, z;
};

namespace emulated {

constexpr int STACK_BYTES = 256 << 10;

struct Meeting {
    int expected = 0, came = 0, round = 0;
};
struct Copy {
    void* target;
    const void* source;
    uint32_t bytes;
};
struct Warp {
    Meeting meeting;
    char given[2][32][64];
};
struct Block {
    Index index;
    uint32_t rank;
    std::unique_ptr<uint8_t[]> raw;
    uint8_t* shared;
    Meeting meeting;
    std::vector<Warp> warps;
};
struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index index;
    Block* block;
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open;
    int cluster_round = 0;
    bool done = false;
};
struct Cluster {
    std::vector<Block> blocks;
    std::vector<Thread> threads;
    Meeting meeting;
};

inline ucontext_t scheduler;
inline Thread* current;
inline Cluster* cluster;
inline Index block_count, thread_count;
inline bool late_copies;
inline std::mt19937 chooser;
inline void (*body)();

inline void give_way() { swapcontext(&current->context, &scheduler); }

inline void meet(Meeting& meeting) {
    const int round = meeting.round;
    if (++meeting.came == meeting.expected) {
        meeting.came = 0;
        meeting.round++;
    } else {
        while (meeting.round == round) give_way();
    }
}

inline Warp& warp() { return current->block->warps[current->index.x / 32]; }
inline int lane() { return current->index.x % 32; }

// What every lane of the warp gives.
template <class T>
struct Given {
    std::array<T, 32> all;

    explicit Given(const T& mine) {
        static_assert(sizeof(T) <= 64);
        Warp& here = warp();
        // A lane may be one meeting ahead, but not two.
        auto& given = here.given[here.meeting.round % 2];
        std::memcpy(given[lane()], &mine, sizeof(T));
        meet(here.meeting);
        for (int n = 0; n < 32; n++) std::memcpy(&all[n], given[n], sizeof(T));
    }
    const T& operator[](int n) const { return all[n]; }
};

inline void make(const Copy& copy) {
    std::memset(copy.target, 0, 16);
    if (copy.bytes) std::memcpy(copy.target, copy.source, copy.bytes);
}

inline void start() {
    body();
    // Those that have ended are not waited for.
    Meeting& meeting = cluster->meeting;
    meeting.expected--;
    if (meeting.expected && meeting.came == meeting.expected) {
        meeting.came = 0;
        meeting.round++;
    }
    current->done = true;
    give_way();
}

// Runs a grid, cluster by cluster; in y and z all blocks are clusters of their own.
inline void run(
    void (*kernel)(), Index grid, int threads, int blocks_in_cluster, size_t shared_bytes,
    uint32_t seed) {
    body = kernel;
    block_count = grid;
    thread_count = {threads, 1, 1};
    chooser.seed(seed);
    late_copies = seed % 2;
    std::vector<Index> starts;
    for (int z = 0; z < grid.z; z++)
        for (int y = 0; y < grid.y; y++)
            for (int x = 0; x < grid.x; x += blocks_in_cluster) starts.push_back({x, y, z});
    std::shuffle(starts.begin(), starts.end(), chooser);
    Cluster here;
    cluster = &here;
    here.threads.resize(threads * blocks_in_cluster);
    for (auto& thread : here.threads) thread.stack.reset(new char[STACK_BYTES]);
    for (const Index& first : starts) {
        here.blocks.clear();
        here.blocks.resize(blocks_in_cluster);
        here.meeting = {threads * blocks_in_cluster, 0, 0};
        for (int n = 0; n < blocks_in_cluster; n++) {
            Block& block = here.blocks[n];
            block.index = {first.x + n, first.y, first.z};
            block.rank = n;
            block.raw.reset(new uint8_t[shared_bytes + 256]);
            const auto address = reinterpret_cast<uintptr_t>(block.raw.get());
            block.shared = block.raw.get() + (128 - address % 128);
            // What nobody has written is not a number.
            std::memset(block.raw.get(), 0xff, shared_bytes + 256);
            block.meeting.expected = threads;
            block.warps.resize(threads / 32);
            for (auto& each : block.warps) each.meeting.expected = 32;
        }
        std::vector<Thread*> waiting;
        for (int n = 0; n < threads * blocks_in_cluster; n++) {
            Thread& thread = here.threads[n];
            thread.index = {n % threads, 0, 0};
            thread.block = &here.blocks[n / threads];
            thread.done = false;
            thread.groups.clear();
            thread.open.clear();
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.get();
            thread.context.uc_stack.ss_size = STACK_BYTES;
            thread.context.uc_link = nullptr;
            makecontext(&thread.context, start, 0);
            waiting.push_back(&thread);
        }
        while (!waiting.empty()) {
            std::shuffle(waiting.begin(), waiting.end(), chooser);
            for (Thread* thread : waiting) {
                current = thread;
                swapcontext(&scheduler, &thread->context);
            }
            waiting.erase(
                std::remove_if(
                    waiting.begin(), waiting.end(), [](Thread* thread) { return thread->done; }),
                waiting.end());
        }
        for (Block& block : here.blocks)
            for (size_t n = shared_bytes; n < shared_bytes + 128; n++)
                if (block.shared[n] != 0xff) {
                    std::fprintf(stderr, "written beyond shared memory\n");
                    std::abort();
                }
    }
}

}  // namespace emulated

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::current->block->index)
#define blockDim (emulated::thread_count)
#define gridDim (emulated::block_count)

inline uint8_t* shared_memory() { return emulated::current->block->shared; }
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

template <class T>
T load_as(const void* source) {
    assert(reinterpret_cast<uintptr_t>(source) % alignof(T) == 0);
    T value;
    std::memcpy(&value, source, sizeof(T));
    return value;
}
inline uint32_t load_fresh(const void* source) { return load_as<uint32_t>(source); }
inline float4 load_fresh4(const float* source) { return load_as<float4>(source); }
inline float2 load_fresh2(const float* source) { return load_as<float2>(source); }

inline void copy_async(void* target, const void* source, uint32_t bytes) {
    assert(reinterpret_cast<uintptr_t>(target) % 16 == 0);
    assert(reinterpret_cast<uintptr_t>(source) % 16 == 0);
    const emulated::Copy copy{target, source, bytes};
    if (emulated::late_copies)
        emulated::current->open.push_back(copy);
    else
        emulated::make(copy);
}
inline void copy_commit() {
    emulated::current->groups.push_back(std::move(emulated::current->open));
    emulated::current->open.clear();
}
template <int groups>
void copy_wait() {
    auto& waiting = emulated::current->groups;
    while (waiting.size() > groups) {
        for (const auto& copy : waiting.front()) emulated::make(copy);
        waiting.pop_front();
    }
}

inline void fence() {}
inline uint32_t fetch_add(uint32_t* counter, uint32_t amount) {
    const uint32_t before = *counter;
    *counter += amount;
    return before;
}
inline void __syncwarp() { emulated::meet(emulated::warp().meeting); }
inline void __syncthreads() { emulated::meet(emulated::current->block->meeting); }

inline uint32_t cluster_size() { return emulated::cluster->blocks.size(); }
inline uint32_t cluster_rank() { return emulated::current->block->rank; }
inline void cluster_arrive() {
    auto& meeting = emulated::cluster->meeting;
    emulated::current->cluster_round = meeting.round;
    if (++meeting.came == meeting.expected) {
        meeting.came = 0;
        meeting.round++;
    }
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
    while (emulated::cluster->meeting.round == emulated::current->cluster_round)
        emulated::give_way();
}
inline const float* peer(const float* mine, uint32_t rank) {
    const auto offset =
        reinterpret_cast<const uint8_t*>(mine) - emulated::current->block->shared;
    return reinterpret_cast<const float*>(emulated::cluster->blocks[rank].shared + offset);
}
inline float4 load_peer4(const float* mine, uint32_t rank) {
    return load_as<float4>(peer(mine, rank));
}
inline float2 load_peer2(const float* mine, uint32_t rank) {
    return load_as<float2>(peer(mine, rank));
}

template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
    return emulated::Given<T>(value)[lane & 31];
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
    return emulated::Given<T>(value)[emulated::lane() ^ mask];
}
template <class T>
T __shfl_up_sync(uint32_t, T value, int delta) {
    const int lane = emulated::lane();
    return emulated::Given<T>(value)[lane >= delta ? lane - delta : lane];
}
inline uint32_t __ballot_sync(uint32_t, bool value) {
    const emulated::Given<bool> all(value);
    uint32_t found = 0;
    for (int n = 0; n < 32; n++) found |= static_cast<uint32_t>(all[n]) << n;
    return found;
}
inline bool __any_sync(uint32_t mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __ffs(uint32_t word) { return __builtin_ffs(static_cast<int>(word)); }

inline uint16_t half_of(uint32_t word, int half) { return word >> (16 * half); }

inline void load_rows(uint32_t (&m)[4], const void* row, bool transposed) {
    assert(reinterpret_cast<uintptr_t>(row) % 16 == 0);
    struct Row {
        uint16_t element[8];
    };
    const emulated::Given<const void*> rows(row);
    const int lane = emulated::lane(), down = lane / 4, across = lane % 4 * 2;
    for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t pair[2];
        for (int n = 0; n < 2; n++) {
            const int r = transposed ? across + n : down, c = transposed ? down : across + n;
            pair[n] = static_cast<const Row*>(rows[matrix * 8 + r])->element[c];
        }
        m[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    __syncwarp();
}
inline void load_matrices(uint32_t (&m)[4], const void* row) { load_rows(m, row, false); }
inline void load_transposed(uint32_t (&m)[4], const void* row) { load_rows(m, row, true); }
inline uint32_t transpose(uint32_t matrix) {
    const emulated::Given<uint32_t> all(matrix);
    const int lane = emulated::lane(), down = lane / 4, across = lane % 4 * 2;
    uint32_t word = 0;
    for (int n = 0; n < 2; n++) {
        const int r = across + n, c = down;
        word |= static_cast<uint32_t>(half_of(all[r * 4 + c / 2], c % 2)) << (16 * n);
    }
    return word;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float half_float(uint16_t bits, bool bf16) {
    if (bf16) return float_of(static_cast<uint32_t>(bits) << 16);
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return static_cast<float>(x);
}
inline uint16_t half_bits(float x, bool bf16) {
    if (bf16) {
        if (x != x) return 0x7fff;
        const uint32_t bits = bits_of(x);
        return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }
    const _Float16 rounded = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
}

template <bool bf16>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Operands {
        float a[2][2][2], b[2][2];  // of a: half of rows, half of columns, which of two
    };
    Operands mine;
    for (int n = 0; n < 8; n++)
        mine.a[n / 2 % 2][n / 4][n % 2] = half_float(half_of(a[n / 2], n % 2), bf16);
    for (int n = 0; n < 4; n++) mine.b[n / 2][n % 2] = half_float(half_of(b[n / 2], n % 2), bf16);
    const emulated::Given<Operands> all(mine);
    const int lane = emulated::lane();
    for (int c = 0; c < 4; c++) {
        const int row = lane / 4, column = lane % 4 * 2 + c % 2;
        float total = sum[c];
        for (int k = 0; k < 16; k++)
            total += all[row * 4 + k % 8 / 2].a[c / 2][k / 8][k % 2] *
                     all[column * 4 + k % 8 / 2].b[k / 8][k % 2];
        sum[c] = total;
    }
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
template <bool bf16>
uint32_t pack(float low, float high) {
    return half_bits(low, bf16) | static_cast<uint32_t>(half_bits(high, bf16)) << 16;
}
template <bool bf16>
float2 unpack(uint32_t word) {
    return {half_float(half_of(word, 0), bf16), half_float(half_of(word, 1), bf16)};
}
template <bool bf16>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    const float2 x = unpack<bf16>(a), y = unpack<bf16>(b);
    return pack<bf16>(x.x * y.x, x.y * y.y);
}
