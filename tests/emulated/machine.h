// What a kernel of epops/csrc sees of a GPU when it runs on a CPU: threads, warps, shared memory, barriers, atomics and
// the instructions that build.py puts in the place of PTX. See machine.cpp for what happens behind it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#undef __device__
#undef __host__
#undef __global__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __CUDA_ARCH__ 900

namespace emulated {

enum Scope : int { kBlock = 0, kDevice = 1, kSystem = 2 };  // of a fence, and of what a word releases

struct Place {
  uint3 thread, block;
  dim3 threads, blocks;
};
const Place& here();
void* dynamic_shared();
void* static_shared(int id, uint64_t bytes);  // the same memory for all threads of a block
template <class T, int kId>
T& shared() {
  return *static_cast<T*>(static_shared(kId, sizeof(T)));
}

// Barriers of a warp, a team, a block. A collective gives each lane the values of all 32.
void sync_warp();
void sync_named(int id, int num_threads);
const uint64_t* exchange(uint64_t mine);

// Words that threads tell one another with. None of these is a race; a store releases what a fence has covered.
void before_load(const void* address, int bytes);
void after_load(const void* address, int bytes, uint64_t value);
void before_store(const void* address, int bytes, bool joins = false);  // `joins`: what was released there before stays
void fence(Scope scope);
void fence_proxy();

// Plain accesses of instructions that the compiler does not see.
void reads(const void* address, int bytes);
void writes(const void* address, int bytes);

void async_copy(void* to, const void* from, int bytes);  // cp.async
void async_commit();
void async_wait(int pending);
void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void bulk_store(uint64_t to, uint32_t from, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending, bool only_read);

void barrier_init(uint32_t barrier, uint32_t count);
void barrier_arrive(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
bool barrier_over(uint32_t barrier, uint32_t parity);  // a wait that gives up at once

void wait_for_earlier();
void launch_dependents();
uint64_t now_ns();
[[noreturn]] void fail(const char* what);

void launch(uint64_t stream, int blocks, int threads, uint64_t shared_bytes, bool overlaps, const std::string& name,
            std::function<void()> kernel);

// Functions that access words themselves, which the compiler is not to tell of.
#define UNSEEN __attribute__((noinline, no_sanitize("thread")))

template <class T>
UNSEEN T load_word(const T* address) {
  before_load(address, sizeof(T));
  const T value = *const_cast<const volatile T*>(address);
  after_load(address, sizeof(T), static_cast<uint64_t>(value));
  return value;
}
template <class T>
UNSEEN void store_word(T* address, T value) {
  before_store(address, sizeof(T));
  *const_cast<volatile T*>(address) = value;
}
UNSEEN inline uint4 load_line(const void* address) {
  before_load(address, 16);
  uint4 v;
  __builtin_memcpy(&v, address, 16);
  after_load(address, 16, (uint64_t{v.x} << 32 | v.y) * 31 + (uint64_t{v.z} << 32 | v.w));
  return v;
}
UNSEEN inline void store_line(void* address, uint4 v) {
  before_store(address, 16);
  __builtin_memcpy(address, &v, 16);
}
// By all lanes of a warp, whose accesses happen at once.
uint4 ld_lines(const void* address);
void st_lines(void* address, uint4 v);
template <class T>
UNSEEN T unseen(const void* address) {
  T value;
  __builtin_memcpy(&value, address, sizeof(T));
  return value;
}
template <class T>
UNSEEN void set_unseen(void* address, const T& value) {
  __builtin_memcpy(address, &value, sizeof(T));
}
template <class T>
T load(const void* address) {
  reads(address, sizeof(T));
  return unseen<T>(address);
}
template <class T>
void store(void* address, const T& value) {
  writes(address, sizeof(T));
  set_unseen(address, value);
}
template <class T, class Change>
UNSEEN T change(T* address, Change with) {
  before_load(address, sizeof(T));
  const T old = *const_cast<volatile T*>(address);
  after_load(address, sizeof(T), static_cast<uint64_t>(old));
  const T made = with(old);
  if (made != old) {  // one that changes nothing is a load
    before_store(address, sizeof(T), true);
    *const_cast<volatile T*>(address) = made;
  }
  return old;
}
template <class T>
T of_bits(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

}  // namespace emulated

inline void __syncthreads() { emulated::sync_named(0, emulated::here().threads.x); }
inline void __syncwarp() { emulated::sync_warp(); }
inline void __threadfence() { emulated::fence(emulated::kDevice); }
inline void __threadfence_system() { emulated::fence(emulated::kSystem); }
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { emulated::fail("__trap"); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated::of_bits<T>(emulated::exchange(emulated::bits_of(value))[lane & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::of_bits<T>(emulated::exchange(emulated::bits_of(value))[(emulated::here().thread.x ^ mask) & 31]);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  const uint64_t* all = emulated::exchange(emulated::bits_of(value));
  const int lane = emulated::here().thread.x % 32;
  return lane >= by ? emulated::of_bits<T>(all[lane - by]) : value;
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* all = emulated::exchange(predicate != 0);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}
inline int __all_sync(unsigned, int predicate) { return __ballot_sync(~0u, predicate) == ~0u; }
inline int __any_sync(unsigned, int predicate) { return __ballot_sync(~0u, predicate) != 0; }
template <class Fold>
unsigned reduce_warp(unsigned value, Fold fold) {
  const uint64_t* all = emulated::exchange(value);
  unsigned result = static_cast<unsigned>(all[0]);
  for (int lane = 1; lane < 32; ++lane) result = fold(result, static_cast<unsigned>(all[lane]));
  return result;
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  return reduce_warp(value, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  return reduce_warp(value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return reduce_warp(value, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return reduce_warp(value, [](unsigned a, unsigned b) { return a < b ? b : a; });
}

template <class T, class U>
T atomicAdd(T* address, U value) {
  return emulated::change(address, [=](T old) { return static_cast<T>(old + static_cast<T>(value)); });
}
template <class T, class U>
T atomicExch(T* address, U value) {
  return emulated::change(address, [=](T) { return static_cast<T>(value); });
}
template <class T, class U>
T atomicOr(T* address, U value) {
  return emulated::change(address, [=](T old) { return static_cast<T>(old | static_cast<T>(value)); });
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (by & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline float __uint_as_float(unsigned v) { return emulated::of_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return static_cast<unsigned>(emulated::bits_of(v)); }
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline uint64_t __cvta_generic_to_shared(const void* address) { return reinterpret_cast<uint64_t>(address); }
template <class A, class B>
auto min(A a, B b) -> typename std::common_type<A, B>::type {
  return b < a ? b : a;
}
template <class A, class B>
auto max(A a, B b) -> typename std::common_type<A, B>::type {
  return a < b ? b : a;
}

#define cudaFuncSetAttribute(...) cudaSuccess
template <class Params>
cudaError_t emulated_launch(const cudaLaunchConfig_t* config, void (*kernel)(Params), const Params& p) {
  const char* name = std::strstr(__PRETTY_FUNCTION__, "Params = ") + 9;  // epops::DispatchParams; …
  emulated::launch(reinterpret_cast<uint64_t>(config->stream), config->gridDim.x, config->blockDim.x,
                   config->dynamicSmemBytes, config->numAttrs != 0, std::string(name, std::strcspn(name, ";]")),
                   [kernel, p] { kernel(p); });
  return cudaSuccess;
}
#define cudaLaunchKernelEx emulated_launch
