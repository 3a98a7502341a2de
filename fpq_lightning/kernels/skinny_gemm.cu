// Products of at most 64 rows with a weight in signed four-bit floating point, on Hopper's tensor cores.
//
//     out[m, n] = scale[n] * sum over k of x[m, k] * value(code[n, k]) + bias[n]
//
// skinny_gemm.py defines what is in capitals, and `multiply`: of 64 outputs and 16 input channels by the rows of x.

typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS (128 * GROUPS)
#define OUTPUTS (64 * GROUPS)
#define X_BYTES (COLUMNS * 256)  // a chunk of x
#define PIECES (COLUMNS * 4)  // of x in a chunk: 32 values of a row, for one lane of four to load
#define PIECES_EACH ((PIECES + THREADS - 1) / THREADS)
#define BLOCKS (OUTPUTS / 16 * (COLUMNS / 8))  // of 16 x 8 sums, four a lane

__device__ void copy_16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}

__device__ uint4 load_shared(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}

__device__ void store_shared(u32 to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

__device__ float4 load_sums(u32 from) {
    uint4 v = load_shared(from);
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

__device__ void send_sums(u32 to, int rank, const float* sums) {  // to the same place of another block of the cluster
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(to), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "r"(there), "f"(sums[0]), "f"(sums[1]), "f"(sums[2]), "f"(sums[3]) : "memory");
}

// Codes I and I + 4 of the eight in a word as two bfloat16. A code's magnitude, moved to the lowest exponent bits and
// highest mantissa bits of a bfloat16, is its value but for a power of two, which a multiplication brings (that of a
// subnormal too). Multiplying by two powers of two at once moves the sign and the magnitude, which lie apart then.
template <int I> __device__ u32 decode(u32 word) {
    const u32 bits = I < 2 ? word : word >> 8;
    const u32 code = bits & (I % 2 ? 0x00F000F0u : 0x000F000Fu);
    const u32 moved = code * (I % 2 ? (8u >> MANTISSA) + 0x100u : (0x80u >> MANTISSA) + 0x1000u);
    const u32 magnitude = (0x7u << 7 >> MANTISSA) * 0x10001u;
    u32 values;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(values) : "r"(moved & (magnitude | 0x80008000u)), "r"(MULTIPLIER));
    return values;
}

// A 16 x 16 block of the weight takes one half of a word of each of a lane's two rows.
__device__ void decode_word(u32 (*a)[4], u32 row0, u32 row1) {
    a[0][0] = decode<0>(row0), a[0][1] = decode<0>(row1), a[0][2] = decode<1>(row0), a[0][3] = decode<1>(row1);
    a[1][0] = decode<2>(row0), a[1][1] = decode<2>(row1), a[1][2] = decode<3>(row0), a[1][3] = decode<3>(row1);
}

// Where 16 input channels of x lie: groups of eight rows are 128 bytes apart, the two halves of the channels 16 bytes a
// row of x.
__device__ u64 described(u32 address) {
    return (u64)(128 / 16) << 32 | (u64)COLUMNS << 16 | (address & 0x3FFFF) >> 4;
}

struct Rows {  // x[m, k], row by row
    const unsigned short* x;
    int m, k;
};

// Piece i of a chunk: lane q of four has input channels 32 q.. of a row of codes, hence word w of each lane together.
__device__ void load_x(uint4 (*piece)[4], Rows x, int chunk) {
    #pragma unroll
    for (int t = 0; t < PIECES_EACH; ++t) {
        const int i = threadIdx.x + t * THREADS, row = i / 32 * 8 + i % 8, word = i / 8 % 4;
        const uint4* from = (const uint4*)(x.x + (size_t)row * x.k + chunk * 128 + word * 8);
        #pragma unroll
        for (int q = 0; q < 4; ++q) piece[t][q] = row < x.m ? __ldg(from + 4 * q) : make_uint4(0, 0, 0, 0);
    }
}

// In the order in which the lanes have the codes: pairs (i, i + 4) of a word, the four lanes beside each other.
__device__ void store_x(u32 to, const uint4 (*piece)[4]) {
    #pragma unroll
    for (int t = 0; t < PIECES_EACH; ++t) {
        const int i = threadIdx.x + t * THREADS, row = i / 32 * 8 + i % 8, word = i / 8 % 4;
        if (i < PIECES) {
            const uint4 *p = piece[t];
            const u32 at = to + word * 4 * (COLUMNS * 16) + row * 16;
            #define PAIRS(a, b, pick) make_uint4( \
                __byte_perm(p[0].a, p[0].b, pick), __byte_perm(p[1].a, p[1].b, pick), \
                __byte_perm(p[2].a, p[2].b, pick), __byte_perm(p[3].a, p[3].b, pick))
            store_shared(at, PAIRS(x, z, 0x5410));
            store_shared(at + COLUMNS * 16, PAIRS(x, z, 0x7632));
            store_shared(at + COLUMNS * 32, PAIRS(y, w, 0x5410));
            store_shared(at + COLUMNS * 48, PAIRS(y, w, 0x7632));
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads by another way
        }
    }
}

__device__ u32 rounded(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS) skinny_gemm(
    const unsigned short* __restrict__ x, const unsigned char* __restrict__ codes, const float* __restrict__ scale,
    const unsigned short* __restrict__ bias, unsigned short* __restrict__ out, int scale_stride, int m, int n, int k
) {
    extern __shared__ __align__(128) unsigned char shared[];
    const u32 codes_at = (u32)__cvta_generic_to_shared(shared) + threadIdx.x * 16;
    const u32 x_at = (u32)__cvta_generic_to_shared(shared) + STAGES * OUTPUTS * 64;
    const u32 sums_at = x_at + 3 * X_BYTES;
    const int rank = blockIdx.x % SPLITS, first_output = blockIdx.x / SPLITS * OUTPUTS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int begin = rank * (k / 128) / SPLITS, end = (rank + 1) * (k / 128) / SPLITS;  // chunks
    if (SPLITS > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");

    // A lane has output channels 2g and 2g + 1 of 16, which wgmma calls rows g and g + 8, so that it has neighbours to
    // store at the end. Beyond the last output channel it reads others and stores nothing.
    const int mine = min(first_output + warp * 16, n - 16) + lane / 4 * 2;
    const unsigned char* from = codes + (size_t)mine * (k / 2) + lane % 4 * 16;
    // Every lane copies to shared memory what it alone reads there: registers for so much on its way would be too many.
    auto load_codes = [&](int chunk, int slot) {
        if (chunk < end) {
            const u32 to = codes_at + slot * (2 * THREADS * 16);
            copy_16(to, from + chunk * 64);
            copy_16(to + THREADS * 16, from + chunk * 64 + k / 2);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    #pragma unroll
    for (int s = 0; s < STAGES; ++s) load_codes(begin + s, s);

    float sums[COLUMNS / 2] = {};
    u32 a[2][4][4];  // one half is decoded while the other is multiplied
    uint4 piece[PIECES_EACH][4];
    const Rows rows = {x, m, k};
    if (begin < end) {
        load_x(piece, rows, begin);
        store_x(x_at, piece);
    }
    if (begin + 1 < end) load_x(piece, rows, begin + 1);

    // x has three places: a block of threads stores the next chunk while some warps multiply by the one before.
    for (int chunk = begin, slot = 0, place = 0; chunk < end; ++chunk) {
        asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 1) : "memory");
        const u32 at = codes_at + slot * (2 * THREADS * 16);
        const uint4 row0 = load_shared(at), row1 = load_shared(at + THREADS * 16);
        #pragma unroll
        for (int half = 0; half < 2; ++half) {
            decode_word(a[half], half ? row0.z : row0.x, half ? row1.z : row1.x);
            decode_word(a[half] + 2, half ? row0.w : row0.y, half ? row1.w : row1.y);
            if (half == 0) __syncthreads();  // all have stored this chunk of x
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            #pragma unroll
            for (int step = 0; step < 4; ++step)
                multiply(sums, a[half][step], described(x_at + place * X_BYTES + (half * 4 + step) * COLUMNS * 32));
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        }
        place = place == 2 ? 0 : place + 1;
        if (chunk + 1 < end) store_x(x_at + place * X_BYTES, piece);
        if (chunk + 2 < end) load_x(piece, rows, chunk + 2);
        load_codes(chunk + STAGES, slot);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    #pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) asm volatile("" : "+f"(sums[i]) :: "memory");  // not read before

    // Four sums of a lane in block b: outputs 2g and 2g + 1, rows 2q and 2q + 1 of x.
    auto store = [&](int b, float4 sum) {
        const int output = first_output + b / (COLUMNS / 8) * 16 + lane / 4 * 2;
        const int row = b % (COLUMNS / 8) * 8 + lane % 4 * 2;
        if (output >= n) return;
        const float by0 = scale[output * scale_stride], by1 = scale[(output + 1) * scale_stride];
        const u32 both = bias ? *(const u32*)(bias + output) : 0;
        const float add0 = __uint_as_float(both << 16), add1 = __uint_as_float(both & 0xFFFF0000u);
        u32* to = (u32*)(out + (size_t)row * n + output);
        if (row < m) *to = rounded(sum.x * by0 + add0, sum.z * by1 + add1);
        if (row + 1 < m) to[n / 2] = rounded(sum.y * by0 + add0, sum.w * by1 + add1);
    };
    if (SPLITS == 1) {
        #pragma unroll
        for (int i = 0; i < COLUMNS / 8; ++i) {
            const float* s = sums + 4 * i;
            store(warp * (COLUMNS / 8) + i, make_float4(s[0], s[1], s[2], s[3]));
        }
        return;
    }
    // Block b of sums is added by block b % SPLITS of the cluster, in the order of the splits.
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // the others have begun
    #pragma unroll
    for (int i = 0; i < COLUMNS / 8; ++i) {
        const int b = warp * (COLUMNS / 8) + i;
        send_sums(sums_at + (b / SPLITS * SPLITS + rank) * 512 + lane * 16, b % SPLITS, sums + 4 * i);
    }
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    for (int b = warp * SPLITS + rank; b < BLOCKS; b += THREADS / 32 * SPLITS) {
        float4 sum = make_float4(0, 0, 0, 0);
        #pragma unroll
        for (int split = 0; split < SPLITS; ++split) {
            const float4 part = load_sums(sums_at + (b / SPLITS * SPLITS + split) * 512 + lane * 16);
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        store(b, sum);
    }
}
