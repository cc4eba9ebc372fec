// FlashAttention-2 (Dao, arXiv:2307.08691, algorithms 1 and 2) on tensor cores, forward and backward.
//
// For GPUs of compute capability 8.0 and up: mma.sync.m16n8k16, ldmatrix and cp.async; a wider atomic addition on 9.0.
// Element type half or bfloat16, sums in float, head dim D 64 or 128. This file knows no framework: it ends in C
// functions that take device pointers, strides and a stream, and return a cudaError_t.
//
// Layouts, used throughout (lane = threadIdx.x % 32, g = lane / 4, t = lane % 4):
//   C, a 16 x 8 float accumulator:   c[0], c[1] at (row g, columns 2t, 2t + 1);  c[2], c[3] the same of row g + 8
//   A, a 16 x 16 left operand:       a[0] (g, 2t..2t+1), a[1] (g + 8, 2t..), a[2] (g, 2t + 8..), a[3] (g + 8, 2t + 8..)
//   B, a 16 x 8 right operand:       b[0] (rows 2t..2t+1, column g), b[1] (rows 2t + 8.., column g)
// Two C tiles side by side, rounded to pairs, are an A operand in the same thread: probabilities go from the
// accumulators of one product into the next without leaving registers.
//
// A tile in shared memory has rows of 2 * D bytes in chunks of 16. Chunk c of row r lies at chunk c ^ (r % 8) of its
// row, so that eight rows' chunks of one column fall into different banks: ldmatrix and cp.async are free of conflicts
// without padding. Because a row offset never has the bits of the chunk, stepping k by 16 elements is one exclusive or
// of the address with 32 * step.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>
#include <stdint.h>
#include <type_traits>

struct Strides {  // in elements; the last dimension's is 1
  int64_t batch, head, row;
};

struct ForwardParams {
  const void *q, *k, *v;  // q (B, H, T, D), k and v (B, H_kv, S, D)
  void* o;                // (B, H, T, D)
  float* lse;             // (B, H, T), contiguous, natural logarithm
  Strides q_strides, k_strides, v_strides, o_strides;
  int32_t batch, heads, kv_heads, q_len, k_len, causal;
  float scale;
  int32_t section;  // set at launch: heads whose blocks are mixed, see place()
};

struct BackwardParams {
  const void *q, *k, *v, *o, *d_o;
  const float* lse;
  void *dq, *dk, *dv;
  float* rows;    // scratch, 2 x (B, H, padded T): log-sum-exp in powers of two, and delta = rowsum(o * do)
  float* dq_sum;  // scratch, (B, H, padded T, D): dq in float, tile by tile in the order of dq_offset()
  Strides q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides, dk_strides, dv_strides;
  int32_t batch, heads, kv_heads, q_len, k_len, causal;
  float scale;
  int32_t section;
};

namespace {

constexpr float kLog2E = 1.4426950408889634f;

// --- Instructions ---------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory without a register between; zeros where the source is past the end.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

// Waits for the other warp of a pair. Barrier 0 is __syncthreads().
__device__ __forceinline__ void pair_barrier(int number) { asm volatile("bar.sync %0, 64;" ::"r"(number) : "memory"); }

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8 and gets (row g, columns 2t, 2t + 1) of
// each.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// The same, transposed: a lane gets the pair (rows 2t, 2t + 1, column g).
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, __half>;

template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define LMSYS_MMA(types)                                                                                    \
  asm volatile("mma.sync.aligned.m16n8k16.row.col." types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
               "{%0, %1, %2, %3};"                                                                          \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kIsHalf<T>) {
    LMSYS_MMA("f32.f16.f16.f32");
  } else {
    LMSYS_MMA("f32.bf16.bf16.f32");
  }
#undef LMSYS_MMA
}

__device__ __forceinline__ float power_of_2(float x) {  // flushes subnormal results to zero; exact zero at -inf
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to a pair, the first in the low half; and back.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (kIsHalf<T>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (kIsHalf<T>) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  } else {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  }
}

// --- Tiles ----------------------------------------------------------------------------------------

// A tensor from row `row` of a head on; T is const for what is read.
template <typename T>
__device__ __forceinline__ T* rows_of(const void* tensor, const Strides& strides, int batch, int head, int row) {
  return static_cast<T*>(const_cast<void*>(tensor)) + batch * strides.batch + head * strides.head + row * strides.row;
}

// ROWS rows of D elements into shared memory by all THREADS threads, rows from `valid` on as zeros; stride in elements.
template <typename T, int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(uint32_t to, const T* from, int64_t stride, int valid) {
  constexpr int kChunks = D / 8, kRows = THREADS / kChunks;
  static_assert(kRows % 8 == 0 && ROWS % kRows == 0, "a thread's rows share their swizzle");
  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  to += row * (2 * D) + ((chunk ^ (row % 8)) << 4);
  from += row * stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < ROWS; i += kRows) {
    copy_async(to + i * (2 * D), from, row + i < valid);
    from += kRows * stride;
  }
}

// ROWS rows that one warp left in shared memory, COLUMNS of each from 8 * chunk_from on, to global memory, 16 bytes a
// lane.
template <typename T, int D, int ROWS, int COLUMNS>
__device__ __forceinline__ void store_rows(T* to, int64_t stride, const uint8_t* from, int chunk_from, int valid) {
  constexpr int kChunks = COLUMNS / 8;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < ROWS * kChunks; i += 32) {
    const int row = i / kChunks, chunk = chunk_from + i % kChunks;
    if (row < valid) {
      *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(from + row * (2 * D) + ((chunk ^ (row % 8)) << 4));
    }
  }
}

// M x N accumulators, times `factor` for each row, as elements into rows of shared memory, from column 8 * chunk on.
template <typename T, int D, int M, int N>
__device__ __forceinline__ void stage_rows(
    uint8_t* to, const float (&c)[M][N][4], const float (&factor)[M][2], int chunk) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      uint8_t* at = to + (m * 16 + g) * (2 * D) + (((chunk + n) ^ g) << 4) + t * 4;
      *reinterpret_cast<uint32_t*>(at) = pack<T>(c[m][n][0] * factor[m][0], c[m][n][1] * factor[m][0]);
      *reinterpret_cast<uint32_t*>(at + 8 * 2 * D) = pack<T>(c[m][n][2] * factor[m][1], c[m][n][3] * factor[m][1]);
    }
  }
}

// Where a lane reads an operand that lies with its k dimension along the row: A (rows m) and B (rows n). A B operand
// whose rows are k is read by load_transposed at lane_a.
template <int D>
__device__ __forceinline__ uint32_t lane_a(int lane) {
  return (lane % 16) * (2 * D) + ((lane / 16 ^ lane % 8) << 4);
}
template <int D>
__device__ __forceinline__ uint32_t lane_b(int lane) {
  return (lane % 8 + lane / 16 * 8) * (2 * D) + ((lane / 8 % 2 ^ lane % 8) << 4);
}

// c (16 M x 8 N) += a b^T over D, both operands rows of D elements in shared memory, at lane_a and lane_b.
template <typename T, int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[M][N][4], uint32_t a_at, uint32_t b_at) {
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(a[m], (a_at ^ (step * 32)) + m * 16 * 2 * D);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_matrices(b, (b_at ^ (step * 32)) + n * 8 * 2 * D);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<T>(c[m][n], a[m], b[0], b[1]);
        mma<T>(c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// c (16 M x 8 N) += a b over 16: a in registers, b 16 rows of D elements in shared memory, at lane_a plus its first
// column.
template <typename T, int D, int M, int N>
__device__ __forceinline__ void multiply_step(float (&c)[M][N][4], const uint32_t (&a)[M][4], uint32_t b_at) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t b[4];
    load_transposed(b, b_at ^ (n * 16));
#pragma unroll
    for (int m = 0; m < M; ++m) {
      mma<T>(c[m][n], a[m], b[0], b[1]);
      mma<T>(c[m][n + 1], a[m], b[2], b[3]);
    }
  }
}

// The same over 16 K.
template <typename T, int D, int M, int N, int K>
__device__ __forceinline__ void multiply_packed(float (&c)[M][N][4], const uint32_t (&a)[K][M][4], uint32_t b_at) {
#pragma unroll
  for (int step = 0; step < K; ++step) multiply_step<T, D>(c, a[step], b_at + step * 16 * 2 * D);
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M * N * 4; ++i) c[i / (N * 4)][i / 4 % N][i % 4] = 0.f;
}

// Which head and which of its blocks a thread block does. Blocks of `section` heads are mixed, rank by rank: under a
// causal mask the long ones (rank 0) start first, and a section's keys and values stay in L2 until its last block has
// read them.
struct Place {
  int head, rank;
};
__device__ __forceinline__ Place place(int heads, int blocks, int section) {
  const int first = static_cast<int>(blockIdx.x / (static_cast<int64_t>(section) * blocks)) * section;
  const int within = static_cast<int>(blockIdx.x - static_cast<int64_t>(first) * blocks);
  const int mixed = min(section, heads - first);
  return {first + within % mixed, within / mixed};
}

// --- Forward --------------------------------------------------------------------------------------

// A block of 4 warps takes 128 queries, 32 a warp: every B operand that a warp loads feeds two products. Keys come in
// tiles of kParts parts, and a part's scores are held at a time. Two blocks share a multiprocessor: while one makes
// exponentials the other keeps the tensor cores busy.
// Tuned on an H200, bf16, 16k tokens of heads x head_dim = 2048; TFLOP/s, causal 1024 keys / full 16k keys:
//   head dim 64:  2 parts of 64: 258 / 351;  1 of 128: 250 / 345;  4 of 32: 247 / 328
//   head dim 128: 2 parts of 32: 285 / 384;  1 of 64: 271 / 381
//   The exponentials of each part between the products of the other: 249 / 339 and 272 / 379. 8 warps, 256 queries:
//   228 / 317, 247 / 361.
template <int D>
struct ForwardTiles {
  static constexpr int kPart = D == 64 ? 64 : 32, kParts = 2;
};
constexpr int kForwardQueries = 128, kForwardWarps = 4;

template <int D>
constexpr int forward_shared_bytes() {  // queries, and two stages of keys and values
  return (kForwardQueries + 2 * 2 * ForwardTiles<D>::kPart * ForwardTiles<D>::kParts) * 2 * D;
}

// The softmax state of a warp's 32 rows: rows m * 16 + g and m * 16 + g + 8 are [m][0] and [m][1] in lane 4 g + t.
struct Softmax {
  float top[2][2];  // the raw score that the exponentials are relative to
  float sum[2][2];  // of this lane's exponentials
};

// The exponentials are relative to the largest score seen when `top` was last set. It is set again only when a score
// exceeds it by more than 2^8 in the exponential: until then sums and outputs are larger than usual by a common factor
// that cancels at the end. Almost all tiles so pass without any exchange between lanes and without rescaling the
// output.
constexpr float kSlack = 8.f;

template <int D, int N>
__device__ __forceinline__ void settle(
    const float (&s)[2][N][4], Softmax& x, float (&o)[2][D / 8][4], float scale_log2) {
  const float slack = kSlack / scale_log2;
  float top[2][2];
  bool above = false;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[m][r] = fmaxf(s[m][0][2 * r], s[m][0][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < N; ++n) top[m][r] = fmaxf(top[m][r], fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
      above |= top[m][r] > x.top[m][r] + slack;
    }
  }
  if (!__any_sync(~0u, above)) return;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = fmaxf(top[m][r], __shfl_xor_sync(~0u, top[m][r], 1));
      most = fmaxf(x.top[m][r], fmaxf(most, __shfl_xor_sync(~0u, most, 2)));
      const float factor = power_of_2((x.top[m][r] - most) * scale_log2);  // 0 at a row's first tile
      x.top[m][r] = most;
      x.sum[m][r] *= factor;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        o[m][n][2 * r] *= factor;
        o[m][n][2 * r + 1] *= factor;
      }
    }
  }
}

// Exponentials of a warp's scores, packed as operands.
template <typename T, int N>
__device__ __forceinline__ void exponentiate(
    const float (&s)[2][N][4], uint32_t (&p)[N / 2][2][4], Softmax& x, float scale_log2) {
#pragma unroll
  for (int f = 0; f < 2 * N; ++f) {
    const int m = f / N, n = f % N;
    float e[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) e[i] = power_of_2(fmaf(s[m][n][i], scale_log2, -x.top[m][i / 2] * scale_log2));
    x.sum[m][0] += e[0] + e[1];
    x.sum[m][1] += e[2] + e[3];
    p[n / 2][m][n % 2 * 2] = pack<T>(e[0], e[1]);
    p[n / 2][m][n % 2 * 2 + 1] = pack<T>(e[2], e[3]);
  }
}

// Hides keys past the end and, under the mask, past the query. row: this lane's first query; key: its first key.
template <int N>
__device__ __forceinline__ void hide(float (&s)[2][N][4], int row, int key, int k_len, bool causal) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int last = causal ? min(row + m * 16 + r * 8, k_len - 1) : k_len - 1;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (key + n * 8 > last) s[m][n][2 * r] = -CUDART_INF_F;
        if (key + n * 8 + 1 > last) s[m][n][2 * r + 1] = -CUDART_INF_F;
      }
    }
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kForwardWarps * 32, 2) forward_kernel(const __grid_constant__ ForwardParams p) {
  constexpr int kPart = ForwardTiles<D>::kPart, kKeys = kPart * ForwardTiles<D>::kParts, kThreads = kForwardWarps * 32;
  constexpr int kTileBytes = kKeys * 2 * D;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t q_tile = shared_address(shared);
  const uint32_t kv_tiles = q_tile + kForwardQueries * 2 * D;  // [stage][key or value][kKeys][D]

  const int blocks = (p.q_len + kForwardQueries - 1) / kForwardQueries;
  const Place at = place(p.batch * p.heads, blocks, p.section);
  const int batch = at.head / p.heads, head = at.head % p.heads, kv_head = head / (p.heads / p.kv_heads);
  const int first = (blocks - 1 - at.rank) * kForwardQueries;
  const T* q = rows_of<const T>(p.q, p.q_strides, batch, head, first);
  const T* k = rows_of<const T>(p.k, p.k_strides, batch, kv_head, 0);
  const T* v = rows_of<const T>(p.v, p.v_strides, batch, kv_head, 0);

  // Under the mask a block's lower warps see fewer keys. Odd blocks give them to the other schedulers, so that two
  // blocks on one multiprocessor balance.
  const int lane = threadIdx.x % 32;
  const int warp = blockIdx.x % 2 ? kForwardWarps - 1 - threadIdx.x / 32 : threadIdx.x / 32;
  const int row = first + warp * 32;  // the warp's first query
  const int keys = p.causal ? min(p.k_len, first + kForwardQueries) : p.k_len;
  const int warp_keys = p.causal ? min(p.k_len, row + 32) : p.k_len;
  const int clear_keys = p.causal ? min(p.k_len, row + 1) : p.k_len;  // seen by all the warp's rows
  const int tiles = (keys + kKeys - 1) / kKeys;

  auto load_keys = [&](int tile) {
    const uint32_t to = kv_tiles + tile % 2 * 2 * kTileBytes;
    const int from = tile * kKeys;
    load_tile<T, D, kKeys, kThreads>(to, k + from * p.k_strides.row, p.k_strides.row, p.k_len - from);
    load_tile<T, D, kKeys, kThreads>(to + kTileBytes, v + from * p.v_strides.row, p.v_strides.row, p.k_len - from);
    copies_commit();
  };
  load_tile<T, D, kForwardQueries, kThreads>(q_tile, q, p.q_strides.row, p.q_len - first);
  load_keys(0);

  const float scale_log2 = p.scale * kLog2E;
  const uint32_t q_at = q_tile + warp * 32 * 2 * D + lane_a<D>(lane);
  float o[2][D / 8][4];
  Softmax x;
  clear(o);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x.top[i / 2][i % 2] = -CUDART_INF_F;
    x.sum[i / 2][i % 2] = 0.f;
  }
  // Every row sees key 0, so the first tile makes each row's maximum finite, and no later step needs a guard.
  for (int tile = 0; tile < tiles; ++tile) {
    copies_wait();
    __syncthreads();  // this tile has arrived, for all; and all have left the tile before, whose stage is filled next
    if (tile + 1 < tiles) load_keys(tile + 1);
    const uint32_t stage = kv_tiles + tile % 2 * 2 * kTileBytes;
    const uint32_t k_at = stage + lane_b<D>(lane), v_at = stage + kTileBytes + lane_a<D>(lane);
#pragma unroll
    for (int part = 0; part < kKeys; part += kPart) {
      const int key = tile * kKeys + part;
      if (key >= warp_keys) break;
      float s[2][kPart / 8][4];
      uint32_t probabilities[kPart / 16][2][4];
      clear(s);
      multiply_rows<T, D>(s, q_at, k_at + part * 2 * D);
      if (key + kPart > clear_keys) hide(s, row + lane / 4, key + lane % 4 * 2, p.k_len, p.causal);
      settle<D>(s, x, o, scale_log2);
      exponentiate<T>(s, probabilities, x, scale_log2);
      multiply_packed<T, D>(o, probabilities, v_at + part * 2 * D);
    }
  }

  float inverse[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = x.sum[m][r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      inverse[m][r] = 1.f / sum;
      const int query = row + m * 16 + r * 8 + lane / 4;
      if (lane % 4 == 0 && query < p.q_len) {
        p.lse[static_cast<int64_t>(at.head) * p.q_len + query] = x.top[m][r] * p.scale + logf(sum);
      }
    }
  }
  // The warp's own query rows are free now: its output passes through them.
  uint8_t* own = shared + warp * 32 * 2 * D;
  __syncwarp();
  stage_rows<T, D>(own, o, inverse, 0);
  __syncwarp();
  T* to = rows_of<T>(p.o, p.o_strides, batch, head, row);
  store_rows<T, D, 32, D>(to, p.o_strides.row, own, 0, p.q_len - row);
}

// --- Backward -------------------------------------------------------------------------------------

// A block holds a tile of keys and values and walks over the queries that see it, and over the query heads that read
// the key head. A warp makes S^T = K Q^T and dP^T = V dO^T for 32 keys, so that P^T and dS^T are operands of dV += P^T
// dO and dK += dS^T Q in registers. dQ = dS K sums over all keys: dS^T goes through shared memory, each warp makes a
// part of the tile of dQ, and adds it to a float array in global memory, since other blocks add to the same rows.
//
// At head dim 64 a warp holds dK and dV of its keys in full (kSplit 1) and takes the queries of a tile half by half. At
// head dim 128 they would not fit its registers: two warps share 32 keys (kSplit 2), each makes the scores of half the
// queries, and half the columns of dK and dV; the other's P^T and dS^T come through shared memory.
//
// dQ of a query tile is made one step late, between the scores and the exponentials of the next tile: the tensor cores
// still have work when the exponentials begin, and one barrier of the block a step is enough.
//
// Tuned on an H200, bf16, 16k tokens of heads x head_dim = 2048; TFLOP/s, causal 1024 keys / full 16k keys:
//   head dim 64:  as here 224 / 326;  8 warps of 16 keys 196 / 265;  8 warps of 32 keys 191 / 306
//   head dim 128: as here 213 / 310;  8 warps of 16 keys, all columns each (74% of shared memory's bandwidth) 203 / 285
template <int D>
struct Backward {
#ifndef LMSYS_SMALL_SHARED_MEMORY  // 177 KiB a block are there, as on compute capability 9.0 and 10.0
  static constexpr int kWarps = D == 64 ? 4 : 8, kQueries = 64, kBlocks = D == 64 ? 2 : 1;
#else  // 99 KiB a block are enough, for compute capability 8.0, 8.6, 8.9 and 12.0; checked, but not tuned
  static constexpr int kWarps = 4, kQueries = D == 64 ? 64 : 32, kBlocks = 1;
#endif
  static constexpr int kSplit = D / 64;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kKeys = kWarps / kSplit * 32;
  static constexpr int kPart = kQueries / 2;              // queries whose scores a warp holds
  static constexpr int kAcross = kQueries / 32;           // warps along dQ's rows
  static constexpr int kColumns = D * kAcross / kWarps;  // of dQ a warp makes
  static constexpr int kQueryBytes = kQueries * 2 * D, kRowBytes = 2 * kQueries * 4;
  static constexpr int kStageBytes = 2 * kQueryBytes + kRowBytes;  // queries, do, log-sum-exp, delta
  static constexpr int kKeyBytes = kKeys * 2 * D;
  static constexpr int kDsBytes = kKeys * kQueries * 2;  // dS^T or P^T
  static constexpr int kSharedBytes = 2 * kKeyBytes + (kSplit + 1) * kDsBytes + 2 * kStageBytes;
};

// dQ's sums lie as the accumulators hold them: a warp's fragments one after the other, so that each addition is one
// line.
__device__ __forceinline__ int dq_offset(int fragment, int element, int lane) {
#if __CUDA_ARCH__ >= 900
  return (fragment * 32 + lane) * 4 + element;
#else
  return (fragment * 4 + element) * 32 + lane;
#endif
}

__device__ __forceinline__ void add_to_sums(float* sums, int fragment, const float (&c)[4], int lane) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums + dq_offset(fragment, 0, lane)),
               "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) atomicAdd(sums + dq_offset(fragment, i, lane), c[i]);
#endif
}

// delta, the log-sum-exp in powers of two, and zeros in dQ's sums. D / 8 lanes a row.
template <typename T, int D>
__global__ void __launch_bounds__(256) prepare_kernel(const __grid_constant__ BackwardParams p, int padded) {
  constexpr int kLanes = D / 8;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) / kLanes;
  const int chunk = threadIdx.x % kLanes, query = static_cast<int>(index % padded);
  const int64_t heads = static_cast<int64_t>(p.batch) * p.heads, flat_head = index / padded;
  const bool inside = flat_head < heads && query < p.q_len;
  float delta = 0.f;
  if (inside) {
    const int batch = flat_head / p.heads, head = flat_head % p.heads;
    const T* o = rows_of<const T>(p.o, p.o_strides, batch, head, query) + chunk * 8;
    const T* d_o = rows_of<const T>(p.d_o, p.do_strides, batch, head, query) + chunk * 8;
    const uint4 a = *reinterpret_cast<const uint4*>(o), b = *reinterpret_cast<const uint4*>(d_o);
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(left[i]), y = unpack<T>(right[i]);
      delta = fmaf(x.x, y.x, fmaf(x.y, y.y, delta));
    }
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) delta += __shfl_xor_sync(~0u, delta, offset);
  if (flat_head >= heads) return;
  if (chunk == 0) {
    p.rows[index] = inside ? p.lse[flat_head * p.q_len + query] * kLog2E : 0.f;
    p.rows[heads * padded + index] = delta;
  }
  float4* sums = reinterpret_cast<float4*>(p.dq_sum + index * D);
  sums[chunk] = sums[chunk + kLanes] = make_float4(0.f, 0.f, 0.f, 0.f);
}

template <typename T, int D>
__global__ void __launch_bounds__(Backward<D>::kThreads, Backward<D>::kBlocks)
    backward_kernel(const __grid_constant__ BackwardParams p, int padded) {
  using C = Backward<D>;
  constexpr int N = C::kPart / 8, K = C::kPart / 16, F = 2 * N, kRow = 2 * D;
  constexpr int kHeld = D / C::kSplit;  // columns of dK and dV
  constexpr int kDsRow = 2 * C::kQueries, kDsShift = kDsRow == 64 ? 1 : 0;  // two rows of 64 bytes: a line of banks
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t k_tile = shared_address(shared), v_tile = k_tile + C::kKeyBytes;
  const uint32_t ds_tiles = v_tile + C::kKeyBytes;  // [2][keys][queries]
  const uint32_t p_tile = ds_tiles + 2 * C::kDsBytes;  // [keys][queries], with kSplit 2
  const uint32_t stages = ds_tiles + (C::kSplit + 1) * C::kDsBytes;  // [2]{queries, do, log-sum-exp, delta}

  const int blocks = (p.k_len + C::kKeys - 1) / C::kKeys, group = p.heads / p.kv_heads;
  const Place at = place(p.batch * p.kv_heads, blocks, p.section);
  const int batch = at.head / p.kv_heads, kv_head = at.head % p.kv_heads;
  const int first = at.rank * C::kKeys;  // under the mask the first keys are seen by most queries
  const T* k = rows_of<const T>(p.k, p.k_strides, batch, kv_head, first);
  const T* v = rows_of<const T>(p.v, p.v_strides, batch, kv_head, first);

  const int query_tiles = padded / C::kQueries;
  const int first_tile = p.causal ? min(first / C::kQueries, query_tiles) : 0;
  const int per_head = query_tiles - first_tile, steps = per_head * group;
  const int64_t heads = static_cast<int64_t>(p.batch) * p.heads;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int own = warp / C::kSplit * 32;  // the warp's first key in the tile
  const int half = warp % C::kSplit;      // of the queries and of the columns, with kSplit 2

  auto load_queries = [&](int step) {
    const int head = kv_head * group + step / per_head, from = (first_tile + step % per_head) * C::kQueries;
    const uint32_t to = stages + step % 2 * C::kStageBytes;
    const T* q = rows_of<const T>(p.q, p.q_strides, batch, head, from);
    const T* d_o = rows_of<const T>(p.d_o, p.do_strides, batch, head, from);
    load_tile<T, D, C::kQueries, C::kThreads>(to, q, p.q_strides.row, p.q_len - from);
    load_tile<T, D, C::kQueries, C::kThreads>(to + C::kQueryBytes, d_o, p.do_strides.row, p.q_len - from);
    constexpr int kChunks = C::kQueries / 4;  // of four rows
    if (threadIdx.x < 2 * kChunks) {
      const int which = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
      const int64_t row = which * heads * padded + (static_cast<int64_t>(batch) * p.heads + head) * padded + from;
      copy_async(to + 2 * C::kQueryBytes + threadIdx.x * 16, p.rows + row + chunk * 4, true);
    }
    copies_commit();
  };

  float dk[2][kHeld / 8][4], dv[2][kHeld / 8][4];
  clear(dk);
  clear(dv);
  const float scale_log2 = p.scale * kLog2E;
  const uint32_t k_at = k_tile + own * kRow + lane_a<D>(lane), v_at = v_tile + own * kRow + lane_a<D>(lane);
  const uint32_t b_at = lane_b<D>(lane), b_transposed_at = lane_a<D>(lane);
  const uint32_t held_at = b_transposed_at ^ (half * kHeld * 2);

  // dQ: this warp's 32 rows and kColumns columns of the tile. A is dS, read transposed from dS^T.
  const int dq_row = warp % C::kAcross * 32, dq_column = warp / C::kAcross * C::kColumns;
  const int ds_key = lane % 8 + lane / 16 * 8;
  const int ds_chunk = (dq_row / 8 + lane / 8 % 2) ^ (ds_key >> kDsShift) % (kDsRow / 16);
  const uint32_t dq_a = ds_tiles + ds_key * kDsRow + ds_chunk * 16;
  const uint32_t dq_b = k_tile + (b_transposed_at ^ (dq_column / 8 * 16));
  auto add_dq = [&](int step) {
    float dq[2][C::kColumns / 8][4];
    clear(dq);
#pragma unroll
    for (int i = 0; i < C::kKeys / 16; ++i) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_transposed(a[m], (dq_a ^ (m * 32)) + step % 2 * C::kDsBytes + i * 16 * kDsRow);
      }
      multiply_step<T, D>(dq, a, dq_b + i * 16 * kRow);
    }
    const int head = kv_head * group + step / per_head, tile = first_tile + step % per_head;
    float* sums = p.dq_sum + ((static_cast<int64_t>(batch) * p.heads + head) * query_tiles + tile) * (C::kQueries * D);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < C::kColumns / 8; ++n) {
        add_to_sums(sums, (warp * 2 + m) * (C::kColumns / 8) + n, dq[m][n], lane);
      }
    }
  };

  if (steps > 0) {
    load_tile<T, D, C::kKeys, C::kThreads>(k_tile, k, p.k_strides.row, p.k_len - first);
    load_tile<T, D, C::kKeys, C::kThreads>(v_tile, v, p.v_strides.row, p.k_len - first);
    load_queries(0);
  }
  for (int step = 0; step < steps; ++step) {
    copies_wait();
    __syncthreads();  // this step's queries and the last step's dS are there, and all have left the stage filled next
    if (step + 1 < steps) load_queries(step + 1);
    const uint32_t q_tile = stages + step % 2 * C::kStageBytes, do_tile = q_tile + C::kQueryBytes;
    const float* rows = reinterpret_cast<const float*>(shared + (q_tile - k_tile) + 2 * C::kQueryBytes) + 2 * t;
    const int tile_query = (first_tile + step % per_head) * C::kQueries;
    const int stored_at = step % 2 * C::kDsBytes;

#pragma unroll
    for (int i = 0; i < 2 / C::kSplit; ++i) {
      const int part = (C::kSplit == 1 ? i : half) * C::kPart;
      // Fragment [m][n] of s holds keys 16 m + g, + 8 and queries 8 n + 2 t, + 1 of this part of the tile.
      float s[2][N][4], dp[2][N][4];
      uint32_t packed[K][2][4];
      clear(s);
      multiply_rows<T, D>(s, k_at, q_tile + part * kRow + b_at);
      const int first_key = first + own, query = tile_query + part;
      if (first_key + 32 > p.k_len || (p.causal && first_key + 31 > query)) {
#pragma unroll
        for (int f = 0; f < F * 4; ++f) {
          const int m = f / 4 / N, n = f / 4 % N, e = f % 4;
          const int key = first_key + m * 16 + g + e / 2 * 8;
          if (key >= p.k_len || (p.causal && key > query + n * 8 + 2 * t + e % 2)) s[m][n][e] = -CUDART_INF_F;
        }
      }
      // A pair of queries' values for one key, in the tile at `tile`; chunk: 8 queries.
      auto store_pair = [&](uint32_t tile, int key, int chunk, uint32_t pair) {
        const int swizzled = chunk ^ (g >> kDsShift) % (kDsRow / 16);
        *reinterpret_cast<uint32_t*>(shared + (tile - k_tile) + key * kDsRow + swizzled * 16 + t * 4) = pair;
      };
      if (i == 0 && step > 0) add_dq(step - 1);
#pragma unroll
      for (int f = 0; f < F; ++f) {
        const int m = f / N, n = f % N;
        const float2 lse = *reinterpret_cast<const float2*>(rows + part + n * 8);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          s[m][n][2 * r] = power_of_2(fmaf(s[m][n][2 * r], scale_log2, -lse.x));
          s[m][n][2 * r + 1] = power_of_2(fmaf(s[m][n][2 * r + 1], scale_log2, -lse.y));
          packed[n / 2][m][n % 2 * 2 + r] = pack<T>(s[m][n][2 * r], s[m][n][2 * r + 1]);
          if (C::kSplit == 2) {
            store_pair(p_tile, own + m * 16 + g + r * 8, part / 8 + n, packed[n / 2][m][n % 2 * 2 + r]);
          }
        }
      }
      multiply_packed<T, D>(dv, packed, do_tile + part * kRow + held_at);
      clear(dp);
      multiply_rows<T, D>(dp, v_at, do_tile + part * kRow + b_at);
#pragma unroll
      for (int f = 0; f < F; ++f) {
        const int m = f / N, n = f % N;
        const float2 delta = *reinterpret_cast<const float2*>(rows + C::kQueries + part + n * 8);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float low = s[m][n][2 * r] * (dp[m][n][2 * r] - delta.x);
          const float high = s[m][n][2 * r + 1] * (dp[m][n][2 * r + 1] - delta.y);
          packed[n / 2][m][n % 2 * 2 + r] = pack<T>(low, high);
          store_pair(ds_tiles + stored_at, own + m * 16 + g + r * 8, part / 8 + n, packed[n / 2][m][n % 2 * 2 + r]);
        }
      }
      multiply_packed<T, D>(dk, packed, q_tile + part * kRow + held_at);
    }
    if (C::kSplit == 2) {  // the other warp's half of the queries
      pair_barrier(1 + warp / 2);
      const int part = (1 - half) * C::kPart, key = own + lane % 16;
      const uint32_t at = key * kDsRow + ((part / 8 + lane / 16) ^ (key >> kDsShift) % (kDsRow / 16)) * 16;
#pragma unroll
      for (int j = 0; j < K; ++j) {
        uint32_t a[2][4];
        load_matrices(a[0], p_tile + (at ^ (j * 32)));
        load_matrices(a[1], p_tile + (at ^ (j * 32)) + 16 * kDsRow);
        multiply_step<T, D>(dv, a, do_tile + (part + j * 16) * kRow + held_at);
      }
#pragma unroll
      for (int j = 0; j < K; ++j) {
        uint32_t a[2][4];
        load_matrices(a[0], ds_tiles + stored_at + (at ^ (j * 32)));
        load_matrices(a[1], ds_tiles + stored_at + (at ^ (j * 32)) + 16 * kDsRow);
        multiply_step<T, D>(dk, a, q_tile + (part + j * 16) * kRow + held_at);
      }
    }
  }
  __syncthreads();
  if (steps > 0) {
    add_dq(steps - 1);
    __syncthreads();
  }

  // Keys and values have been read for the last time: the gradients pass through the warp's own part of their tiles.
  const float factor[2][2] = {{p.scale, p.scale}, {p.scale, p.scale}}, one[2][2] = {{1.f, 1.f}, {1.f, 1.f}};
  uint8_t* staged = shared + own * kRow;
  const int chunk = half * kHeld / 8;
  stage_rows<T, D>(staged, dk, factor, chunk);
  stage_rows<T, D>(staged + C::kKeyBytes, dv, one, chunk);
  __syncwarp();
  const int row = first + own, valid = p.k_len - row;
  T* dk_to = rows_of<T>(p.dk, p.dk_strides, batch, kv_head, row);
  T* dv_to = rows_of<T>(p.dv, p.dv_strides, batch, kv_head, row);
  store_rows<T, D, 32, kHeld>(dk_to, p.dk_strides.row, staged, chunk, valid);
  store_rows<T, D, 32, kHeld>(dv_to, p.dv_strides.row, staged + C::kKeyBytes, chunk, valid);
}

// dQ = scale * its sums, out of the accumulators' order, as elements. A block of 8 warps takes a tile.
template <typename T, int D>
__global__ void __launch_bounds__(256) finish_kernel(const __grid_constant__ BackwardParams p, int query_tiles) {
  using C = Backward<D>;
  constexpr int kFragments = C::kColumns / 8;  // across a warp's part
  __shared__ __align__(16) uint8_t tile[C::kQueries * 2 * D];
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float* sums = p.dq_sum + static_cast<int64_t>(blockIdx.x) * (C::kQueries * D);
#pragma unroll
  for (int f = threadIdx.x / 32; f < C::kQueries * D / 128; f += 8) {
    const int n = f % kFragments, m = f / kFragments % 2, warp = f / kFragments / 2;
    const int row = warp % C::kAcross * 32 + m * 16 + g, chunk = warp / C::kAcross * kFragments + n;
    float c[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = sums[dq_offset(f, i, lane)] * p.scale;
    uint8_t* at = tile + row * (2 * D) + ((chunk ^ g) << 4) + t * 4;
    *reinterpret_cast<uint32_t*>(at) = pack<T>(c[0], c[1]);
    *reinterpret_cast<uint32_t*>(at + 8 * 2 * D) = pack<T>(c[2], c[3]);
  }
  __syncthreads();
  const int flat_head = blockIdx.x / query_tiles, batch = flat_head / p.heads, head = flat_head % p.heads;
  const int first = blockIdx.x % query_tiles * C::kQueries;
  T* dq = rows_of<T>(p.dq, p.dq_strides, batch, head, first);
#pragma unroll
  for (int i = threadIdx.x; i < C::kQueries * D / 8; i += 256) {
    const int row = i / (D / 8), chunk = i % (D / 8);
    if (first + row < p.q_len) {
      *reinterpret_cast<uint4*>(dq + row * p.dq_strides.row + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + row * (2 * D) + ((chunk ^ (row % 8)) << 4));
    }
  }
}

// --- Launch ---------------------------------------------------------------------------------------

// As many heads as half of L2 holds, in whole groups of heads that share what they read.
cudaError_t choose_section(int64_t bytes_a_head, int64_t heads, int group, int* section) {
  int device, l2_bytes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
  if (error != cudaSuccess) return error;
  const int64_t fit = l2_bytes / 2 / bytes_a_head * group;
  *section = static_cast<int>(fit < group ? group : fit > heads ? heads : fit);
  return cudaSuccess;
}

template <typename T, int D>
cudaError_t forward(ForwardParams p, cudaStream_t stream) {
  const int64_t heads = static_cast<int64_t>(p.batch) * p.heads;
  cudaError_t error = choose_section(static_cast<int64_t>(p.k_len) * 4 * D, heads, p.heads / p.kv_heads, &p.section);
  constexpr int kShared = forward_shared_bytes<D>();
  constexpr auto kAllow = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (error == cudaSuccess) error = cudaFuncSetAttribute(forward_kernel<T, D>, kAllow, kShared);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (p.q_len + kForwardQueries - 1) / kForwardQueries * heads;
  forward_kernel<T, D><<<static_cast<unsigned>(blocks), kForwardWarps * 32, kShared, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, int D>
cudaError_t backward(BackwardParams p, cudaStream_t stream) {
  using C = Backward<D>;
  const int64_t heads = static_cast<int64_t>(p.batch) * p.heads, kv_heads = static_cast<int64_t>(p.batch) * p.kv_heads;
  const int query_tiles = (p.q_len + C::kQueries - 1) / C::kQueries, padded = query_tiles * C::kQueries;
  const int64_t bytes_a_head = static_cast<int64_t>(p.q_len) * 8 * D * (p.heads / p.kv_heads);  // q, do and dq's sums
  cudaError_t error = choose_section(bytes_a_head, kv_heads, 1, &p.section);
  constexpr auto kAllow = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (error == cudaSuccess) error = cudaFuncSetAttribute(backward_kernel<T, D>, kAllow, C::kSharedBytes);
  if (error != cudaSuccess) return error;
  prepare_kernel<T, D><<<static_cast<unsigned>((heads * padded * (D / 8) + 255) / 256), 256, 0, stream>>>(p, padded);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t blocks = (p.k_len + C::kKeys - 1) / C::kKeys * kv_heads;
  backward_kernel<T, D><<<static_cast<unsigned>(blocks), C::kThreads, C::kSharedBytes, stream>>>(p, padded);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  finish_kernel<T, D><<<static_cast<unsigned>(heads * query_tiles), 256, 0, stream>>>(p, query_tiles);
  return cudaGetLastError();
}

}  // namespace

#ifdef LMSYS_ONLY_TYPE  // one instance, to compile quickly: -DLMSYS_ONLY_TYPE=__half -DLMSYS_ONLY_DIM=64
#define LMSYS_DISPATCH(function) (function<LMSYS_ONLY_TYPE, LMSYS_ONLY_DIM>)
#else
#define LMSYS_DISPATCH(function)                                                \
  (head_dim == 64 ? (bf16 ? function<__nv_bfloat16, 64> : function<__half, 64>) \
                  : (bf16 ? function<__nv_bfloat16, 128> : function<__half, 128>))
#endif

extern "C" {

int lmsys_forward(const ForwardParams* p, int head_dim, int bf16, void* stream) {
  return LMSYS_DISPATCH(forward)(*p, static_cast<cudaStream_t>(stream));
}

int lmsys_backward(const BackwardParams* p, int head_dim, int bf16, void* stream) {
  return LMSYS_DISPATCH(backward)(*p, static_cast<cudaStream_t>(stream));
}

const char* lmsys_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int lmsys_params_bytes(int backward) { return backward ? sizeof(BackwardParams) : sizeof(ForwardParams); }

}  // extern "C"
