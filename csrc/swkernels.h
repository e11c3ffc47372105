// The C interface of swkernels.
//
// Two shared libraries implement it: libswkernels_cpu (functions swk_cpu_*) and libswkernels_cuda
// (functions swk_cuda_*); both have swk_interface_version and swk_status_text. Python loads them
// with ctypes. Nothing here depends on PyTorch, so one build serves every PyTorch.
//
// Conventions
//   * Matrices are [T, C]: T tokens (rows), C channels (columns). The elements of a row are
//     adjacent; rows lie `stride` elements apart (any value, negative too). Sizes, strides and
//     addresses are 64-bit.
//   * Pointers need the alignment of their element type, no more. They may be null where T or C
//     is 0, and where a parameter says so.
//   * Peaks are one int64 per channel: (bits of |v| as float32) << 32 | (0xFFFFFFFF - token).
//     0 means that no token has been seen. Every NaN counts as 0x7FC00000. Functions merge into
//     `keys`: keys[c] = max(keys[c], peak of channel c).
//   * The token of row t is token_offset + t, or token_offset + token_index[t] where token_index
//     [T] is given; a negative index leaves the row out. Indices need not be ordered or unique.
//     Tokens must lie in [0, 2^32 - 2].
//   * Functions return SWK_OK or another status, never throw, and keep no state between calls.
//     On an error `keys` is as it was, except after SWK_CUDA_ERROR.

#ifndef SWKERNELS_H
#define SWKERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define SWK_API __declspec(dllexport)
#else
#define SWK_API __attribute__((visibility("default")))
#endif

// Changes whenever a signature or a meaning below changes; Python refuses another number.
#define SWK_INTERFACE_VERSION 5

#ifdef __cplusplus
extern "C" {
#endif

enum swk_status {
  SWK_OK = 0,
  SWK_BAD_DTYPE = 1,
  SWK_BAD_ACTIVATION = 2,
  SWK_BAD_SIZE = 3,       // a negative size, or a null pointer that holds elements
  SWK_BAD_TOKEN = 4,      // a token outside [0, 2^32 - 2]
  SWK_BAD_ISA = 5,        // an instruction set that this CPU or this build lacks
  SWK_OUT_OF_MEMORY = 6,
  SWK_CUDA_ERROR = 7,     // see swk_cuda_last_error
  SWK_BAD_INDEX = 8,      // a row, column or position outside the matrix, or out of order
  SWK_NOT_A_NUMBER = 9,   // the input holds a NaN
};

enum swk_dtype {
  SWK_FLOAT32 = 0,
  SWK_BFLOAT16 = 1,
  SWK_FLOAT16 = 2,
  // Only where a function says so: float8_e4m3fn and float8_e5m2 of PyTorch.
  SWK_FLOAT8_E4M3 = 3,
  SWK_FLOAT8_E5M2 = 4,
};

enum swk_activation { SWK_SILU = 0, SWK_GELU = 1, SWK_GELU_TANH = 2, SWK_RELU = 3 };

// What stands for an element of a packed matrix; see docs/kernels/quantize.md.
enum swk_code { SWK_INT4 = 0, SWK_INT8 = 1, SWK_NF4 = 2, SWK_FP4 = 3 };

// How the range of a block is cut.
enum swk_clip {
  SWK_CLIP_NONE = 0,
  SWK_CLIP_ZSCORE = 1,
  SWK_CLIP_ZSCORE_SIGNED = 2,
  SWK_CLIP_PERCENTILE = 3,
  SWK_CLIP_COUNT = 4,
  SWK_CLIP_SEARCH = 5
};

enum swk_isa { SWK_ISA_BEST = 0, SWK_ISA_SCALAR = 1, SWK_ISA_AVX2 = 2, SWK_ISA_AVX512 = 3 };

// The SWK_INTERFACE_VERSION that the library was built with.
SWK_API int swk_interface_version(void);

// One line of English for a status. Never null; static storage.
SWK_API const char* swk_status_text(int status);

// The instruction set that `isa` (swk_isa) stands for on this CPU: the best one for SWK_ISA_BEST,
// `isa` itself where the CPU and the build have it, 0 where they lack it.
SWK_API int swk_cpu_isa(int isa);

// Runs the work of later calls on the OpenMP thread pool that `gomp_parallel` (the function
// GOMP_parallel of an OpenMP runtime) belongs to; null goes back to threads made for each call.
// PyTorch brings its own OpenMP runtime, whose idle threads spin for a while after each operation:
// a second pool would compete with them for the cores, so the caller hands over PyTorch's.
SWK_API void swk_cpu_set_thread_pool(void* gomp_parallel);

// Merges the per-channel peaks of x into keys.
//   x            [T, C] of `dtype`
//   stride       elements between the rows of x
//   keys         [C], in and out
//   token_index  [T] or null
//   threads      at most this many threads; small inputs use fewer
//   isa          swk_isa
// Errors: SWK_BAD_DTYPE, SWK_BAD_SIZE, SWK_BAD_TOKEN, SWK_BAD_ISA, SWK_OUT_OF_MEMORY.
SWK_API int swk_cpu_column_absmax(const void* x, int dtype, int64_t T, int64_t C, int64_t stride,
                                  int64_t* keys, const int64_t* token_index, int64_t token_offset,
                                  int threads, int isa);

// h = act(gate) * up, computed in float32 and rounded once; merges the peaks of the rounded h into
// keys.
//   gate, up     [T, C] of `dtype`
//   h            [T, C] of `dtype`, out; must not overlap gate or up
//   keys         [C], in and out; null where the peaks are not wanted
//   token_index  [T] or null; rows that are left out of the peaks are computed all the same
// Errors: as above, and SWK_BAD_ACTIVATION.
SWK_API int swk_cpu_glu_absmax(const void* gate, int64_t gate_stride, const void* up,
                               int64_t up_stride, void* h, int64_t h_stride, int dtype,
                               int activation, int64_t T, int64_t C, int64_t* keys,
                               const int64_t* token_index, int64_t token_offset, int threads,
                               int isa);

// values[i] = sum over t of dy[t, rows[i]] * x[t, cols[i]]: the gradient of a weight [D, H] at k
// coordinates. float32 products, summed in float32 over at most 256 tokens (or T / 64) and in
// double beyond, always in the same order. Infinities and NaN pass through.
//   dy          [T, D] of `dy_dtype`;  x [T, H] of `x_dtype`
//   rows, cols  [k], in any order; sorted by column, or by row, they use the cache best
//   values      [k], out
// Errors: SWK_BAD_DTYPE, SWK_BAD_SIZE, SWK_BAD_INDEX, SWK_BAD_ISA, SWK_OUT_OF_MEMORY.
SWK_API int swk_cpu_sampled_grad(const void* dy, int dy_dtype, int64_t dy_stride, const void* x,
                                 int x_dtype, int64_t x_stride, int64_t T, int64_t D, int64_t H,
                                 const int32_t* rows, const int32_t* cols, int64_t k,
                                 float* values, int threads, int isa);

// y[t, rows[i]] += values[i] * x[t, cols[i]] for every i: the part that k deltas of a weight [D, H]
// have in x W^T, in place. The entries of a run of equal rows are summed in float32 and rounded to
// y's type once, so rows should be sorted.
//   x  [T, H] of `x_dtype`;  y [T, D] of `y_dtype`, in and out; must not overlap x
// Errors: as above.
SWK_API int swk_cpu_sparse_linear(const void* x, int x_dtype, int64_t x_stride, void* y,
                                  int y_dtype, int64_t y_stride, int64_t T, int64_t D, int64_t H,
                                  const float* values, const int32_t* rows, const int32_t* cols,
                                  int64_t k, int threads, int isa);

// grad[rows[i], cols[i]] *= scale, in place; exactly zero for scale 0, whatever was there. A
// coordinate should be listed once.
//   grad  [D, H] of `dtype`, its rows `stride` elements apart
// Errors: as above.
SWK_API int swk_cpu_masked_grad(void* grad, int dtype, int64_t stride, int64_t D, int64_t H,
                                const int32_t* rows, const int32_t* cols, int64_t k, float scale,
                                int threads, int isa);

// out[t - start, j] = 0 where dropout drops element (t, j) of an activation [T, N], else `scale`, for
// the tokens [start, stop). Word j % 4 of Philox4x32-10 with the counter t * ceil(N / 4) + j / 4 and
// the key `seed` is compared with `threshold` (below 2^32); less is dropped.
//   out  [stop - start, N], contiguous
// Errors: SWK_BAD_SIZE, SWK_BAD_ISA.
SWK_API int swk_cpu_dropout(float* out, int64_t start, int64_t stop, int64_t N, int64_t seed,
                            int64_t threshold, float scale, int threads, int isa);

// The k entries of largest magnitude over the products of `count` pairs of factors, in descending
// order; of equal ones the first, by product and by place; NaN before infinity. An entry is the sum
// of its r products in double, one after the other.
//   B, A    B[i] [D[i], r[i]] and A[i] [r[i], H[i]], contiguous float32
//   k       at most the number of entries
//   sums, places, which  [k], out: the entry, row * H + column, and the number of its pair
// Errors: SWK_BAD_SIZE, SWK_BAD_ISA, SWK_OUT_OF_MEMORY.
SWK_API int swk_cpu_topk_low_rank(const float* const* B, const float* const* A, const int64_t* D,
                                  const int64_t* H, const int64_t* r, int64_t count, int64_t k,
                                  double* sums, int64_t* places, int64_t* which, int threads,
                                  int isa);

// The k entries of largest magnitude over `count` matrices, in descending order; of equal ones
// the first, by matrix and by place.
//   x       x[i] [D[i], H[i]] of dtypes[i] (swk_dtype, those of 8 bits too)
//   strides [2 * count]: elements from a row of x[i] to the next, and from a column to the next
//   k       at most the number of entries
//   values, places, which  [k], out: the entry, row * H + column, and the number of its matrix
//   nan     [2], out with SWK_NOT_A_NUMBER: matrix and place of the first NaN
// Errors: SWK_BAD_DTYPE, SWK_BAD_SIZE, SWK_BAD_ISA, SWK_OUT_OF_MEMORY, SWK_NOT_A_NUMBER.
SWK_API int swk_cpu_topk_abs(const void* const* x, const int* dtypes, const int64_t* D,
                             const int64_t* H, const int64_t* strides, int64_t count, int64_t k,
                             float* values, int64_t* places, int64_t* which, int64_t* nan,
                             int threads, int isa);

// Packed matrices, here and below:
//   D, H                       the matrix [D, H], at most 2^31 - 1 elements
//   block_rows, block_columns  0 and n: runs of n elements of the flattened matrix, the last one
//                              shorter where n does not divide; r and c: tiles, smaller at the
//                              border. Blocks are numbered in the order of their first elements.
//   code, symmetric            swk_code; 0 for integers with a zero point in each block
//   codes                      a byte an element (INT8: two's complement where symmetric), or half
//                              a byte (symmetric INT4: with 8 added), the first element in the
//                              high half
//   scales, scale_dtype        one a block, SWK_FLOAT32 or SWK_FLOAT16
//   zero_points                one a block, integers of `zero_bytes` (4 or 2) bytes; null where
//                              symmetric
//   positions, k               row * H + column of what is kept exactly, ascending
//   values, value_dtype        [k], what is kept

// Quantizes w [D, H] (contiguous, of `dtype`): ranges without the elements at `positions`, cut by
// `clip`; scales; codes to nearest, for the scales as they are stored.
//   zero_bits    an asymmetric block's scale is at least 2^-zero_bits of its largest magnitude
//   clip_value   see swkernels/backends/plan.py; factors [factor_count] are those of SEARCH
//   scales       out, or in where `given` is not 0: then only codes are written
//   zero_points  int32, as scales; null where symmetric
//   codes        out; null where only scales are wanted
// A scale is NaN or infinite where its block is, or where scale_dtype does not hold it.
// Errors: SWK_BAD_SIZE, SWK_BAD_DTYPE, SWK_BAD_INDEX, SWK_BAD_ISA, SWK_OUT_OF_MEMORY.
SWK_API int swk_cpu_block_quantize(const void* w, int dtype, int64_t D, int64_t H,
                                   int64_t block_rows, int64_t block_columns, int code,
                                   int symmetric, int zero_bits, int clip, double clip_value,
                                   const float* factors, int64_t factor_count,
                                   const int32_t* positions, int64_t k, void* scales,
                                   int scale_dtype, int32_t* zero_points, uint8_t* codes,
                                   int given, int threads, int isa);

// out = the values of a packed matrix, rounded once to `dtype`; exact where kept. Of the flattened
// matrix the elements [begin, end).
// Errors: SWK_BAD_SIZE, SWK_BAD_DTYPE, SWK_BAD_INDEX, SWK_BAD_ISA.
SWK_API int swk_cpu_block_dequantize(const uint8_t* codes, int64_t D, int64_t H,
                                     int64_t block_rows, int64_t block_columns, int code,
                                     int symmetric, const void* scales, int scale_dtype,
                                     const void* zero_points, int zero_bytes,
                                     const int32_t* positions, const void* values,
                                     int value_dtype, int64_t k, int64_t begin, int64_t end,
                                     void* out, int dtype, int threads, int isa);

// y [T, D] = x W^T + bias of a packed W [D, H]; sums in float32, rounded once.
//   x     [T, H] of `dtype`, its rows `x_stride` elements apart
//   bias  [D] of `dtype`, or null
//   y     [T, D] of `dtype`, contiguous, out
// Errors: as above, and SWK_OUT_OF_MEMORY.
SWK_API int swk_cpu_quant_linear(const void* x, int dtype, int64_t x_stride, int64_t T,
                                 const uint8_t* codes, int64_t D, int64_t H, int64_t block_rows,
                                 int64_t block_columns, int code, int symmetric,
                                 const void* scales, int scale_dtype, const void* zero_points,
                                 int zero_bytes, const int32_t* positions, const void* values,
                                 int value_dtype, int64_t k, const void* bias, void* y,
                                 int threads, int isa);

// Merges the per-channel peaks of x into keys, on the current CUDA device.
//   x, keys, token_index  device pointers; otherwise as swk_cpu_column_absmax. Rows that start on
//                         16-byte boundaries are read 16 bytes at a time, others by the element.
//   stream                a cudaStream_t; the call returns once the kernel is queued
// The caller guarantees the range of the tokens: token_index is not read on the host.
// Errors: SWK_BAD_DTYPE, SWK_BAD_SIZE, SWK_BAD_TOKEN (token_offset), SWK_CUDA_ERROR.
SWK_API int swk_cuda_column_absmax(const void* x, int dtype, int64_t T, int64_t C, int64_t stride,
                                   int64_t* keys, const int64_t* token_index, int64_t token_offset,
                                   void* stream);

// One of several matrices [D, H] on a device: its swk_dtype, those of 8 bits too, and how many
// elements lie from a row to the next and from a column to the next, one of them 1.
typedef struct swk_matrix {
  const void* x;
  int64_t dtype, D, H, row_stride, column_stride;
} swk_matrix;

// The two passes of a search for the entries of largest magnitude over `count` matrices, on the
// current CUDA device. Entries are numbered matrix by matrix and row by row: those are their
// places. Their keys are the bits of |v| as float32. A pass reads 16 bytes at a time, and
// elements before the first and beyond the last 16-byte boundary of a row one by one.
//   matrices  [count], on the host, read before the call returns; the elements are on the device
//   low       a key, at most that of infinity
//   nan       out: lowered to the place of the first NaN that the pass reads
//   stream    a cudaStream_t; the calls return once the kernels are queued
// Errors: SWK_BAD_DTYPE, SWK_BAD_SIZE (also a number outside its range), SWK_CUDA_ERROR.

// Adds to counts[(key - low) >> shift] for each entry whose key is at least `low`; or, with `ties`,
// to counts[(place - first) >> shift] for each entry from `first` on whose key is `low`. Entries
// beyond the last bin are not counted.
//   step    looks at every step-th piece of 16 KiB only; 1 looks at all
//   counts  [bins], device, in and out; bins from 1 to 2048
SWK_API int swk_cuda_topk_abs_count(const swk_matrix* matrices, int64_t count, int64_t step,
                                    int low, int ties, int64_t first, int shift, int bins,
                                    int64_t* counts, int64_t* nan, void* stream);

// Writes, in no order, the values and the places of the entries whose key is above `low`, or is
// `low` at a place up to `last`.
//   values, places  [capacity], device, out
//   found           device, in and out: raised by how many there are; once it is above `capacity`
//                   the pass ends early, and neither the number nor `nan` is complete
SWK_API int swk_cuda_topk_abs_gather(const swk_matrix* matrices, int64_t count, int low,
                                     int64_t last, int64_t capacity, float* values,
                                     int64_t* places, int64_t* found, int64_t* nan, void* stream);

// What the last SWK_CUDA_ERROR of this thread was: the kernel, its launch shape and CUDA's own
// text. Valid until the thread's next call.
SWK_API const char* swk_cuda_last_error(void);

#ifdef __cplusplus
}
#endif

#endif  // SWKERNELS_H
