// What a GPU has one instruction for, as functions. Kernels are written with these alone, so that a
// test can replace this file and run them on a CPU.
#ifndef OOMPROOF_PRIMITIVES
#define OOMPROOF_PRIMITIVES

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;

// The block's dynamic shared memory.
__device__ __forceinline__ uint8_t* shared_memory() {
    extern __shared__ __align__(128) uint8_t dynamic_shared[];
    return dynamic_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// -- The chain of kernels ------------------------------------------------------------------------

// The next kernel may start as soon as every block got here.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until all kernels before have ended and what they wrote is visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// -- Global memory -------------------------------------------------------------------------------

// From the level-2 cache: what other multiprocessors wrote a moment ago.
__device__ __forceinline__ uint32_t load_fresh(const void* source) {
    uint32_t word;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(source) : "memory");
    return word;
}

__device__ __forceinline__ float4 load_fresh4(const float* source) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(source)
                 : "memory");
    return v;
}

__device__ __forceinline__ float2 load_fresh2(const float* source) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "l"(source)
                 : "memory");
    return v;
}

// 16 bytes to shared memory in the background; zeros where `bytes` is 0, and nothing is read then.
__device__ __forceinline__ void copy_async(void* target, const void* source, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     shared_address(target)),
                 "l"(source), "r"(bytes)
                 : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most `groups` of this thread's groups are on their way.
template <int groups>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// -- Blocks that meet ----------------------------------------------------------------------------

// Orders what this thread saw and wrote before against what it does after, for the whole GPU.
__device__ __forceinline__ void fence() { __threadfence(); }

__device__ __forceinline__ uint32_t fetch_add(uint32_t* counter, uint32_t amount) {
    return atomicAdd(counter, amount);
}

// Blocks of this block's cluster (in x), and which of them it is; 1 and 0 without clusters.
__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
#endif
    return size;
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
#endif
    return rank;
}

// A cluster's blocks meet between arrive and wait; blocks that have ended are not waited for.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

// Without a word on what was written: for blocks that have only read.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// From the place of `mine` in the shared memory of another block of the cluster.
__device__ __forceinline__ float4 load_peer4(const float* mine, uint32_t rank) {
    float4 v = make_float4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 900
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(shared_address(mine)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
#endif
    return v;
}

__device__ __forceinline__ float2 load_peer2(const float* mine, uint32_t rank) {
    float2 v = make_float2(0, 0);
#if __CUDA_ARCH__ >= 900
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(shared_address(mine)), "r"(rank));
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "r"(address)
                 : "memory");
#endif
    return v;
}

// -- 8x8 matrices of 16-bit elements --------------------------------------------------------------

// Four of them: lane l's pointer is row l % 8 of matrix l / 8; the lane gets elements 2(l % 4) and
// 2(l % 4) + 1 of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, of each matrix transposed.
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ uint32_t transpose(uint32_t matrix) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(matrix));
    return out;
}

// sum [16, 8] += a [16, 16] b [16, 8].
template <bool bf16>
__device__ __forceinline__ void multiply_add(
    float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (bf16)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// -- Numbers -------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }

__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Two 16-bit floats in a word, nearest, ties to even.
template <bool bf16>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    if constexpr (bf16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <bool bf16>
__device__ __forceinline__ float2 unpack(uint32_t word) {
    if constexpr (bf16) {
        return make_float2(float_of(word << 16), float_of(word & 0xffff0000u));
    } else {
        float2 v;
        asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; "
            "cvt.f32.f16 %1, high;}"
            : "=f"(v.x), "=f"(v.y)
            : "r"(word));
        return v;
    }
}

// Products of the two 16-bit floats of each word.
template <bool bf16>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    uint32_t word;
    // From compute capability 8.0 on there is this one only; adding -0 changes nothing.
    if constexpr (bf16)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(0x80008000u));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(0x80008000u));
    return word;
}

#endif
