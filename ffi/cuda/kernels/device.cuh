// SPDX-License-Identifier: Apache-2.0
//
// What the kernels need of the device, in one place: no CUDA header is used, so that NVRTC needs
// none. tests/cuda/shim.h gives the same names a meaning on the CPU.

#if !defined(JAXWIN_SHIM)

#define JAXWIN_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define JAXWIN_ARGS const __grid_constant__
#define JAXWIN_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define JAXWIN_DEVICE __device__ __forceinline__

namespace jaxwin {
namespace cuda {

// Fused multiply-add, and operations that nothing may fuse. Compiled with -ftz=true.
JAXWIN_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
JAXWIN_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
JAXWIN_DEVICE float sub(float a, float b) { return __fsub_rn(a, b); }
JAXWIN_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
JAXWIN_DEVICE float div(float a, float b) { return __fdiv_rn(a, b); }
JAXWIN_DEVICE int float_bits(float a) { return __float_as_int(a); }
JAXWIN_DEVICE float bits_float(int a) { return __int_as_float(a); }

// Copies kBytes (4, 8 or 16) to shared memory, or zeros where not `real`; done after the wait for
// its group. `from` must be a valid address in any case.
template <int kBytes>
JAXWIN_DEVICE void copy_async(void* to, const void* from, bool real) {
#if __CUDA_ARCH__ >= 800
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = real ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                 "r"(bytes));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from),
                 "n"(kBytes), "r"(bytes));
  }
#else
  for (int i = 0; i < kBytes / 4; ++i) {
    static_cast<int*>(to)[i] = real ? static_cast<const int*>(from)[i] : 0;
  }
#endif
}
JAXWIN_DEVICE void commit_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;");
#endif
}
// Until at most so many groups of this thread are under way.
template <int kGroups>
JAXWIN_DEVICE void wait_groups() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups));
#endif
}

#if __CUDA_ARCH__ >= 800
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
JAXWIN_DEVICE void load_matrices(unsigned (&r)[4], const void* row) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared));
}
JAXWIN_DEVICE void load_matrices_transposed(unsigned (&r)[4], const void* row) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared));
}
// d += a * b for a 16 x k, b k x 8, row and column major; PTX ISA, "mma.m16n8k8", "mma.m16n8k16".
JAXWIN_DEVICE void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
JAXWIN_DEVICE void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
JAXWIN_DEVICE void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
JAXWIN_DEVICE unsigned to_tf32(float a) {
  unsigned r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(a));
  return r;
}
#endif

JAXWIN_DEVICE float bf16_to_float(unsigned short a) {
  return __int_as_float(static_cast<int>(a) << 16);
}
JAXWIN_DEVICE float f16_to_float(unsigned short a) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(a));
  return r;
}
// Rounded to nearest even, in integers: the same on every architecture.
JAXWIN_DEVICE unsigned short float_to_bf16(float a) {
  const unsigned bits = static_cast<unsigned>(__float_as_int(a));
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<unsigned short>(bits >> 16 | 0x40U);
  return static_cast<unsigned short>((bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16);
}
JAXWIN_DEVICE unsigned short float_to_f16(float a) {
  unsigned short r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(a));
  return r;
}

}  // namespace cuda
}  // namespace jaxwin

#endif  // JAXWIN_SHIM

namespace jaxwin {
namespace cuda {

// --- elements -----------------------------------------------------------------------------------
// JAXWIN_TYPE: 0 float32, 1 bfloat16, 2 float16.

#if !defined(JAXWIN_TYPE)
#define JAXWIN_TYPE 0
#endif
#if JAXWIN_TYPE == 0
using Element = float;
JAXWIN_DEVICE float widen(Element a) { return a; }
JAXWIN_DEVICE Element narrow(float a) { return a; }
#elif JAXWIN_TYPE == 1
using Element = unsigned short;
JAXWIN_DEVICE float widen(Element a) { return bf16_to_float(a); }
JAXWIN_DEVICE Element narrow(float a) { return float_to_bf16(a); }
#else
using Element = unsigned short;
JAXWIN_DEVICE float widen(Element a) { return f16_to_float(a); }
JAXWIN_DEVICE Element narrow(float a) { return float_to_f16(a); }
#endif
#if JAXWIN_RESULT_F32
using Result = float;
JAXWIN_DEVICE Result round_result(float a) { return a; }
#else
using Result = Element;
JAXWIN_DEVICE Result round_result(float a) { return narrow(a); }
#endif
constexpr int kLanes16 = 16 / static_cast<int>(sizeof(Element));  // elements in 16 bytes

// --- the epilogue: operation by operation that of kernels/elementwise.h -------------------------

// x86's: the second operand where either is NaN.
JAXWIN_DEVICE float greater_of(float a, float b) { return a > b ? a : b; }
JAXWIN_DEVICE float less_of(float a, float b) { return a < b ? a : b; }

JAXWIN_DEVICE float exponential(float x) {
  const float magic = 12582912.0F;
  x = less_of(88.0F, greater_of(-87.0F, x));
  const float shifted = fma(x, 1.44269504088896341F, magic);
  const float n = sub(shifted, magic);
  float r = fma(n, -0.693145751953125F, x);
  r = fma(n, -1.42860682030941723212e-6F, r);
  float p = 1.381461e-3F;
  p = fma(p, r, 8.368711e-3F);
  p = fma(p, r, 4.166839e-2F);
  p = fma(p, r, 0.16666521F);
  p = fma(p, r, 0.49999994F);
  p = fma(p, r, 1.0F);
  p = fma(p, r, 1.0F);
  const unsigned power = static_cast<unsigned>(float_bits(shifted)) << 23;
  return mul(p, bits_float(static_cast<int>(power + static_cast<unsigned>(float_bits(1.0F)))));
}

JAXWIN_DEVICE float sigmoid(float x) { return div(1.0F, add(1.0F, exponential(sub(0.0F, x)))); }

JAXWIN_DEVICE float hyperbolic_tangent(float x) {
  const float a = greater_of(sub(0.0F, x), x);
  const float s = mul(x, x);
  float p = -5.70498872745e-3F;
  p = fma(p, s, 2.06390887954e-2F);
  p = fma(p, s, -5.37397155531e-2F);
  p = fma(p, s, 1.33314422036e-1F);
  p = fma(p, s, -3.33332819422e-1F);
  const float small = fma(mul(p, s), x, x);
  float large = sub(1.0F, div(2.0F, add(exponential(add(a, a)), 1.0F)));
  large = x < 0.0F ? sub(0.0F, large) : large;
  return a < 0.625F ? small : large;
}

// The order of jaxwin::Activation.
JAXWIN_DEVICE float activate(float x, int activation) {
  switch (activation) {
    case 1:
      return greater_of(0.0F, x);
    case 2:
      return less_of(6.0F, greater_of(0.0F, x));
    case 3: {
      const float cube = mul(mul(x, x), x);
      return mul(x, sigmoid(mul(1.59576912160573F, fma(0.044715F, cube, x))));
    }
    case 4:
      return mul(x, sigmoid(x));
    case 5:
      return greater_of(mul(0.01F, x), x);
    case 6:
      return hyperbolic_tangent(x);
    case 7:
      return sigmoid(x);
    default:
      return x;
  }
}

// One result: bias, residual, activation, rounding. `feature`: g * k + j; `at`: its place in y.
JAXWIN_DEVICE float finish(const ConvArgs& a, float value, int feature, int at) {
#if JAXWIN_EPILOGUE
  if (a.bias != nullptr) value = add(value, widen(static_cast<const Element*>(a.bias)[feature]));
  if (a.residual != nullptr) {
    value = add(value, widen(static_cast<const Element*>(a.residual)[at]));
  }
  value = activate(value, JAXWIN_ACTIVATION);
#endif
  static_cast<void>(a);
  static_cast<void>(feature);
  static_cast<void>(at);
  return value;
}

// --- positions ----------------------------------------------------------------------------------

// Where nothing is: no position of an input is reached from here.
constexpr int kNowhere = -(1 << 30);

// JAXWIN_DIMS: spatial dimensions that are not trivial (1: x; 2: y, x; 3: z, y, x).
#if !defined(JAXWIN_DIMS)
#define JAXWIN_DIMS 3
#endif
constexpr int kFirstDim = 3 - JAXWIN_DIMS;

// Image and output position of a row. JAXWIN_IMAGES_FIRST: images run fastest, else pixels.
JAXWIN_DEVICE int row_position(const ConvArgs& a, const Part& p, int row, int (&o)[3]) {
#if JAXWIN_IMAGES_FIRST
  int image = row % a.n;
  int pixel = row / a.n;
#else
  int pixel = row;
#endif
  o[2] = pixel % p.out[2];
  pixel /= p.out[2];
  o[1] = o[0] = 0;
  if (JAXWIN_DIMS > 1) {
    o[1] = pixel % p.out[1];
    pixel /= p.out[1];
  }
  if (JAXWIN_DIMS > 2) {
    o[0] = pixel % p.out[0];
    pixel /= p.out[0];
  }
#if !JAXWIN_IMAGES_FIRST
  int image = pixel;
#endif
  return image;
}

JAXWIN_DEVICE int part_of_block(const ConvArgs& a, int row_block) {
  int part = 0;
  while (part + 1 < a.parts && row_block >= a.part[part + 1].first_block) ++part;
  return part;
}

}  // namespace cuda
}  // namespace jaxwin
