// Works through a table of pieces of GPU memory: copies or casts each, sums the digest of what it wrote, and finds
// values that are not finite. A piece is four 64-bit numbers:
//
//     source address, target address (0: only read), index of its first 8-byte word in the digest,
//     bytes in the target | kind of the target's values << 32 | cast << 40
//
// The digest is defined in digest.py. Addresses may have any alignment; multiples of 16 are fast. Stores are marked as
// streaming (__stcs): what is written is not read again soon, and 15 GB then take 2 to 3 % less.

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;

#define THREADS 512
#define UNROLL 8
#define GOLDEN 0x9E3779B97F4A7C15ull
#define ODD 0xC2B2AE3D27D4EB4Full

enum Cast { NONE = 0, TO_BFLOAT16 = 1, TO_FLOAT16 = 2 };

// (word & mask) + one carries into the top bits exactly where all bits of an exponent are set.
struct Finite { u32 low, high, one, top; };

__device__ __forceinline__ Finite finite_for(u32 kind) {
    switch (kind) {
        case 1: return {0x7F807F80u, 0x7F807F80u, 0x00800080u, 0x80008000u};  // bfloat16
        case 2: return {0x7C007C00u, 0x7C007C00u, 0x04000400u, 0x80008000u};  // float16
        case 3: return {0x7F800000u, 0x7F800000u, 0x00800000u, 0x80000000u};  // float32
        case 4: return {0x00000000u, 0x7FF00000u, 0x00100000u, 0x80000000u};  // float64
        case 5: return {0x7C7C7C7Cu, 0x7C7C7C7Cu, 0x04040404u, 0x80808080u};  // float8_e5m2
        case 6: return {0x7F7F7F7Fu, 0x7F7F7F7Fu, 0x01010101u, 0x80808080u};  // float8_e4m3fn
        default: return {0u, 0u, 0u, 0u};
    }
}

struct Sums {
    u64 first, second;
    u32 bad;

    template <bool summed>
    __device__ __forceinline__ void add(u32 low, u32 high, u64 index, Finite finite) {
        if (summed) {
            u64 word = (u64)low | (u64)high << 32;
            first += word * (index * GOLDEN | 1);
            second += (word ^ (word >> 29)) * (index * ODD | 1);
        }
        bad |= (((low & finite.low) + finite.one) | ((high & finite.high) + finite.one)) & finite.top;
    }
};

__device__ __forceinline__ u32 narrow(float low, float high, u32 cast) {
    u32 pair;
    if (cast == TO_BFLOAT16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ uint4 loaded(const u8* source, u32 at, u32 cast) {
    if (cast == NONE) return ((const uint4*)source)[at];
    float4 a = ((const float4*)source)[2 * at], b = ((const float4*)source)[2 * at + 1];
    uint4 made;
    made.x = narrow(a.x, a.y, cast);
    made.y = narrow(a.z, a.w, cast);
    made.z = narrow(b.x, b.y, cast);
    made.w = narrow(b.z, b.w, cast);
    return made;
}

// One word of at most 8 bytes, whatever its alignment.
template <bool summed>
__device__ __forceinline__ void slow_word(const u8* source, u8* target, u32 start, u32 size, u32 cast, u64 index, Finite finite, Sums& sums) {
    u64 word = 0;
    if (cast == NONE) {
        for (u32 i = 0; i < size; i++) word |= (u64)source[start + i] << 8 * i;
    } else {
        for (u32 i = 0; i < size; i += 2)
            word |= (u64)(narrow(*(const float*)(source + 2 * (start + i)), 0.0f, cast) & 0xFFFFu) << 8 * i;
    }
    if (target)
        for (u32 i = 0; i < size; i++) target[start + i] = (u8)(word >> 8 * i);
    sums.add<summed>((u32)word, (u32)(word >> 32), index, finite);
}

// One piece by `width` threads, of which this is number `me`.
template <u32 cast, bool summed, u32 width>
__device__ __forceinline__ void piece(const u8* source, u8* target, u64 first, u32 nbytes, u32 me, Finite finite, Sums& sums) {
    u32 vectors = (((u64)source | (u64)target) & 15) == 0 ? nbytes / 16 : 0;
    u32 at = me;
    for (; at + (UNROLL - 1) * width < vectors; at += UNROLL * width) {
        uint4 v[UNROLL];
#pragma unroll
        for (u32 j = 0; j < UNROLL; j++) v[j] = loaded(source, at + j * width, cast);
#pragma unroll
        for (u32 j = 0; j < UNROLL; j++) {
            u32 place = at + j * width;
            if (target) __stcs((uint4*)target + place, v[j]);
            sums.add<summed>(v[j].x, v[j].y, first + 2 * place, finite);
            sums.add<summed>(v[j].z, v[j].w, first + 2 * place + 1, finite);
        }
    }
    if (at < vectors) {  // fewer than UNROLL are left for this thread: all of them are under way at once, too
        uint4 v[UNROLL];
#pragma unroll
        for (u32 j = 0; j < UNROLL; j++)
            if (at + j * width < vectors) v[j] = loaded(source, at + j * width, cast);
#pragma unroll
        for (u32 j = 0; j < UNROLL; j++) {
            u32 place = at + j * width;
            if (place >= vectors) break;
            if (target) __stcs((uint4*)target + place, v[j]);
            sums.add<summed>(v[j].x, v[j].y, first + 2 * place, finite);
            sums.add<summed>(v[j].z, v[j].w, first + 2 * place + 1, finite);
        }
    }
    for (u32 word = 2 * vectors + me; 8 * word < nbytes; word += width) {
        u32 size = min(8u, nbytes - 8 * word);
        slow_word<summed>(source, target, 8 * word, size, cast, first + word, finite, sums);
    }
}

template <bool summed, u32 width>
__device__ __forceinline__ void any_piece(ulonglong2 places, ulonglong2 rest, u32 me, Sums& sums) {
    const u8* source = (const u8*)places.x;
    u8* target = (u8*)places.y;
    u64 first = rest.x, told = rest.y;
    u32 nbytes = (u32)told;
    Finite finite = finite_for((u32)(told >> 32) & 255);
    switch ((u32)(told >> 40)) {
        case TO_BFLOAT16: piece<TO_BFLOAT16, summed, width>(source, target, first, nbytes, me, finite, sums); break;
        case TO_FLOAT16: piece<TO_FLOAT16, summed, width>(source, target, first, nbytes, me, finite, sums); break;
        default: piece<NONE, summed, width>(source, target, first, nbytes, me, finite, sums);
    }
}

// Pieces from `begin` to `end`, one for each group of `width` threads at a time.
template <bool summed, u32 width>
__device__ __forceinline__ void pieces_of(const u64* table, int begin, int end, Sums& sums) {
    const ulonglong2* rows = (const ulonglong2*)table;
    const int groups = THREADS / width;
    int p = begin + blockIdx.x * groups + threadIdx.x / width, step = gridDim.x * groups;
    ulonglong2 places = {0, 0}, rest = {0, 0};
    if (p < end) places = rows[2 * p], rest = rows[2 * p + 1];
    for (; p < end; p += step) {
        ulonglong2 its_places = places, its_rest = rest;
        int next = p + step;
        if (next < end) places = rows[2 * next], rest = rows[2 * next + 1];  // arrives meanwhile
        any_piece<summed, width>(its_places, its_rest, threadIdx.x % width, sums);
    }
}

// Long pieces by whole blocks, then short ones by warps: a block would wait for each.
template <bool summed>
__device__ __forceinline__ Sums all_pieces(const u64* table, int pieces, int longs) {
    Sums sums = {0, 0, 0};
    pieces_of<summed, THREADS>(table, 0, longs, sums);
    pieces_of<summed, 32>(table, longs, pieces, sums);
    return sums;
}

// The first `longs` pieces are long. `summed`: whether the digest is wanted. results: its two sums, and whether any value is not finite.
extern "C" __global__ void __launch_bounds__(THREADS) one_pass(const u64* table, int pieces, int longs, int summed, u64* results) {
    Sums sums = summed ? all_pieces<true>(table, pieces, longs) : all_pieces<false>(table, pieces, longs);
    __shared__ u64 shared[2][THREADS / 32];
    for (int step = 16; step; step /= 2) {
        sums.first += __shfl_down_sync(~0u, sums.first, step);
        sums.second += __shfl_down_sync(~0u, sums.second, step);
    }
    if (threadIdx.x % 32 == 0) {
        shared[0][threadIdx.x / 32] = sums.first;
        shared[1][threadIdx.x / 32] = sums.second;
    }
    int bad = __syncthreads_or(sums.bad);
    if (threadIdx.x < 2) {
        u64 total = 0;
        for (int warp = 0; warp < THREADS / 32; warp++) total += shared[threadIdx.x][warp];
        atomicAdd(results + threadIdx.x, total);
    }
    if (bad && threadIdx.x == 2) atomicExch(results + 2, 1);
}
